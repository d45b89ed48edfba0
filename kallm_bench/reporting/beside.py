"""One row an arm for readers, where an arm was asked in several ways: the scores of each way stand side by side.

Tables keep a row for each way of asking and never average them; see reporting/arms.py. Here such rows become one, as
all else that they tell is the same: what an arm is, what it learned, and what it costs.
"""

from __future__ import annotations

import dataclasses

from kallm_bench.reporting.rows import STAGE_COLUMNS
from kallm_bench.reporting.table import Row, Table

SCORES = tuple(metric for stage, metric, _ in STAGE_COLUMNS if stage == "eval-bbh")


def side_by_side(table: Table) -> Table:
    """The same arms, each in one row; the table itself where no two of its rows differ in scores alone."""
    ways = list(dict.fromkeys(row.asked for row in table.rows if any(metric in row.figures for metric in SCORES)))
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(_shared(row, groups), []).append(row)
    if table.kind != "arms" or len(ways) < 2 or len(groups) == len(table.rows):
        return table
    rows = tuple(_joined(name, rows) for name, rows in groups.items())
    used = {metric for row in rows for metric in row.figures}
    columns = [
        (f"{metric}/{way}", f"{heading}, {way}") if way else (metric, heading)
        for metric, heading in zip(table.metrics, table.headings, strict=True)
        for way in (ways if metric in SCORES else [""])
    ]
    columns = [column for column in columns if column[0] in used]
    return dataclasses.replace(
        table,
        rows=rows,
        metrics=tuple(metric for metric, _ in columns),
        headings=tuple(heading for _, heading in columns),
    )


def _shared(row: Row, groups: dict[str, list[Row]]) -> str:
    """What the rows that this one can join are called; its own label where it tells something else than they do."""
    if not row.seeds:  # guessing
        return row.name.removesuffix(f" ({row.asked})")
    name = row.name
    alike = all((_unasked(row), row.what) == (_unasked(other), other.what) for other in groups.get(name, []))
    apart = all(row.asked != other.asked for other in groups.get(name, []))
    return name if row.way and alike and apart else row.label


def _unasked(row: Row) -> dict[str, object]:
    return {metric: figure for metric, figure in row.figures.items() if metric not in SCORES}


def _joined(name: str, rows: list[Row]) -> Row:
    figures = {
        f"{metric}/{row.asked}" if metric in SCORES else metric: figure
        for row in rows
        for metric, figure in row.figures.items()
    }
    if len(rows) == 1 and rows[0].seeds:
        return dataclasses.replace(rows[0], figures=figures)
    return dataclasses.replace(
        rows[0], name=name, number=0, way="", seeds=max(row.seeds for row in rows), figures=figures
    )
