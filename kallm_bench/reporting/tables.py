"""Records become tables: one row an arm, means over seeds, intervals where they can be had, notes that say the rest.

Seeds are averaged where data, protocol, device and settings are equal. Where they are not, an arm has several rows.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kallm_bench.records import WIDE_SPREAD, ResultsStore, RunRecord
from kallm_bench.records.statistics import Interval, accuracy_interval, mean_interval
from kallm_bench.reporting.arms import Arm, variants, what_it_is
from kallm_bench.reporting.chance import mark_of
from kallm_bench.reporting.kernels import (
    KERNEL_COLUMNS,
    WIDE,
    figures_of,
    kernel_notes,
    newest_problems,
    problem_of,
)
from kallm_bench.reporting.notes import notes
from kallm_bench.reporting.training import TRAINING_COLUMNS, step_figures, step_notes

SUBTITLES = {
    "arms": "",
    "starts": ": right after the retrofit",
    "training": ": training steps",
    "kernels": ": layers alone",
}
"""What a table's kind adds to its title."""

STAGE_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("profile", "parameters", "parameters"),
    ("train", "trainable_parameters", "trained parameters"),
    ("train", "heldout_loss", "held-out loss"),
    ("train", "class_loss", "class loss"),
    ("train", "class_accuracy", "accuracy of classes"),
    ("eval-bbh", "accuracy", "accuracy"),
    ("eval-bbh", "target_loglikelihood", "log-likelihood of the right answer"),
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


