"""Scores over tasks as lm-eval and the Open LLM Leaderboard state them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def mean_and_error(scores: Mapping[str, Sequence[float]]) -> tuple[float, float | None]:
    """The mean over all questions and its standard error, as lm-eval gives them for a group weighted by size.

    sqrt(sum (n_i - 1) n_i se_i^2 / (sum n_i - k) / sum n_i) with the k tasks' own standard errors se_i: the variance
    within tasks, pooled.

    Args:
        scores: task -> one score a question.

    Returns:
        The error is None where a task has a single question, which has no standard error.
    """
    sizes = [len(values) for values in scores.values()]
    means = [sum(values) / len(values) for values in scores.values()]
    mean = sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)
    if min(sizes) < 2:
        return mean, None
    pooled = sum(
        (size - 1) * size * standard_error(values) ** 2 for size, values in zip(sizes, scores.values(), strict=True)
    ) / (sum(sizes) - len(sizes))
    return mean, math.sqrt(pooled / sum(sizes))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of two values or more, from their sample standard deviation."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def leaderboard_score(accuracies: Mapping[str, float], choices: Mapping[str, int]) -> float:
    """The Open LLM Leaderboard's normalised score, in percent: each task from guessing, 0, to 100; their mean.

    Args:
        accuracies: task -> fraction of right answers.
        choices: task -> how many choices each of its questions has; guessing is right in one of so many.
    """
    guessed = {task: 1 / choices[task] for task in accuracies}
    return sum(
        100 * max(0.0, (accuracy - guessed[task]) / (1 - guessed[task])) for task, accuracy in accuracies.items()
    ) / len(accuracies)
