"""Intervals: how far a figure could have come out otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's t-interval of the mean over seeds; None for fewer than two values, which say nothing of spread."""
    if len(values) < 2:
        return None
    half = stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1)
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)


def accuracy_interval(
    correct: Mapping[str, np.ndarray], level: float = 0.95, replicates: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap interval of the plain mean over tasks, questions drawn anew within each task.

    A question answered by several seeds is one draw, with the mean over its seeds: seeds are no new questions.

    Args:
        correct: task -> (seeds, questions) of 0 and 1, or of shares.
        replicates: how many draws; `seed` makes them the same each time.

    Source:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(replicates)
    for task in sorted(correct):
        shares = np.atleast_2d(np.asarray(correct[task], dtype=float)).mean(axis=0)  # (questions,)
        drawn = generator.multinomial(len(shares), np.full(len(shares), 1 / len(shares)), size=replicates)
        total += drawn @ shares / len(shares)
    low, high = np.quantile(total / len(correct), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
