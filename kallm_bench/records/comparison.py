"""Two arms on the same questions: how far apart they are, how sure that is, and in which word to say it.

Arms that answer the same questions are right and wrong together on most of them, so that their difference is known far
better than either accuracy. What is resampled is therefore the question, with the answers of all seeds of both arms on
it: a seed brings another answer and no new question. Beside the interval stand McNemar's exact test, which asks nothing
of the sample's size, and the smallest difference that so many questions could have shown.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from kallm_bench.records.bootstrap import resampled
from kallm_bench.records.statistics import Interval

Answers = Mapping[str, np.ndarray]
"""Task -> (seeds, questions) of 0 and 1. Of two arms compared, the same questions stand at the same places."""

MARGIN = 0.01
"""Differences below this, one point of accuracy, are too small to matter."""

POWER = 0.8
"""How often a difference as large as the smallest detectable one is found."""

BETTER, WORSE, ALIKE, UNCLEAR = "better", "worse", "equivalent within ±1 point", "not distinguishable"


@dataclass(frozen=True)
class TaskDifference:
    """One task: the difference, and its p-value corrected by Holm for all tasks that were looked at."""

    difference: float
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """How much more often one arm is right than another, by the plain mean over tasks.

    Args:
        difference, interval: in fractions; 95 %, over questions.
        detectable: the smallest true difference that these questions would show four times in five.
        equivalent: whether the 90 % interval lies within ±MARGIN, which is two one-sided tests at 5 %.
        mcnemar: the exact p-value of each pair of seeds, over all questions.
        tasks: by name, each with an exact p-value over its questions.
    """

    difference: float
    interval: Interval
    detectable: float
    equivalent: bool
    mcnemar: tuple[float, ...]
    tasks: dict[str, TaskDifference]

    @property
    def verdict(self) -> str:
        """One of BETTER, WORSE, ALIKE, UNCLEAR. A difference that is there is named, however small it is."""
        low, high = self.interval
        if low > 0 or high < 0:
            return BETTER if low > 0 else WORSE
        return ALIKE if self.equivalent else UNCLEAR


def compare(ours: Answers, theirs: Answers) -> Comparison:
    """Sets one arm beside another on the same questions.

    Args:
        ours, theirs: with the same tasks and as many questions in each; the numbers of seeds may differ.

    Source:
        Schuirmann 1987 for two one-sided tests; Miller 2024, arXiv:2411.00640, for paired and clustered evaluations.
    """
    tasks = sorted(ours)
    assert tasks == sorted(theirs), "the arms were asked different tasks"
    ends = np.cumsum([ours[task].shape[1] for task in tasks])[:-1]
    mine, others = (np.concatenate([each[task] for task in tasks], axis=1) for each in (ours, theirs))
    apart = np.split(mine.mean(axis=0) - others.mean(axis=0), ends)
    means = [float(each.sum()) / len(each) for each in apart]
    spread = resampled(apart, (0.025, 0.05, 0.95, 0.975), (-1.0, 1.0), 1.0 / len(tasks))
    low, least, most, high = spread.quantiles
    flips = np.split(_whole(mine, others), ends)
    p_values = holm({task: _sign_flip(each) for task, each in zip(tasks, flips, strict=True)})
    return Comparison(
        difference=math.fsum(means) / len(means),
        interval=(max(low, -1.0), min(high, 1.0)),
        detectable=float((special.ndtri(0.975) + special.ndtri(POWER)) * spread.deviation),
        equivalent=least > -MARGIN and most < MARGIN,
        mcnemar=tuple(mcnemar(mine[our], others[their]) for our, their in _pairs(len(mine), len(others))),
        tasks={task: TaskDifference(mean, p_values[task]) for task, mean in zip(tasks, means, strict=True)},
    )


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The exact two-sided p-value of McNemar's test: of the questions that one of two alone got right, whose are more?

    Args:
        ours, theirs: (questions,) of 0 and 1.

    Source:
        McNemar 1947, Psychometrika 12; exact by the binomial distribution.
    """
    gained, lost = int(np.sum(ours > theirs)), int(np.sum(ours < theirs))
    return _binomial_test(gained, gained + lost) if gained + lost else 1.0


@functools.cache
def _binomial_test(successes: int, trials: int) -> float:
    """Two-sided, of one half."""
    return min(1.0, 2 * float(special.bdtr(min(successes, trials - successes), trials, 0.5)))


@functools.cache
def _halves(trials: int) -> np.ndarray:
    """The chance of each number of successes, 0 to `trials`, at one half each."""
    successes = np.arange(trials + 1)
    ways = special.gammaln(trials + 1) - special.gammaln(successes + 1) - special.gammaln(trials - successes + 1)
    chances: np.ndarray = np.exp(ways - trials * math.log(2))
    chances.setflags(write=False)
    return chances


def sign_flip(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The exact two-sided p-value of a question's difference being as likely one way as the other.

    With one seed this is McNemar's test; with several, a question's difference has a size as well as a sign, and the
    sum over questions takes each pattern of signs with the same probability.

    Args:
        ours, theirs: (seeds, questions) of 0 and 1; the numbers of seeds may differ.

    Source:
        Fisher 1935, "The Design of Experiments", §21.
    """
    return _sign_flip(_whole(ours, theirs))


def _whole(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """(questions,): how far apart the arms are on each, in whole numbers."""
    whole: np.ndarray = ours.sum(axis=0, dtype=int) * len(theirs) - theirs.sum(axis=0, dtype=int) * len(ours)
    return whole


def _sign_flip(whole: np.ndarray) -> float:
    counts = np.bincount(np.abs(whole))
    return _flip_test(int(whole[whole > 0].sum()), tuple((int(n), int(counts[n])) for n in np.flatnonzero(counts) if n))


@functools.lru_cache(maxsize=100_000)
def _flip_test(positive: int, sizes: tuple[tuple[int, int], ...]) -> float:
    """Two-sided, of a sum of positive sizes; of (size, how many have it)."""
    chances = np.ones(1)  # of the sum of the sizes whose sign is positive
    for size, count in sizes:
        spaced = np.zeros(size * count + 1)
        spaced[::size] = _halves(count)
        chances = np.convolve(chances, spaced)
    extreme = max(positive, len(chances) - 1 - positive)
    return min(1.0, 2 * float(chances[extreme:].sum()))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Corrects p-values for their number: any of them is at most 5 % by chance in at most 5 % of families.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6.
    """
    ordered = sorted(p_values, key=lambda name: p_values[name])
    scaled = [min(1.0, p_values[name] * (len(ordered) - rank)) for rank, name in enumerate(ordered)]
    return dict(zip(ordered, itertools.accumulate(scaled, max), strict=True))


def _pairs(ours: int, theirs: int) -> Sequence[tuple[int, int]]:
    """Which seed is set beside which: the first beside the first, or each beside the only one there is."""
    many = max(ours, theirs) if 1 in (ours, theirs) else min(ours, theirs)
    return [(min(n, ours - 1), min(n, theirs - 1)) for n in range(many)]
