"""What is kept of each question: a line of JSON, appended as answers come, so that a stopped run loses next to none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
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

prompt_sha256: its first DIGITS digits; choices: those compared, or what the question lists, none where any text may
be the answer; loglikelihoods: of those compared, in nats; completion: the reply, None where choices alone are
compared; extracted: the answer, None where none could be read; target_loglikelihood: of the gold answer, in nats,
None where it is none of the choices or was not asked for; target_rank: its place among the choices, from 1, by
likelihood a character, None where there are none or it is none of them; left_out_tokens: cut from the prompt's
beginning to fit the context; forwarded_tokens: put through the model for this question.
"""

LIKELIHOODS = ("choices", "loglikelihoods", "target_loglikelihood", "target_rank")
"""Of those, what the likelihoods of answers come to."""


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


def has_likelihoods(sample: Sample) -> bool:
    """Whether the answers' likelihoods were computed."""
    return bool(sample["loglikelihoods"]) or sample["target_loglikelihood"] is not None


def has_reply(sample: Sample) -> bool:
    """Whether it was replied to."""
    return sample["completion"] is not None


def joined(samples: Iterable[Sample]) -> dict[Key, Sample]:
    """One sample a question, of several or of one in two halves: a reply, and the likelihoods of answers in its place.

    Each half is found, kept and lost by itself, in any order, on any process; a question that has one yet keeps that.
    """
    replied: dict[Key, Sample] = {}
    compared: dict[Key, Sample] = {}
    for sample in samples:
        (replied if has_reply(sample) else compared)[key_of(sample)] = sample
    return compared | {key: _joined(reply, compared.get(key)) for key, reply in replied.items()}


def _joined(reply: Sample, compared: Sample | None) -> Sample:
    if compared is None:
        return reply
    forwarded = reply["forwarded_tokens"] + compared["forwarded_tokens"]
    return reply | {field: compared[field] for field in LIKELIHOODS} | {"forwarded_tokens": forwarded}


class Unfinished:
    """The samples of a run that is not done yet, on the disk: a file for each process, read by the first one.

    Args:
        path: of the first process's file; the others' stand beside it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Key, Sample]:
        """What is there, halves `joined`. Lines cut off or damaged are dropped, also from the file, and asked again."""
        found: list[Sample] = []
        for path in self._files():
            lines = path.read_bytes().splitlines(keepends=True)
            samples = [(line, sample) for line in lines if (sample := _sample_in(line))]
            if len(samples) < len(lines):
                write_file(path, b"".join(line for line, _ in samples))
            found += [sample for _, sample in samples]
        return joined(found)

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
