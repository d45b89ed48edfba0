"""What stages measured, as a reader of the terminal wants it: record by record."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table as RichTable
from rich.text import Text

from kallm_bench.console import streams
from kallm_bench.console.grids import show_grid, show_rows

if TYPE_CHECKING:
    from kallm_bench.records import Metric, RunRecord


def show_records(records: Sequence[RunRecord], as_json: bool, written: Collection[str]) -> None:
    """The figures of what was done, or found done where its id is not among those `written`; as JSON whole records."""
    if as_json:
        streams.show_json([json.loads(record.to_json()) for record in records])
        return
    for record in records:
        _show_figures(record)
        _show_parts(record)
        _show_marks(record)
        if record.artifacts:
            streams.out.print(f"Checkpoint: {record.artifacts[0].path.rpartition('/')[0]}")
        streams.out.print(f"Record: {record.id}")
        if record.id not in written or record.reused:
            streams.out.print("Found, not done again: nothing that decides it has changed.")


def _show_figures(record: RunRecord) -> None:
    """The figures of the whole: one a line, with what a reader should know beside it; below, what there is none of."""
    at = ", {batch} x {length}".format_map(record.settings) if {"batch", "length"} <= set(record.settings) else ""
    table = RichTable(
        title=f"{record.stage}: {record.arm}{at}", title_justify="left", title_style="bold", show_header=False
    )
    missing: dict[str, list[str]] = {}
    for metric in record.metrics:
        if "/" in metric.name or metric.name in ENDS:
            continue
        if metric.value is None:
            missing.setdefault(metric.note or "no reason is known", []).append(metric.name)
        else:
            table.add_row(metric.name, Text(_written(record, metric), justify="right"), metric.note)
    streams.out.print(table)
    for reason, names in missing.items():
        streams.out.print(f"· not measured: {', '.join(names)}: {reason}", style="dim")


ENDS = ("accuracy_low", "accuracy_high", "likeliest_accuracy_low", "likeliest_accuracy_high")
"""Figures that are shown as the interval of another."""


def _show_marks(record: RunRecord) -> None:
    """What the marks beside its figures mean."""
    from kallm_bench.reporting import EXPLAINED, judged

    marks = {judged(record, metric.name)[1] for metric in record.metrics}
    for mark, text in EXPLAINED.items():
        if mark in marks:
            streams.out.print(text, style="dim")


def _show_parts(record: RunRecord) -> None:
    """The figures of parts, "accuracy/snarks": a line a part, a column a metric; of a profile in several tables."""
    parts: dict[str, dict[str, Metric]] = {}
    for metric in record.metrics:
        name, slash, part = metric.name.partition("/")
        if slash and name not in ENDS:
            parts.setdefault(part, {})[name] = metric
    if record.stage == "profile":
        _show_costs(record, parts)
    elif parts:
        names = list(dict.fromkeys(name for figures in parts.values() for name in figures))
        headings = ["", *(name.removesuffix("_accuracy").replace("_", " ") for name in names)]
        shown = {
            part: [_written(record, figures[name]) if name in figures else "" for name in names]
            for part, figures in parts.items()
        }
        show_rows(headings, [[part, *cells] for part, cells in shown.items()])


def _show_costs(record: RunRecord, parts: Mapping[str, Mapping[str, Metric]]) -> None:
    """A table for parts with the same metrics: scopes, phases, points of a grid, modules, ratios.

    Beside a number stands the spread of its samples where it is wide, and below the table what else there is to know.
    What could not be measured of any of them is left out.
    """
    from kallm_bench.reporting.notes import together

    tables: dict[tuple[str, ...], list[str]] = {}
    for part, figures in parts.items():
        tables.setdefault(tuple(figures), []).append(part)
    for names, alike in tables.items():
        measured = [name for name in names if any(parts[part][name].value is not None for part in alike)]
        if not measured:
            continue
        headings = ["", *(name.replace("_", " ") for name in measured)]
        rows = [[part, *(_beside(record, parts[part][name]) for name in measured)] for part in alike]
        show_grid("", [headings, *rows])
        for part in alike:
            told = (word for name in measured for word in parts[part][name].note.split("; "))
            if other := together(word for word in told if word and not word.startswith("spread ")):
                streams.out.print(f"· {part}: {'; '.join(dict.fromkeys(other.values()))}", style="dim")


def _beside(record: RunRecord, metric: Metric) -> str:
    """A figure and, where that was told of it, the spread of its samples."""
    spread, _, _ = metric.note.partition("; ")
    return _written(record, metric) + (f" ({spread})" if spread.startswith("spread ") else "")


def _written(record: RunRecord, metric: Metric) -> str:
    from kallm_bench.reporting import Figure, judged, written

    if metric.value is None:
        return "not measured"
    return written(metric.name, Figure(metric.value, *judged(record, metric.name)), headed=False)
