"""Answers to questions, as evaluations left them beside their records, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from kallm_bench.records import ResultsStore, RunRecord
from kallm_bench.records.comparison import Comparison, TaskDifference, compare
from kallm_bench.records.statistics import Interval, accuracy_interval
from kallm_bench.reporting.memory import Memory, file_key

Questions = tuple[tuple[str, int], ...]
"""(task, index) of each question, in order."""


class AnswerBook:
    """Intervals and comparisons of records, from the answers in their store; `memory` has those of earlier reports."""

    def __init__(self, store: ResultsStore, memory: Memory) -> None:
        self._store = store
        self._memory = memory
        self._read = functools.cache(self._answers_of)
        self._of_id: dict[str, RunRecord] = {}

    def interval(self, records: Sequence[RunRecord]) -> Interval | None:
        """Of the accuracy, over questions; None where no answers are left, or not all seeds were asked the same."""

        def compute() -> list[float] | None:
            found = self._by_task(records)
            return list(accuracy_interval(found[1])) if found else None

        known = self._memory.get(self._key("interval", records), compute)
        return (known[0], known[1]) if known else None

    def comparison(self, ours: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> Comparison | None:
        """Of two arms that were asked the same questions; None where they were not, or answers are gone."""

        def compute() -> dict[str, Any] | None:
            mine, other = self._by_task(ours), self._by_task(theirs)
            if not mine or not other or mine[0] != other[0]:
                return None
            return dataclasses.asdict(compare(mine[1], other[1]))

        known = self._memory.get(self._key("comparison", ours, theirs), compute)
        return _comparison(known) if known else None

    def _key(self, what: str, *arms: Sequence[RunRecord]) -> str:
        files = [[file_key(self._store.samples_path(record)) for record in arm] for arm in arms]
        return json.dumps([what, *files])

    def _by_task(self, records: Sequence[RunRecord]) -> tuple[Questions, dict[str, np.ndarray]] | None:
        """The questions, and task -> (seeds, questions) of 0 and 1; of the seeds whose answers are left."""
        self._of_id.update({record.id: record for record in records})
        answers = [each for record in records if (each := self._read(record.id))]
        if not answers or any(set(each) != set(answers[0]) for each in answers):
            return None
        questions = tuple(sorted(answers[0]))
        tasks: dict[str, np.ndarray] = {}
        for task in dict.fromkeys(task for task, _ in questions):
            tasks[task] = np.array([[each[q] for q in questions if q[0] == task] for each in answers])
        return questions, tasks

    def _answers_of(self, record_id: str) -> dict[tuple[str, int], float] | None:
        """(task, index) -> whether it was answered right; None where that is not written there."""
        samples = self._store.samples(self._of_id[record_id])
        if not samples or any(not {"task", "index", "correct"} <= set(sample) for sample in samples):
            return None
        return {(sample["task"], sample["index"]): float(sample["correct"]) for sample in samples}


def _comparison(known: dict[str, Any]) -> Comparison:
    tasks = {name: TaskDifference(**each) for name, each in known["tasks"].items()}
    low, high = known["interval"]
    return Comparison(**known | {"interval": (low, high), "mcnemar": tuple(known["mcnemar"]), "tasks": tasks})
