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
    """Interval of the plain mean over tasks: the Bayesian bootstrap over the questions of each task.

    Half an observation of a right answer and half of a wrong one join each task, so that one with nothing right is not
    taken for one where nothing can ever be right, as resampling alone would have it. They widen the interval and do not
    move it. A question answered by several seeds is one observation, the mean over its seeds: seeds are no new
    questions.

    Args:
        correct: task -> (seeds, questions) of 0 and 1, or of shares.
        replicates: how many draws; `seed` makes them the same each time.

    Source:
        Rubin 1981, "The Bayesian Bootstrap", Annals of Statistics 9.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(replicates)
    for task in sorted(correct):
        shares = np.atleast_2d(np.asarray(correct[task], dtype=float)).mean(axis=0)  # (questions,)
        values, counts = np.unique(np.concatenate([shares, [0.0, 1.0]]), return_counts=True)
        counts = counts - 0.5 * ((values == 0) | (values == 1))
        noise = generator.dirichlet(counts, size=replicates) @ values - counts @ values / counts.sum()
        n = len(shares)
        total += shares.mean() + noise * np.sqrt((n + 2) / max(n - 1, 1))  # the variance of a mean, without its bias
    low, high = np.quantile(np.clip(total / len(correct), 0, 1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
