"""Whether an accuracy says anything: where its interval lies beside guessing."""

from __future__ import annotations

from kallm_bench.records import RunRecord
from kallm_bench.records.statistics import Interval

AT_CHANCE = "†"
"""Marks an accuracy whose interval includes guessing."""

BELOW_CHANCE = "‡"
"""Marks an accuracy whose interval lies wholly below guessing."""

EXPLAINED = {
    AT_CHANCE: "† The interval includes guessing: this score is no evidence of skill.",
    BELOW_CHANCE: "‡ Below guessing, by more than chance: many replies hold no answer, or none asked for.",
}

GUESSING = {"accuracy": "guessing_accuracy", "likeliest_accuracy": "likeliest_guessing"}
"""Metrics that are judged, and what guessing gets in all of them; of one task that is its guessing_accuracy."""


def mark_of(interval: Interval | None, guessing: float | None) -> str:
    """The mark of an accuracy with this interval; empty where it lies above guessing, or one of them is not known."""
    if interval is None or guessing is None or interval[0] > guessing:
        return ""
    return AT_CHANCE if guessing <= interval[1] else BELOW_CHANCE


def judged(record: RunRecord, metric: str) -> tuple[Interval | None, str]:
    """The interval and the mark of an evaluation's "accuracy", or "accuracy/snarks"; None and empty of all else.

    As of right answers, so of right ones being likeliest.
    """
    name, slash, part = metric.partition("/")
    low, high = (record.value(f"{name}_{end}{slash}{part}") for end in ("low", "high"))
    if name not in GUESSING or low is None or high is None:
        return None, ""
    guessing = f"guessing_accuracy/{part}" if part else GUESSING[name]
    return (low, high), mark_of((low, high), record.value(guessing))
