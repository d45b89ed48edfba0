"""Losses over trained tokens, and after how many of them one arm is where another ended."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from kallm_bench.records import Metric, RunRecord
from kallm_bench.records.statistics import mean_interval
from kallm_bench.reporting.table import Curve, Figure

CURVES = ("train_loss", "heldout_curve")
"""Metrics whose samples are losses on the way, from the first step or from before it to the last."""

POINTS = 150
"""Of a curve with more, so many means of neighbours are shown."""


def measured(record: RunRecord, metric: str) -> Metric | None:
    """A record's metric of that name, whatever follows its slash, if it has a value."""
    name = metric.partition("/")[0]
    return next((each for each in record.metrics if each.name == name and each.value is not None), None)


def curves_of(records: Sequence[RunRecord]) -> Iterable[Curve]:
    """Losses over trained tokens, of seeds that took as many steps."""
    for name in CURVES:
        metrics = [each for record in records if (each := measured(record, name)) and len(each.samples) > 1]
        places = next((found for record in records if (found := _places(record, name))), [])
        if len({len(each.samples) for each in metrics}) != 1 or not places:
            continue
        yield Curve(name, _thinned(places, np.mean([metric.samples for metric in metrics], axis=0)))


def has_curve(records: Sequence[RunRecord]) -> bool:
    """Whether held-out losses were taken on the way."""
    return any(measured(record, "heldout_curve") for record in records)


def tokens_to_loss(mine: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> Figure | None:
    """After what share of their tokens the first arm's held-out loss is as low as the other's in the end.

    The mean over the seeds that both have, each by a straight line between two held-out losses; None where a seed has
    no such losses on its way, or does not get there.
    """
    ends = {record.seed: record for record in theirs}
    shares = [_tokens_to(record, ends[record.seed]) for record in mine if record.seed in ends]
    found = [share for share in shares if share is not None]
    if not found or len(found) < len(shares):
        return None
    if interval := mean_interval(found):
        return Figure(statistics.fmean(found), (max(0.0, interval[0]), interval[1]), over="seeds")
    return Figure(statistics.fmean(found))


def _tokens_to(record: RunRecord, other: RunRecord) -> float | None:
    goal, budget = other.value("heldout_loss"), other.value("trained_tokens")
    curve = measured(record, "heldout_curve")
    if goal is None or not budget or curve is None:
        return None
    points = list(zip(_places(record, "heldout_curve"), curve.samples, strict=True))
    if points and points[0][1] <= goal:
        return 0.0
    for (before, above), (after, below) in itertools.pairwise(points):
        if below <= goal:
            return (before + (after - before) * (above - goal) / (above - below)) / budget
    return None


def _places(record: RunRecord, name: str) -> list[float]:
    """The trained tokens at each sample: with its own step's for a loss of training, without for a held-out one."""
    metric, tokens = measured(record, name), record.value("trained_tokens")
    if metric is None or not tokens:
        return []
    count = len(metric.samples)
    if name == "train_loss":
        return [tokens * (number + 1) / count for number in range(count)]
    losses = measured(record, "train_loss")
    every = re.search(r"samples every (\d+) steps", metric.note)
    share = int(every[1]) / len(losses.samples) if every and losses else 1 / max(1, count - 1)
    return [*(tokens * number * share for number in range(count - 1)), tokens]


def _thinned(tokens: list[float], losses: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Means of neighbours, each at the last of its places."""
    size = -(-len(losses) // POINTS)
    starts = np.arange(0, len(losses), size)
    ends = np.append(starts[1:], len(losses))
    means = np.add.reduceat(losses, starts) / (ends - starts)
    return tuple((tokens[end - 1], float(mean)) for end, mean in zip(ends, means, strict=True))
