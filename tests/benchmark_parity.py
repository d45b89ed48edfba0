"""Whether scores are lm-eval's: the same model asked the same questions by both, question for question.

Run it: python tests/benchmark_parity.py [--model bundled] [--data FOLDER] [--protocols leaderboard ...] [--tasks ...]
        [--limit 2] [--most 16] [--batch-size 4] [--out FILE]

Both in float32 on the CPU, lm-eval in a process of its own. Prints a row a protocol. FOLDER is the BIG-Bench-Hard
repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval_run

from kallm_bench.bbh.evaluate import EvalSettings, ask, prepare
from kallm_bench.bbh.lm_eval_reading import INVALID
from kallm_bench.bbh.protocols import LM_EVAL_PROTOCOLS, find_protocol
from kallm_bench.bbh.readings import read_reply
from kallm_bench.bbh.samples import Unfinished
from kallm_bench.bbh.scores import score_as_lm_eval
from kallm_bench.bbh.tasks import TASKS

MARGIN = 1e-4
"""Nats: how far log-likelihoods may lie apart, and how clear lm-eval's own choice must be to be held against ours."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """What two ways of asking came to, over the same questions.

    Args:
        prompts_differ: of questions, that are not asked byte for byte alike.
        apart: the largest difference of a log-likelihood, in nats; 0 where replies are generated.
        choices_differ: questions answered otherwise although lm-eval's margin exceeds MARGIN.
        too_close: questions whose margin does not, so that rounding may decide.
        replies_differ: replies that are another text.
        readings_differ: of lm-eval's replies, that are read otherwise here.
        verdicts_differ: questions that only one of both calls right.
        score, lm_eval_score, error, lm_eval_error: the group's mean over questions and its standard error.
        seconds, lm_eval_seconds: processor time of asking, after loading.
    """

    protocol: str
    questions: int
    prompts_differ: int
    apart: float
    choices_differ: int
    too_close: int
    replies_differ: int
    readings_differ: int
    verdicts_differ: int
    score: float
    lm_eval_score: float
    error: float | None
    lm_eval_error: float | None
    seconds: float
    lm_eval_seconds: float


def by_lm_eval(asked: dict[str, Any], home: Path) -> dict[str, Any]:
    """What lm_eval_run.py prints."""
    own = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, lm_eval_run.__file__],
        input=json.dumps(asked),
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(
    model: Any, tokenizer: Any, folder: Path, data: Path, protocols: list[str], tasks: list[str], limit: int, most: int,
    batch_size: int = 4,
) -> list[Parity]:  # fmt: skip
    """Asks by both. `folder` is for what the other process needs."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    asked = {"model": str(folder / "model"), "questions": str(data), "tasks": tasks, "limit": limit}
    theirs = by_lm_eval(asked | {"most": most, "batch": batch_size, "protocols": protocols}, folder / "home")
    rows = []
    for protocol in protocols:
        settings = EvalSettings(protocol, str(data), tuple(tasks), limit, None if protocol == "leaderboard" else most)
        rows.append(_compared(model, tokenizer, settings, theirs[protocol], folder, batch_size))
    return rows


def _compared(
    model: Any, tokenizer: Any, settings: EvalSettings, theirs: dict[str, Any], folder: Path, batch_size: int
) -> Parity:
    begin = time.process_time()
    exam = prepare(dataclasses.replace(settings, reading="lm-eval"), tokenizer)
    unfinished = Unfinished(folder / f"{settings.protocol}.jsonl")
    samples = ask(model, tokenizer, exam, unfinished, batch_size=batch_size)
    seconds = time.process_time() - begin
    rows = {(task, row["index"]): row for task, each in theirs["samples"].items() for row in each}
    assert set(rows) == {(prompt.task, prompt.index) for prompt in exam.prompts}
    apart, counts = 0.0, dict.fromkeys(
        ("prompts_differ", "choices_differ", "too_close", "replies_differ", "readings_differ", "verdicts_differ"), 0
    )  # fmt: skip
    for sample, prompt, question in zip(samples, exam.prompts, exam.questions.questions, strict=True):
        row = rows[prompt.task, prompt.index]
        counts["prompts_differ"] += row["prompt"] != prompt.text
        counts["verdicts_differ"] += row["right"] != sample["correct"]
        if prompt.choices:
            counts["prompts_differ"] += row["choices"] != [f" {choice}" for choice in prompt.choices]
            values = row["loglikelihoods"]
            apart = max(apart, *(abs(a - b) for a, b in zip(values, sample["loglikelihoods"], strict=True)))
            normed = sorted((value / len(text), text) for value, text in zip(values, prompt.choices, strict=True))
            close = normed[-1][0] - normed[-2][0] <= MARGIN
            counts["too_close"] += close
            counts["choices_differ"] += not close and normed[-1][1] != sample["extracted"]
        else:
            counts["replies_differ"] += row["reply"] != sample["completion"]
            read, right = read_reply(exam.protocol, "lm-eval", question, row["reply"])
            counts["readings_differ"] += (read if read is not None else INVALID, right) != (row["answer"], row["right"])
    found = {metric.name: metric.value for metric in score_as_lm_eval(samples, False)}
    return Parity(
        settings.protocol, len(samples), apart=apart, score=found["question_accuracy"] or 0.0,
        lm_eval_score=theirs["score"], error=found.get("question_accuracy_error"), lm_eval_error=theirs["error"],
        seconds=seconds, lm_eval_seconds=theirs["processor_seconds"], **counts,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KALLM_BBH_DIR", "../shared/data/bbh")))
    parser.add_argument("--protocols", nargs="*", default=list(LM_EVAL_PROTOCOLS))
    parser.add_argument("--tasks", nargs="*", help="all that the protocol has, if left out")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--most", type=int, default=16, help="new tokens")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()

    from kallm_bench.models import load_model

    model, tokenizer = load_model(given.model)
    rows = []
    for protocol in given.protocols:
        tasks = given.tasks or [task for task in TASKS if task in find_protocol(protocol).tasks]
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(
                model, tokenizer, Path(folder), given.data, [protocol], tasks, given.limit, given.most, given.batch_size
            )
        row = dataclasses.asdict(rows[-1])
        print(
            ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            ),
            flush=True,
        )
        if given.out:
            given.out.write_text(json.dumps([dataclasses.asdict(each) for each in rows], indent=1))


if __name__ == "__main__":
    main()