@dataclass(frozen=True)
class Figure:
    """One cell of a table: the mean over seeds, its 95 % interval if there is one, and a mark that a note explains."""

    value: float
    interval: Interval | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """An arm, or a line beside the arms such as guessing. `seeds` is 0 where none apply."""

    name: str
    what: str = ""
    seeds: int = 0
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One suite on one testbed: its arms, or how they started.

    Args:
        kind: a key of SUBTITLES.
        metrics, headings: the columns, in order.
    """

    suite: str
    testbed: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    metrics: tuple[str, ...]
    headings: tuple[str, ...]
    kind: str = "arms"

    @property
    def title(self) -> str:
        return f"{self.suite} on {self.testbed}{SUBTITLES[self.kind]}"


def build_tables(
    store: ResultsStore,
    suite: str | None = None,
    testbed: str | None = None,
    stands: Callable[[RunRecord], bool] = lambda record: True,
) -> list[Table]:
    """A table for each suite and testbed in the store, or for those named; of the records that `stands` lets pass."""
    groups: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    known = {record.id: record for record in store.records()}
    for record in known.values():
        if suite in (None, record.suite) and testbed in (None, record.testbed) and stands(record):
            groups[record.testbed, record.suite].append(record)
    tables = []
    for (where, name), records in sorted(groups.items()):
        of_models = [record for record in records if record.stage != "kernels"]
        tables += [_table(store, name, where, of_models, known), _starts(name, where, of_models)]
        tables.append(_training(name, where, of_models))
        tables.append(_kernels(name, where, store.describe(where), newest_problems(records)))
    return [table for table in tables if table.rows]


def _table(
    store: ResultsStore, suite: str, testbed: str, records: Sequence[RunRecord], known: Mapping[str, RunRecord]
) -> Table:
    arms = [arm for name in dict.fromkeys(record.arm for record in records) for arm in variants(name, records, known)]
    if not arms:
        return Table(suite, testbed, (), (), (), ())
    rows = [_row(store, arm) for arm in arms]
    rows += _chance_rows(arms)
    marks = {figure.mark for row in rows for figure in row.figures.values()}
    below = notes(suite, store.describe(testbed), arms, marks)
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for _, metric, heading in STAGE_COLUMNS if metric in used]
    return Table(suite, testbed, tuple(rows), tuple(below), *_unzipped(columns))


def _starts(suite: str, testbed: str, records: Sequence[RunRecord]) -> Table:
    """What each calibrated retrofit knew before any training: the newest of each arm and seed, seeds together."""
    newest = {(r.arm, r.seed): r for r in records if r.stage == "retrofit" and r.value("start_seconds") is not None}
    arms: dict[str, list[RunRecord]] = defaultdict(list)
    for (name, _), record in sorted(newest.items(), key=lambda pair: pair[1].started):
        arms[name].append(record)
    columns = [
        ("replaced_parameters", "new parameters"),
        ("heldout_loss", "held-out loss"),
        ("start_seconds", "seconds"),
    ]
    found = {metric.name for each in arms.values() for record in each for metric in record.metrics}
    sites = sorted((name for name in found if name.startswith("start_r2/")), key=_place)
    columns[1:1] = [(name, f"R² block {name.split('/')[1]}") for name in sites]
    rows = []
    for name, of_arm in arms.items():
        figures = {}
        for metric, _ in columns:
            if values := [value for record in of_arm if (value := record.value(metric)) is not None]:
                figures[metric] = Figure(statistics.fmean(values), mean_interval(values))
        rows.append(Row(name, what_it_is(Arm(name, {"retrofit": of_arm})), len(of_arm), figures))
    before = {f"{value:.3f}" for each in arms.values() for r in each if (value := r.value("heldout_loss_before"))}
    sources = {str(record.data.get("source")) for each in arms.values() for record in each}
    below = [
        f"Before the retrofit the held-out loss was {' and '.join(sorted(before))}; nothing here was trained.",
        f"Calibrated on {', '.join(sorted(sources))}. R²: of the replaced block's output, on held-out rows.",
    ]
    return Table(suite, testbed, tuple(rows), tuple(below), *_unzipped(columns), kind="starts")


def _place(name: str) -> tuple[int, str]:
    """How "start_r2/3" and "start_r2/3.mlp.up_proj" are sorted."""
    block, _, layer = name.partition("/")[2].partition(".")
    return int(block), layer


def _training(suite: str, testbed: str, records: Sequence[RunRecord]) -> Table:
    """Training steps in several ways, where a profile did that."""
    found = step_figures(records)
    rows = [
        Row(arm, way, 0, {name: Figure(value) for name, value in figures.items()})
        for (arm, way), figures in found.items()
    ]
    used = {metric for figures in found.values() for metric in figures}
    columns = [(metric, heading) for metric, heading in TRAINING_COLUMNS if metric in used]
    below = step_notes(records) if rows else ()
    return Table(suite, testbed, tuple(rows), below, *_unzipped(columns), kind="training")


def _kernels(suite: str, testbed: str, machine: dict[str, Any], records: Sequence[RunRecord]) -> Table:
    """Layers alone, a record a problem: a row for each of its contenders."""
    rows = []
    for record in records:
        for contender, values in figures_of(record).items():
            wide = WIDE if values.get("timing_spread", 0.0) > WIDE_SPREAD else ""
            figures = {name: Figure(value, mark=wide * (name == "timing_spread")) for name, value in values.items()}
            rows.append(Row(problem_of(record, records), contender, 0, figures))
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for metric, heading in KERNEL_COLUMNS if metric in used]
    below = kernel_notes(suite, machine, records) if records else ()
    return Table(suite, testbed, tuple(rows), tuple(below), *_unzipped(columns), kind="kernels")


def _unzipped(columns: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(metric for metric, _ in columns), tuple(heading for _, heading in columns)


def _row(store: ResultsStore, arm: Arm) -> Row:
    figures = {}
    for stage, metric, _ in STAGE_COLUMNS:
        records = arm.stages.get(stage, [])
        name = metric.partition("/")[0]
        values = [value for record in records if (value := record.value(name)) is not None]
        if values:
            interval = _accuracy_interval(store, records) if metric in ACCURACIES.values() else mean_interval(values)
            if interval and interval[0] < 0 <= min(values):
                interval = (0.0, interval[1])  # of two seeds it is wide, and these cannot be negative
            figures[metric] = Figure(statistics.fmean(values), interval, _mark(metric, interval, records))
    return Row(arm.name, what_it_is(arm), arm.seeds, figures)


def _mark(metric: str, interval: Interval | None, records: Sequence[RunRecord]) -> str:
    guessing = records[0].value("guessing_accuracy") if records else None
    return mark_of(interval, guessing) if metric in ACCURACIES.values() else ""


def _accuracy_interval(store: ResultsStore, records: Sequence[RunRecord]) -> Interval | None:
    """Over questions, each counted once with its mean over seeds; None where the samples are gone or damaged."""
    answers: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for sample in store.samples(record):
            if not {"task", "index", "correct"} <= set(sample):
                return None
            answers[sample["task"]][sample["index"]].append(float(sample["correct"]))
    if not answers:
        return None
    return accuracy_interval(
        {task: np.array([[statistics.fmean(each) for each in by_index.values()]]) for task, by_index in answers.items()}
    )


def _chance_rows(arms: Sequence[Arm]) -> list[Row]:
    """What answering without reading gets, for each set of questions asked."""
    rows = []
    asked = {
        (stage, record.data.get("fingerprint")): record
        for arm in arms
        for stage in ACCURACIES
        for record in arm.stages.get(stage, [])
        if record.value("guessing_accuracy") is not None
    }
    for (stage, _), record in asked.items():
        source = f" ({record.data.get('source')})" if len(asked) > 1 else ""
        for name, metric in (("guessing", "guessing_accuracy"), ("majority answer", "majority_accuracy")):
            if (value := record.value(metric)) is not None:
                rows.append(Row(f"{name}{source}", "no model", 0, {ACCURACIES[stage]: Figure(value)}))
    return rows
