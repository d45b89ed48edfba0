"""The rows of a suite's table: an arm's figures with their intervals, its tasks, its curves; and what guessing gets."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from kallm_bench.records import Metric, RunRecord
from kallm_bench.records.comparison import holm
from kallm_bench.records.statistics import mean_interval
from kallm_bench.reporting.answers import LIKELIEST, LIKELIHOOD, RIGHT, AnswerBook
from kallm_bench.reporting.arms import Arm, what_it_is
from kallm_bench.reporting.chance import GUESSING, judged, mark_of
from kallm_bench.reporting.table import Curve, Figure, Row, TaskScore

STAGE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("profile", "parameters", "parameters"),
    ("train", "trainable_parameters", "trained parameters"),
    ("train", "heldout_loss", "held-out loss"),
    ("train", "class_loss", "class loss"),
    ("train", "class_accuracy", "accuracy of classes"),
    ("eval-bbh", "accuracy", "accuracy"),
    ("eval-bbh", "target_loglikelihood", "log-likelihood of the right answer"),
    ("eval-bbh", "likeliest_accuracy", "right answer likeliest"),
    ("profile", "prefill_tokens_per_second", "prefill tokens/s"),
    ("profile", "decode_tokens_per_second", "decode tokens/s"),
    ("train", "train_tokens_per_second", "train tokens/s"),
    ("train", "train_mfu", "MFU"),
    ("train", "peak_vram_allocated_bytes", "peak GPU memory, training"),
    ("train", "peak_vram_reserved_bytes", "GPU memory reserved, training"),
    ("train", "peak_resident_bytes", "peak memory, training"),
    ("profile", "train_tokens_per_second/profile", "train tokens/s, profile's batch"),
    ("profile", "peak_vram_allocated_bytes/profile", "peak GPU memory, profile's batch"),
    ("profile", "peak_resident_bytes/profile", "peak memory, profile's batch"),
)
"""Stage, metric and heading of each column; a column without a single value is left out.

What stands after a metric's slash tells two stages apart that measure the same."""

ACCURACIES = {"eval-bbh": "accuracy", "train": "class_accuracy"}
"""Stages that ask questions, and the metric of their answers."""

CURVES = ("train_loss", "heldout_curve")
"""Metrics whose samples are losses on the way, from the first step or from before it to the last."""

POINTS = 150
"""Of a curve with more, so many means of neighbours are shown."""


def arm_row(book: AnswerBook, arm: Arm) -> Row:
    """What is known of an arm."""
    figures = {}
    for stage, metric, _ in STAGE_COLUMNS:
        if figure := figure_of(book, arm.stages.get(stage, []), metric):
            figures[metric] = figure
    return Row(
        arm.name,
        what_it_is(arm),
        arm.seeds,
        figures,
        number=arm.number,
        asked=asked_how(arm.stages.get("eval-bbh", [])),
        tasks=_tasks(arm.stages.get("eval-bbh", [])),
        curves=tuple(_curves(arm.stages.get("train", []))),
    )


def figure_of(book: AnswerBook, records: Sequence[RunRecord], metric: str) -> Figure | None:
    """The mean over records, one a seed, with what is known of its uncertainty; None where nothing was measured."""
    found = [each for record in records if (each := measured(record, metric))]
    values = [each.value for each in found if each.value is not None]
    if not values:
        return None
    mean = statistics.fmean(values)
    if metric in (*ACCURACIES.values(), LIKELIEST):
        asked = LIKELIEST if metric == LIKELIEST else RIGHT
        interval = (judged(records[0], metric)[0] if len(records) == 1 else None) or book.interval(records, asked)
        guessing = next((value for record in records if (value := record.value(GUESSING[asked])) is not None), None)
        return Figure(mean, interval, mark_of(interval, guessing), "questions" if interval else "")
    if interval := mean_interval(values):
        if interval[0] < 0 <= min(values):
            interval = (0.0, interval[1])  # of two seeds it is wide, and these cannot be negative
        return Figure(mean, interval, over="seeds")
    if metric == LIKELIHOOD and (interval := book.interval(records, metric)):
        return Figure(mean, interval, over="questions")
    if len(found[0].samples) > 2:
        return Figure(mean, (min(found[0].samples), max(found[0].samples)), over="samples")
    return Figure(mean)


def measured(record: RunRecord, metric: str) -> Metric | None:
    """A record's metric of that name, whatever follows its slash, if it has a value."""
    name = metric.partition("/")[0]
    return next((each for each in record.metrics if each.name == name and each.value is not None), None)


