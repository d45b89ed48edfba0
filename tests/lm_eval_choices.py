"""Run by benchmark_loglikelihood.py in a process of its own: choices scored by lm-eval.

Takes a model's folder, a file that `write` wrote, and the batch size. The last line printed is for `read`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scored:
    """What lm-eval made of prompts: (task, index) to a log-likelihood for each choice; seconds after loading."""

    loglikelihoods: dict[tuple[str, int], list[float]]
    seconds: float
    processor_seconds: float


def write(path: Path, prompts: Sequence[Any]) -> None:
    path.write_text(json.dumps([[prompt.shared + prompt.question, list(prompt.choices)] for prompt in prompts]))


def read(printed: str, prompts: Sequence[Any]) -> Scored:
    told = json.loads(printed.splitlines()[-1])
    found = {(prompt.task, prompt.index): of for prompt, of in zip(prompts, told["found"], strict=True)}
    return Scored(found, told["seconds"], told["processor_seconds"])


def main(folder: str, asked: str, batch_size: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=int(batch_size))
    prompts = json.loads(Path(asked).read_text())
    pairs = [(text, f" {choice}") for text, choices in prompts for choice in choices]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    before = time.perf_counter(), time.process_time()
    answers = iter(scorer.loglikelihood(requests, disable_tqdm=True))
    seconds, processor = time.perf_counter() - before[0], time.process_time() - before[1]
    found = [[next(answers)[0] for _ in choices] for _, choices in prompts]
    told = {"found": found, "seconds": seconds, "processor_seconds": processor}
    sys.stdout.write(f"\n{json.dumps(told)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
