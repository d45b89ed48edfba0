"""Intervals: how far a figure could have come out otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's t-interval of the mean over seeds; None for fewer than two values, which say nothing of spread."""
    if len(values) < 2:
        return None
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = standard_error * float(special.stdtrit(len(values) - 1, (1 + level) / 2))
    mean = float(np.mean(values))
    return mean - half, mean + half


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
    from scipy import stats  # takes half a second to import, which a report without comparisons need not wait for

    found = stats.ttest_ind(list(ours.values()), list(theirs.values()), equal_var=False).confidence_interval()
    return float(found.low), float(found.high)


def accuracy_interval(
    correct: Mapping[str, np.ndarray], level: float = 0.95, replicates: int = 4_000, seed: int = 0
) -> Interval:
    """Interval of the plain mean over tasks, by the bootstrap over the questions of each task.

    Half a right and half a wrong answer join each task: see `resampled`.

    Args:
        correct: task -> (seeds, questions) of 0 and 1, or of shares.
        replicates: how many draws; `seed` makes them the same each time.
    """
    shares = [np.atleast_2d(np.asarray(correct[task], dtype=float)).mean(axis=0) for task in sorted(correct)]
    draws = resampled(shares, (0.0, 1.0), 1.0, replicates, np.random.default_rng(seed))
    low, high = np.quantile(np.clip(draws, 0, 1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_over_questions(
    values: Mapping[str, np.ndarray], level: float = 0.95, replicates: int = 2_000, seed: int = 0
) -> tuple[float, Interval | None]:
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
    draws = resampled(means, (), 0.0, replicates, np.random.default_rng(seed))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return mean, (float(low), float(high))


def resampled(
    tasks: Sequence[np.ndarray],
    ends: Sequence[float],
    prior: float,
    replicates: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws of the plain mean over tasks of the mean over their questions, by the Bayesian bootstrap over questions.

    `prior` observations, half of them at either end of what a question can be worth, join each task, so that one with
    nothing right is not taken for one where nothing can ever be right, as resampling alone would have it. They widen
    the draws and do not move them. A question answered by several seeds is one observation, the mean over its seeds:
    seeds are no new questions.

    Args:
        tasks: (questions,) each.
        ends: the least and the most that a question can be worth; none where there is no end, and `prior` is 0.

    Returns:
        (replicates,)

    Source:
        Rubin 1981, "The Bayesian Bootstrap", Annals of Statistics 9.
    """
    total = np.zeros(replicates)
    for shares in tasks:
        values, counts = np.unique(np.concatenate([shares, ends]), return_counts=True)
        counts = counts - (1 - prior / 2) * np.isin(values, ends)
        weight, n = counts.sum(), len(shares)
        noise = generator.dirichlet(counts, size=replicates) @ values - counts @ values / weight
        total += shares.mean() + noise * np.sqrt((weight + 1) / max(n - 1, 1))  # the variance of a mean, without bias
    return total / len(tasks)
