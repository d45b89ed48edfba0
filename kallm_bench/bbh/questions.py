"""Where the questions come from: the BIG-Bench-Hard repository's folder, the hub, or our own generators."""

from __future__ import annotations

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kallm_bench.bbh.procedural import GENERATORS, procedural_questions
from kallm_bench.bbh.tasks import PUBLISHED_SHA256, TASKS, Question
from kallm_bench.errors import BBHError, unknown
from kallm_bench.files import sha256
from kallm_bench.hub import hub_answers

HUB_ID = "SaylorTwift/bbh"
PROCEDURAL_COUNT = 100
"""Questions a task where `procedural` is asked for without a limit."""

OFFLINE = (
    "BIG-Bench Hard is not on this disk and the hub cannot be reached. On a connected machine run `kallm fetch bbh`, "
    "and name its folder here: KALLM_BBH_DIR, --source, or `source` in a suite's [eval]; or take --source procedural, "
    "which is not BIG-Bench Hard"
)


@dataclass(frozen=True)
class QuestionSet:
    """The questions of an evaluation.

    Args:
        source: what they are, for tables: "BIG-Bench Hard", "procedural", or a hub id.
        questions: in the order of their tasks and indices.
        majority: task -> its most frequent answer, over all its questions and not only those asked.
        folder: a checkout of the repository, where worked examples can be had: the source itself, or KALLM_BBH_DIR;
            None where there is neither.
    """

    source: str
    questions: tuple[Question, ...]
    majority: dict[str, str]
    folder: Path | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(question.task for question in self.questions))

    @property
    def fingerprint(self) -> str:
        """sha256 over every question and answer."""
        text = json.dumps([[q.task, q.index, q.text, q.target] for q in self.questions])
        return hashlib.sha256(text.encode()).hexdigest()


def load_questions(
    source: str | None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    among: Sequence[str] = tuple(TASKS),
) -> QuestionSet:
    """The questions to ask.

    Args:
        source: a folder in the repository's layout (bbh/*.json), a hub id, or "procedural"; None for the folder in
            KALLM_BBH_DIR, then the hub. Never silently procedural.
        tasks: which tasks; none named means all that the source has.
        limit: the first so many of each task; None for all (PROCEDURAL_COUNT of generated ones).
        seed: of the generators.
        among: the tasks that a protocol has.

    Raises:
        BBHError: unknown task, or one that is not among them, missing file, malformed question, nothing at hand.
    """
    for task in tasks:
        if task not in TASKS:
            raise BBHError(unknown("task", task, TASKS))
        if task not in among:
            raise BBHError(f"task '{task}' has no fixed answers to compare; another protocol asks it, such as zeroshot")
    if limit is not None and limit < 1:
        raise BBHError(f"limit must be at least 1, got {limit}")
    source = source or os.environ.get("KALLM_BBH_DIR") or HUB_ID
    at_hand = os.environ.get("KALLM_BBH_DIR")
    folder = Path(at_hand).expanduser() if at_hand else None
    if source == "procedural":
        label, everything = source, _generated(tasks or [task for task in GENERATORS if task in among], limit, seed)
        limit = limit or PROCEDURAL_COUNT
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        label, everything = _from_folder(folder, tasks or among)
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        label, everything = source, _from_hub(source, tasks or among)
    else:
        raise BBHError(f"no folder '{source}' with BIG-Bench Hard in it; `kallm fetch bbh` gets it")
    majority = {
        task: collections.Counter(q.target for q in questions).most_common(1)[0][0]
        for task, questions in everything.items()
    }
    asked = tuple(question for questions in everything.values() for question in questions[:limit])
    return QuestionSet(label, asked, majority, folder)


def _generated(tasks: Sequence[str], limit: int | None, seed: int) -> dict[str, list[Question]]:
    count = max(limit or 0, 250)  # as many as a task of BIG-Bench Hard has, so that its majority answer is known
    return {task: procedural_questions(task, count, seed) for task in tasks}


def _from_folder(folder: Path, tasks: Sequence[str]) -> tuple[str, dict[str, list[Question]]]:
    """What the folder is, by its files' sha256: BIG-Bench Hard, or questions of somebody's own; and its questions."""
    found = {}
    published = True
    for task in tasks:
        path = folder / "bbh" / f"{task}.json"
        if not path.is_file():
            raise BBHError(f"{folder} has no bbh/{task}.json; it should be a checkout of suzgunmirac/BIG-Bench-Hard")
        try:
            examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
        except (ValueError, KeyError, TypeError) as error:
            raise BBHError(f"{path} does not read as BIG-Bench Hard: {error!r}") from error
        if not isinstance(examples, list) or not examples:
            raise BBHError(f"{path} holds no list of questions")
        found[task] = [_question(task, index, example, str(path)) for index, example in enumerate(examples)]
        published = published and sha256(path).startswith(PUBLISHED_SHA256[task])
    return "BIG-Bench Hard" if published else f"{folder.name}, not as published", found


def _from_hub(name: str, tasks: Sequence[str]) -> dict[str, list[Question]]:
    import datasets

    datasets.disable_progress_bars()
    if not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
    found = {}
    for task in tasks:
        try:
            rows = datasets.load_dataset(name, task, split="test")
        except (OSError, ValueError) as error:
            reason = OFFLINE if name == HUB_ID else f"hub data '{name}' cannot be had: {str(error).splitlines()[0]}"
            raise BBHError(reason) from error
        found[task] = [_question(task, index, row, name) for index, row in enumerate(rows)]
    return found


def _question(task: str, index: int, example: Any, where: str) -> Question:
    if not isinstance(example, dict) or not all(isinstance(example.get(key), str) for key in ("input", "target")):
        raise BBHError(f"{where}: question {index} needs an 'input' and a 'target', both text")
    return Question(task, index, example["input"], example["target"])
