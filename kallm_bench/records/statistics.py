"""Intervals: how far a figure could have come out otherwise."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from kallm_bench.records.bootstrap import resampled

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's t-interval of the mean over seeds; None for fewer than two values, which say nothing of spread."""
    if len(values) < 2:
        return None
    mean, error = _mean_and_error(values)
    half = error * _students(len(values) - 1, (1 + level) / 2)
    return mean - half, mean + half


def median_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The interval of the median by order statistics, which outliers hardly widen; of five or fewer their range."""
    ordered, rank = sorted(values), 0
    while 1 - 2 * special.bdtr(rank, len(ordered), 0.5) >= level:
        rank += 1
    rank = max(0, rank - 1)
    return ordered[rank], ordered[-1 - rank]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


@functools.cache
def _students(freedom: float, level: float) -> float:
    """A quantile of Student's t."""
    return float(special.stdtrit(freedom, level))


def difference_interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """95 % interval of the difference of two means over seeds: paired where the seeds are the same, else Welch's.

    Args:
        ours, theirs: seed -> value. The same seed meets the same rows of data in the same order.

    Returns:
        None where either has fewer than two seeds.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    if set(ours) == set(theirs):
        return mean_interval([ours[seed] - theirs[seed] for seed in sorted(ours)])
    means, errors = zip(*(_mean_and_error(list(each.values())) for each in (ours, theirs)), strict=True)
    difference, error = means[0] - means[1], math.hypot(*errors)
    if not error:
        return difference, difference
    shares = [(own / error) ** 4 / (len(each) - 1) for own, each in zip(errors, (ours, theirs), strict=True)]
    half = error * _students(1 / math.fsum(shares), 0.975)
    return difference - half, difference + half


def accuracy_interval(correct: Mapping[str, np.ndarray], level: float = 0.95) -> Interval:
    """Interval of the plain mean over tasks, by the bootstrap over the questions of each task.

    Half a right and half a wrong answer join each task: see `resampled`.

    Args:
        correct: task -> (seeds, questions) of 0 and 1, or of shares.
    """
    shares = [np.atleast_2d(np.asarray(correct[task], dtype=float)).mean(axis=0) for task in sorted(correct)]
    low, high = resampled(shares, _tails(level), (0.0, 1.0), 1.0).quantiles
    return max(low, 0.0), min(high, 1.0)


def mean_over_questions(values: Mapping[str, np.ndarray], level: float = 0.95) -> tuple[float, Interval | None]:
    """The plain mean over tasks of what questions are worth, which may be anything, and its interval.

    By the same bootstrap as `accuracy_interval`, without its prior: what has no ends has nothing that could join it.

    Args:
        values: task -> (seeds, questions).

    Returns:
        The interval is None where a task has a single question, which says nothing of spread.
    """
    means = [np.atleast_2d(np.asarray(values[task], dtype=float)).mean(axis=0) for task in sorted(values)]
    mean = float(np.mean([each.mean() for each in means]))
    if min(map(len, means)) < 2:
        return mean, None
    low, high = resampled(means, _tails(level)).quantiles
    return mean, (low, high)


def _tails(level: float) -> Interval:
    """The levels of an interval's ends."""
    return (1 - level) / 2, (1 + level) / 2
