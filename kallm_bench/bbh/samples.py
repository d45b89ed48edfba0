"""What is kept of each question: a line of JSON, appended as answers come, so that a stopped run loses next to none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kallm_bench.bbh.prompts import Prompt
from kallm_bench.files import explained, write_file

Sample = dict[str, Any]
Key = tuple[str, int]
"""Task and index of a question."""

SAMPLE_FIELDS = (
    "task",
    "index",
    "protocol",
    "prompt_sha256",
    "choices",
    "loglikelihoods",
    "completion",
    "extracted",
    "target",
    "correct",
    "target_loglikelihood",
    "target_rank",
    "left_out_tokens",
    "forwarded_tokens",
)
"""Of a sample, in the order they are written.

prompt_sha256: its first DIGITS digits; choices: those compared, or what the question lists; loglikelihoods: of those
compared, in nats; completion: the reply, None where choices are compared; extracted: the answer, None where none
could be read; target_loglikelihood, target_rank: of the gold answer among the choices compared, from 1, None where it
is none of them; left_out_tokens: cut from the prompt's beginning to fit the context; forwarded_tokens: put through
the model for this question.
"""


DIGITS = 16
"""Of a hash, 64 bits: they tell prompts apart, and all 64 digits would be half of what a file of samples takes."""


def key_of(sample: Sample) -> Key:
    return sample["task"], sample["index"]


def sample_of(prompt: Prompt, protocol: str, **found: Any) -> Sample:
    """The sample of a question: what its prompt says, and what was found. Every field has to be there."""
    known = {
        "task": prompt.task,
        "index": prompt.index,
        "protocol": protocol,
        "prompt_sha256": prompt.sha256[:DIGITS],
        "target": prompt.target,
    } | found
    return {field: known[field] for field in SAMPLE_FIELDS}


class Unfinished:
    """The samples of a run that is not done yet, on the disk: a file for each process, read by the first one.

    Args:
        path: of the first process's file; the others' stand beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Key, Sample]:
        """What is there. Lines that were cut off or damaged are dropped, also from the file, and asked again."""
        found: dict[Key, Sample] = {}
        for path in self._files():
            lines = path.read_bytes().splitlines(keepends=True)
            samples = [(line, sample) for line in lines if (sample := _sample_in(line))]
            if len(samples) < len(lines):
                write_file(path, b"".join(line for line, _ in samples))
            found |= {key_of(sample): sample for _, sample in samples}
        return found

    @contextmanager
    def writing(self, process: int = 0) -> Iterator[Callable[[Sample], None]]:
        """Inside, what is yielded adds a sample to a process's file. DiskError, before any work, where that refuses."""
        path = self.path if process == 0 else self.path.with_suffix(f".{process}{self.path.suffix}")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a", encoding="utf-8")

        def add(sample: Sample) -> None:
            with explained(path):
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                file.flush()

        with file:
            yield add

    def remove(self, only_empty: bool = False) -> None:
        """Removes the files, or those without a sample."""
        for path in self._files():
            if not only_empty or path.stat().st_size == 0:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        others = self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")
        return [path for path in (self.path, *sorted(others)) if path.is_file()]


def _sample_in(line: bytes) -> Sample | None:
    try:
        sample = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(sample, dict) and tuple(sample) == SAMPLE_FIELDS and line.endswith(b"\n")
    return sample if whole else None
