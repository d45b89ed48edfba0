"""The worked examples of BIG-Bench Hard: three a task, as its repository's chain-of-thought files hold them.

A file is a canary, a line of dashes, the task's description, and questions with a chain of thought each. lm-eval's
few-shot texts are the same, so all of them are read from here.

Source: github.com/suzgunmirac/BIG-Bench-Hard, cot-prompts/*.txt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from kallm_bench.errors import BBHError

SHOTS = 3
THINK = "\nA: Let's think step by step."


@dataclass(frozen=True)
class Example:
    """One worked question: `reasoning` ends with a sentence that gives the `answer`."""

    question: str
    reasoning: str
    answer: str


@dataclass(frozen=True)
class FewShot:
    """What stands before the questions of a task."""

    description: str
    examples: tuple[Example, ...]


def read_fewshot(folder: Path | None, task: str) -> FewShot:
    """The examples of a task from a folder in the repository's layout.

    Raises:
        BBHError: the file is missing, or not of this form; says which.
    """
    path = Path(folder or "") / "cot-prompts" / f"{task}.txt"
    if not path.is_file():
        raise BBHError(f"{folder} has no cot-prompts/{task}.txt; it should be a checkout of suzgunmirac/BIG-Bench-Hard")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BBHError(f"{path} cannot be read: {error}") from error
    _, dashes, told = text.partition("-----\n")
    if not dashes:
        raise BBHError(f"{path} has no line of dashes, -----, above the description")
    description, *worked = told.split("\n\nQ: ")
    if len(worked) < SHOTS:
        raise BBHError(
            f"{path} has {len(worked)} worked questions, each after an empty line and 'Q: '; {SHOTS} are needed"
        )
    return FewShot(description, tuple(_example(each, number, path) for number, each in enumerate(worked[:SHOTS], 1)))


def _example(text: str, number: int, path: Path) -> Example:
    question, found, reasoning = text.partition(THINK)
    if not found:
        raise BBHError(f"{path}: question {number} is not followed by {THINK.strip()!r}")
    reasoning = reasoning[1:].rstrip("\n")  # a new line, in one file a space: lm-eval has a new line there too
    answers = re.findall(r"[Tt]he answer is (.*?)\.?$", reasoning, flags=re.MULTILINE)
    if not answers:
        raise BBHError(f"{path}: the reasoning of question {number} has no 'the answer is'")
    return Example(question, reasoning, answers[-1])
