"""The rows of a suite's table: an arm's figures with their intervals, its tasks, its curves; and what guessing gets."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from kallm_bench.records import Metric, RunRecord
from kallm_bench.records.comparison import holm
from kallm_bench.records.statistics import mean_interval, median_interval
from kallm_bench.reporting.answers import LIKELIEST, LIKELIHOOD, RIGHT, AnswerBook
from kallm_bench.reporting.arms import SHARED, SPEED, Arm, alone, asked_how, what_it_is
from kallm_bench.reporting.chance import GUESSING, judged, mark_of
from kallm_bench.reporting.curves import curves_of, measured
from kallm_bench.reporting.table import Figure, Row, TaskScore

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

SPEEDS = (SPEED, "train_mfu")

ACCURACIES = {"eval-bbh": "accuracy", "train": "class_accuracy"}
"""Stages that ask questions, and the metric of their answers."""


def arm_row(book: AnswerBook, arm: Arm) -> Row:
    """What is known of an arm."""
    figures = {}
    for stage, metric, _ in STAGE_COLUMNS:
        records = arm.telling(stage, metric) or (arm.stages.get("retrofit", []) if metric == "parameters" else [])
        if figure := figure_of(book, records, metric):
            shared = (stage, metric in SPEEDS) == ("train", True) and not all(map(alone, records))
            figures[metric] = Figure(figure.value, mark=SHARED) if shared else figure
    if "parameters" not in figures and (count := _count(arm)):
        figures["parameters"] = Figure(count)
    return Row(
        arm.name,
        what_it_is(arm),
        arm.seeds,
        figures,
        number=arm.number,
        way=arm.way,
        asked=asked_how(arm.stages.get("eval-bbh", [])),
        tasks=_tasks(arm.stages.get("eval-bbh", [])),
        curves=tuple(curves_of(arm.stages.get("train", []))),
        sweep=arm.sweep,
    )


def _count(arm: Arm) -> float | None:
    """The parameters of the model that was trained, where neither a profile nor a retrofit told them."""
    return next((count for record in arm.stages.get("train", []) if (count := record.model.get("parameters"))), None)


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
        return Figure(mean, median_interval(found[0].samples), over="samples")
    return Figure(mean)


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
