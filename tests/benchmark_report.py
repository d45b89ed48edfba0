"""How long reports take: `python tests/benchmark_report.py [FOLDER]` makes 10,000 records and times `kallm report`.

The records are those of 25 suites with 25 arms and 4 seeds each, retrofit, train, eval-bbh and profile; each evaluation
is of 216 questions of 27 tasks. The first report reads every answer; later ones remember what followed from them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from kallm_bench.records import Metric, ResultsStore, RunRecord

TASKS = [f"task_{number:02d}" for number in range(27)]
PLACE = {"device": "cuda", "dtype": "bfloat16"}
MACHINE = {"cpu": "a processor", "cores": 16, "memory_gib": 126, "gpus": [{"name": "a GPU"}], "system": "Linux"}
STAGES = ("retrofit", "train", "eval-bbh", "profile")


def records_of(testbed: str, suite: str, arm: int, seed: int) -> list[RunRecord]:
    """The four records of one cell."""
    generator = np.random.default_rng([arm, seed])
    spec = {"blocks": [25, 26, 27, 28, 29], "basis": "linear" if arm < 2 else "cheby2", "degree": 2, "hidden": 64 + arm}
    spec |= {"form": "stack", "constant": "bias", "seed": seed}
    settings = {
        "retrofit": {"spec": spec, "weights": "base"},
        "train": {
            "row_length": 1024,
            "rows_per_step": 32,
            "learning_rate": 4e-4,
            "scope": "tail",
            **PLACE,
            "seed": seed,
        },
        "eval-bbh": {"protocol": "chat", "tasks": TASKS, "max_new_tokens": 64, "questions": "q", **PLACE},
        "profile": {"batch": 16, "length": 1024, "repeats": 5, "scope": "tail", **PLACE},
    }
    speeds = generator.normal(1e5, 1e3, size=(3, 5))
    metrics = {
        "retrofit": [Metric("parameters", 1.2e8), Metric("replaced_parameters", 4.4e6 + 1e5 * arm)],
        "train": [
            Metric("heldout_loss", float(generator.normal(2.5, 0.1)), n=64_239),
            Metric("trainable_parameters", 8.8e6),
            Metric("trained_tokens", 9.2e6),
            Metric("train_loss", 2.5, n=28, samples=tuple(generator.normal(2.5, 0.1, size=280))),
        ],
        "eval-bbh": [
            *(Metric(name, 0.25, n=216) for name in ("accuracy", "guessing_accuracy", "majority_accuracy")),
            *(Metric(f"accuracy/{task}", 0.25, n=8) for task in TASKS),
            *(Metric(f"guessing_accuracy/{task}", 0.25, n=8) for task in TASKS),
        ],
        "profile": [
            Metric("parameters", 1.2e8),
            *(
                Metric(f"{what}_tokens_per_second", float(np.median(each)), n=5, samples=tuple(each))
                for what, each in zip(("prefill", "decode", "train"), speeds, strict=True)
            ),
        ],
    }  # fmt: skip
    found: list[RunRecord] = []
    for number, stage in enumerate(STAGES):
        found.append(
            RunRecord(
                id=f"2026-{suite}-{stage}-arm{arm}-s{seed}",
                stage=stage,
                suite=suite,
                arm=f"arm{arm}",
                seed=seed,
                testbed=testbed,
                started=f"2026-01-01T{arm:02d}:{seed:02d}:{number:02d}+00:00",
                seconds=1.0,
                parents=(found[-1].id,) if found else (),
                settings=settings[stage] | ({"weights": f"w{arm}-{seed}"} if number else {}),
                key=f"{suite}{arm}{seed}{stage}",
                model={"fingerprint": f"w{arm}-{seed}"},
                data={"source": "BIG-Bench Hard", "fingerprint": "q"} if stage == "eval-bbh" else {},
                metrics=tuple(metrics[stage]),
                environment={"git": None},
            )
        )
    return found


def fill(folder: Path, suites: int = 25, arms: int = 25, seeds: int = 4) -> None:
    store = ResultsStore(folder)
    testbed = store.testbed(MACHINE)
    for suite in range(suites):
        for arm in range(arms):
            for seed in range(seeds):
                generator = np.random.default_rng([suite, arm, seed])
                for record in records_of(testbed, f"suite{suite:02d}", arm, seed):
                    samples = [
                        {"task": task, "index": index, "correct": bool(generator.random() < 0.25)}
                        for task in TASKS
                        for index in range(8)
                    ]
                    store.write(record, samples if record.stage == "eval-bbh" else None)


def main(folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        fill(folder)
    print(f"{sum(1 for _ in folder.glob('*/*/*.json')):,} records")
    with tempfile.TemporaryDirectory() as cache:
        for which, form in (("first", "md"), ("second", "md"), ("second", "csv"), ("second", "json")):
            command = [sys.executable, "-m", "kallm_bench.cli", "report", "--results", str(folder), "--format", form]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"KALLM_CACHE": cache})
            print(f"{which} report, {form}: {time.perf_counter() - began:.2f} s, {len(done.stdout):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
