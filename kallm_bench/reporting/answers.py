"""Answers to questions, as evaluations left them beside their records, and what follows from them."""

from __future__ import annotations

import functools
import json
from collections import Counter
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
        self._joined = functools.cache(self._answers_together)
        self._file_key = functools.cache(lambda record_id: file_key(store.samples_path(self._of_id[record_id])))
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
            found = compare(mine[1], other[1])
            return vars(found) | {"tasks": {name: vars(each) for name, each in found.tasks.items()}}

        known = self._memory.get(self._key("comparison", ours, theirs), compute)
        return _comparison(known) if known else None

    def _key(self, what: str, *arms: Sequence[RunRecord]) -> str:
        return json.dumps([what, *([self._file_key(each) for each in self._ids(arm)] for arm in arms)])

    def _ids(self, records: Sequence[RunRecord]) -> tuple[str, ...]:
        """By these they are known here."""
        self._of_id.update({record.id: record for record in records})
        return tuple(record.id for record in records)

    def _by_task(
        self, records: Sequence[RunRecord], metric: str = RIGHT
    ) -> tuple[Questions, dict[str, np.ndarray]] | None:
        """The questions worth something, and task -> (seeds, questions) of that; of seeds that have answers."""
        return self._joined(self._ids(records), metric)

    def _answers_together(self, ids: Sequence[str], metric: str) -> tuple[Questions, dict[str, np.ndarray]] | None:
        answers = [found for record_id in ids if (found := self._read(record_id).get(metric))]
        if not answers or any(questions != answers[0][0] for questions, _ in answers):
            return None
        questions = answers[0][0]
        of_task = Counter(task for task, _ in questions)  # in order, as the questions are
        worth = np.stack([values for _, values in answers])  # (seeds, questions)
        ends = np.cumsum(list(of_task.values()))[:-1]
        return questions, dict(zip(of_task, np.split(worth, ends, axis=1), strict=True))

    def _answers_of(self, record_id: str) -> dict[str, tuple[Questions, np.ndarray]]:
        """Metric -> the questions that are worth something in it, and what; empty where answers are not there."""
        record = self._of_id[record_id]
        samples = self._store.samples(record)
        told = {metric: of for metric, of in WORTH.items() if metric == RIGHT or record.value(metric) is not None}
        try:
            samples.sort(key=lambda sample: (sample["task"], sample["index"]))
            questions = [(sample["task"], sample["index"]) for sample in samples]
            worth = {metric: [of(sample) for sample in samples] for metric, of in told.items()}
        except (KeyError, TypeError):
            return {}
        found = {}
        for metric, values in worth.items():
            there = [each for each in zip(questions, values, strict=True) if each[1] is not None]
            if there:
                asked, known = zip(*there, strict=True)
                found[metric] = asked, np.array(known)
        return found


def _comparison(known: dict[str, Any]) -> Comparison:
    tasks = {name: TaskDifference(**each) for name, each in known["tasks"].items()}
    low, high = known["interval"]
    return Comparison(**known | {"interval": (low, high), "mcnemar": tuple(known["mcnemar"]), "tasks": tasks})