def _tasks(records: Sequence[RunRecord]) -> dict[str, TaskScore]:
    """Task -> accuracy, beside guessing. What is above it is so by the exact binomial test, corrected for all tasks."""
    right: dict[str, list[Metric]] = defaultdict(list)
    guessing: dict[str, float] = {}
    for record in records:
        for metric in record.metrics:
            name, _, task = metric.name.partition("/")
            if task and name == "accuracy" and metric.value is not None:
                right[task].append(metric)
            elif task and name == "guessing_accuracy" and metric.value is not None:
                guessing[task] = metric.value
    means = {task: statistics.fmean(each.value or 0.0 for each in of) for task, of in right.items()}
    p_values = {task: _above(means[task], of[0].n, guessing[task]) for task, of in right.items() if task in guessing}
    corrected = holm(p_values)
    return {task: TaskScore(mean, guessing.get(task), corrected.get(task, 1.0) < 0.05) for task, mean in means.items()}


def _above(accuracy: float, questions: int, guessing: float) -> float:
    """How likely guessing is to be right as often; of several seeds' mean, as if it were one seed's.

    Where nothing is there to choose from, guessing is never right, and being above it is no feat: 1.
    """
    from scipy import special

    right = int(accuracy * questions + 1e-6)
    return float(special.bdtrc(right - 1, questions, guessing)) if right and guessing else 1.0


def _curves(records: Sequence[RunRecord]) -> Iterable[Curve]:
    """Losses over trained tokens, of seeds that took as many steps."""
    for name in CURVES:
        metrics = [each for record in records if (each := measured(record, name)) and len(each.samples) > 1]
        counts = {len(each.samples) for each in metrics}
        tokens = next((value for record in records if (value := record.value("trained_tokens"))), 0.0)
        if len(counts) != 1 or not tokens:
            continue
        means = np.mean([metric.samples for metric in metrics], axis=0)
        steps = next((len(each.samples) for record in records if (each := measured(record, "train_loss"))), 0)
        yield Curve(name, _thinned(_places(metrics[0], tokens, steps), means))


def _places(metric: Metric, tokens: float, steps: int) -> list[float]:
    """The trained tokens at each sample: with its own step's for a loss of training, without for a held-out one."""
    count = len(metric.samples)
    if metric.name == "train_loss":
        return [tokens * (number + 1) / count for number in range(count)]
    every = re.search(r"samples every (\d+) steps", metric.note)
    share = int(every[1]) / steps if every and steps else 1 / (count - 1)
    return [*(tokens * number * share for number in range(count - 1)), tokens]


def _thinned(tokens: list[float], losses: np.ndarray) -> list[tuple[float, float]]:
    """Means of neighbours, each at the last of its places."""
    size = -(-len(losses) // POINTS)
    starts = np.arange(0, len(losses), size)
    ends = np.append(starts[1:], len(losses))
    means = np.add.reduceat(losses, starts) / (ends - starts)
    return [(tokens[end - 1], float(mean)) for end, mean in zip(ends, means, strict=True)]


def asked_how(records: Sequence[RunRecord]) -> str:
    """Protocol, reading where it is none of its own, and questions where they are not BIG-Bench Hard's."""
    if not records:
        return ""
    settings, source = records[0].settings, records[0].data.get("source")
    parts = [settings.get("protocol"), settings.get("reading"), source if source != "BIG-Bench Hard" else None]
    return ", ".join(dict.fromkeys(str(part) for part in parts if part))


def chance_rows(arms: Sequence[Arm]) -> list[Row]:
    """What answering without reading gets, for each set of questions asked."""
    rows = []
    asked = {
        (stage, record.data.get("fingerprint"), asked_how([record]) if stage == "eval-bbh" else ""): record
        for arm in arms
        for stage in ACCURACIES
        for record in arm.stages.get(stage, [])
        if record.value("guessing_accuracy") is not None
    }
    for (stage, _, how), record in asked.items():
        among = f" ({how or record.data.get('source')})" if len(asked) > 1 else ""
        for name, metric in (("guessing", "guessing_accuracy"), ("majority answer", "majority_accuracy")):
            if (value := record.value(metric)) is not None:
                figures = {ACCURACIES[stage]: Figure(value)}
                if name == "guessing" and (likeliest := record.value(GUESSING[LIKELIEST])) is not None:
                    figures[LIKELIEST] = Figure(likeliest)
                rows.append(Row(f"{name}{among}", "no model", 0, figures, asked=how))
    return rows
