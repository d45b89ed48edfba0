"""How long whole protocols take, after loading, and how often a reply depends on what is asked beside it.

Run it: python tests/benchmark_bbh.py [--data FOLDER] [--protocols leaderboard chat cot-fewshot] [--limit N]
        [--batch-size N] [--max-new-tokens 512] [--seconds 300] [--invariance 8] [--no-likelihoods] [--out FILE]

FOLDER is the BIG-Bench-Hard repository. Seconds begin with the model on its device and hold all else: prompts, tokens,
recording of steps, samples written to the disk. `--max-new-tokens` is for protocols whose own limit is above it: 512 is
what cot-fewshot is measured with here, its own being 1,024. A protocol that takes longer than `--seconds` is stopped,
and its line says how many questions it came to. Then the same questions are asked in batches of one and of 64, and so
many replies differ, outside the batch-invariant mode and in it; with `--invariance 0` they are not.

What the likelihoods of answers add to replies is the difference to a run with `--no-likelihoods`; where the machine
does other work, in processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kallm_bench.bbh.evaluate import EvalSettings, Exam, ask, figures, prepare
from kallm_bench.bbh.protocols import find_protocol
from kallm_bench.bbh.samples import Sample, Unfinished
from kallm_bench.models import load_model
from kallm_bench.profiling.hardware import environment


class _OutOfTimeError(Exception):
    """The protocol has had its seconds."""


@dataclasses.dataclass
class Clock:
    """Watches questions being answered, and stops what takes longer than `most` seconds."""

    most: float
    begin: float = dataclasses.field(default_factory=time.perf_counter)
    processor: float = dataclasses.field(default_factory=time.process_time)

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None:
        if self.seconds > self.most and done < total:
            raise _OutOfTimeError

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    @property
    def processor_seconds(self) -> float:
        return time.process_time() - self.processor


def run(
    model: Any, tokenizer: Any, settings: EvalSettings, batch: int | None, most: float, prepared: Exam | None = None
) -> tuple[dict[str, Any], Exam, list[Sample]]:
    """Asks, and says how long that took."""
    synchronise(model)
    clock = Clock(most)
    exam = prepared or prepare(settings, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        unfinished = Unfinished(Path(folder) / "samples.jsonl")
        try:
            samples = ask(model, tokenizer, exam, unfinished, batch_size=batch, watch=clock)
        except _OutOfTimeError:
            samples = list(unfinished.read().values())
    synchronise(model)
    row = {
        "protocol": settings.protocol,
        "max_new_tokens": exam.max_new_tokens,
        "batch_size": batch,
        "batch_invariant": settings.batch_invariant,
        "likelihoods": exam.likelihoods,
        "questions": len(samples),
        "of": len(exam.prompts),
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "forwarded_tokens": sum(sample["forwarded_tokens"] for sample in samples),
        "reply_tokens": sum(len(ids) for ids in replies_in_tokens(tokenizer, samples)),
    }
    return row, exam, samples


def replies_in_tokens(tokenizer: Any, samples: list[Sample]) -> list[list[int]]:
    replies = [sample["completion"] for sample in samples if sample["completion"]]
    return tokenizer(replies, add_special_tokens=False)["input_ids"] if replies else []  # type: ignore[no-any-return]


def synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def differing(model: Any, tokenizer: Any, settings: EvalSettings, invariant: bool, most: float) -> dict[str, Any]:
    """In how many questions the reply or the answer is another in a batch of 64 than alone."""
    settings = dataclasses.replace(settings, batch_invariant=invariant)
    exam = prepare(settings, tokenizer)
    found = []
    for batch in (1, 64):
        row, _, samples = run(model, tokenizer, settings, batch, most, exam)
        found.append({(sample["task"], sample["index"]): sample for sample in samples})
    both = [(found[0][key], found[1][key]) for key in found[0] if key in found[1]]
    return {
        "protocol": settings.protocol,
        "batch_invariant": invariant,
        "max_new_tokens": exam.max_new_tokens,
        "compared": len(both),
        "replies_differ": sum(one["completion"] != other["completion"] for one, other in both),
        "answers_differ": sum(one["extracted"] != other["extracted"] for one, other in both),
        "verdicts_differ": sum(one["correct"] != other["correct"] for one, other in both),
        "seconds_at_64": row["seconds"],
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KALLM_BBH_DIR", "../shared/data/bbh")))
    parser.add_argument("--protocols", nargs="*", default=["leaderboard", "chat", "cot-fewshot"])
    parser.add_argument("--limit", type=int, help="questions a task; all if left out")
    parser.add_argument("--batch-size", type=int, help="replies at once; as many as fit if left out")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="at most; 0 for each protocol's own")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a protocol is stopped")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each protocol; the first one warms up")
    parser.add_argument("--invariance", type=int, default=8, help="questions a task that are asked alone and by 64")
    parser.add_argument("--invariance-protocol", default="chat")
    parser.add_argument("--likelihoods", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    model, tokenizer = load_model(given.model, getattr(torch, given.dtype), device)
    rows: list[dict[str, Any]] = []

    def settings_of(protocol: str, limit: int | None) -> EvalSettings:
        fewer = 0 < given.max_new_tokens < find_protocol(protocol).max_new_tokens
        most = given.max_new_tokens if fewer else None
        return EvalSettings(protocol, str(given.data), limit=limit, max_new_tokens=most, likelihoods=given.likelihoods)

    def write() -> None:
        if given.out:
            told = {name: str(value) for name, value in vars(given).items()}
            facts = {"environment": environment(device), "settings": told, "figures": rows}
            given.out.write_text(json.dumps(facts, indent=1))

    for protocol in given.protocols:
        settings = settings_of(protocol, given.limit)
        for number in range(given.repeat):
            row, exam, samples = run(model, tokenizer, settings, given.batch_size, given.seconds)
            row["run"] = number
            whole = row["questions"] == row["of"]
            if whole:
                found = figures(samples, exam.questions, exam.protocol, exam.reading)
                row["figures"] = {metric.name: metric.value for metric in found if "/" not in metric.name}
            rows.append(row)
            print(
                f"{protocol:12} {row['seconds']:8.1f} s   {row['processor_seconds']:8.1f} s of processor   "
                f"{row['questions']:5} of {row['of']:5} questions   "
                f"{row['forwarded_tokens']:10,.0f} tokens forwarded   {row['reply_tokens']:9,} in replies   "
                + (f"accuracy {row['figures']['accuracy']:.1%}" if whole else f"stopped after {given.seconds:g} s"),
                flush=True,
            )
            write()
    if given.invariance:
        settings = settings_of(given.invariance_protocol, given.invariance)
        for invariant in (False, True):
            row = differing(model, tokenizer, settings, invariant, given.seconds)
            rows.append(row)
            print(
                f"{row['protocol']:12} alone and by 64{', batch-invariant' * invariant}: of {row['compared']} "
                f"{row['replies_differ']} replies, {row['answers_differ']} answers and {row['verdicts_differ']} "
                f"verdicts differ; {row['seconds_at_64']:.1f} s by 64",
                flush=True,
            )
            write()


if __name__ == "__main__":
    sys.exit(main())
