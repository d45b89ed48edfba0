"""Answers to questions, as evaluations left them beside their records, and what follows from them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kallm_bench.records import ResultsStore, RunRecord
from kallm_bench.records.comparison import Comparison, TaskDifference, compare
from kallm_bench.records.statistics import Interval, accuracy_interval, mean_over_questions
from kallm_bench.reporting.memory import Memory, file_key

Questions = tuple[tuple[str, int], ...]
"""(task, index) of each question, in order."""

RIGHT, LIKELIEST, LIKELIHOOD = "accuracy", "likeliest_accuracy", "target_loglikelihood"


def _likeliest(sample: Mapping[str, Any]) -> float | None:
    """None where no choices were compared besides a reply."""
    if sample.get("completion") is None or not sample.get("loglikelihoods"):
        return None
    return float(sample["target_rank"] == 1)


WORTH: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    RIGHT: lambda sample: float(sample["correct"]),
    LIKELIEST: _likeliest,
    LIKELIHOOD: lambda sample: sample.get("target_loglikelihood") if sample.get("choices") else None,
}
"""Metric -> what a sample's question is worth in it; None for nothing, as the likelihood of what is no choice."""


class AnswerBook:
    """Intervals and comparisons of records, from the answers in their store; `memory` has those of earlier reports."""

    def __init__(self, store: ResultsStore, memory: Memory) -> None:
        self._store = store
        self._memory = memory
        self._read = functools.cache(self._answers_of)
        self._of_id: dict[str, RunRecord] = {}

    def interval(self, records: Sequence[RunRecord], metric: str = RIGHT) -> Interval | None:
        """Of a metric in WORTH, over questions; None where no answers are left, or seeds were asked different ones."""

        def compute() -> list[float] | None:
            found = self._by_task(records, metric)
            if not found:
                return None
            interval = mean_over_questions(found[1])[1] if metric == LIKELIHOOD else accuracy_interval(found[1])
            return list(interval) if interval else None

        known = self._memory.get(self._key("interval" if metric == RIGHT else metric, records), compute)
        return (known[0], known[1]) if known else None

    def likelihood_difference(
        self, ours: Sequence[RunRecord], theirs: Sequence[RunRecord]
    ) -> tuple[float, Interval | None] | None:
        """Of the right answers' mean log-likelihoods on the same questions, in nats, and its interval over these.

        A question is worth the mean over seeds. None where likelihoods are missing, or are of other questions.
        """

        def compute() -> list[Any] | None:
            mine, other = self._by_task(ours, LIKELIHOOD), self._by_task(theirs, LIKELIHOOD)
            if not mine or not other or mine[0] != other[0]:
                return None
            apart = {task: mine[1][task].mean(axis=0) - other[1][task].mean(axis=0) for task in mine[1]}
            return list(mean_over_questions(apart))

        known = self._memory.get(self._key("likelihood difference", ours, theirs), compute)
        return (known[0], known[1] and (known[1][0], known[1][1])) if known else None

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

    def _by_task(
        self, records: Sequence[RunRecord], metric: str = RIGHT
    ) -> tuple[Questions, dict[str, np.ndarray]] | None:
        """The questions worth something, and task -> (seeds, questions) of that; of seeds that have answers."""
        self._of_id.update({record.id: record for record in records})
        answers = [each for record in records if (each := self._read(record.id).get(metric))]
        if not answers or any(each.keys() != answers[0].keys() for each in answers):
            return None
        questions = tuple(sorted(answers[0]))
        tasks: dict[str, np.ndarray] = {}
        for task, group in itertools.groupby(questions, key=lambda question: question[0]):
            asked = list(group)
            tasks[task] = np.array([[each[question] for question in asked] for each in answers])
        return questions, tasks

    def _answers_of(self, record_id: str) -> dict[str, dict[tuple[str, int], float]]:
        """Metric -> (task, index) -> what it is worth, where that is something; empty where answers are not there."""
        samples = self._store.samples(self._of_id[record_id])
        if not samples or any(not {"task", "index", "correct"} <= set(sample) for sample in samples):
            return {}
        return {
            metric: {(each["task"], each["index"]): value for each in samples if (value := worth(each)) is not None}
            for metric, worth in WORTH.items()
        }


def _comparison(known: dict[str, Any]) -> Comparison:
    tasks = {name: TaskDifference(**each) for name, each in known["tasks"].items()}
    low, high = known["interval"]
    return Comparison(**known | {"interval": (low, high), "mcnemar": tuple(known["mcnemar"]), "tasks": tasks})
