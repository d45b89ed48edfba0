"""Tables as JSON, for scripts: `report.schema.json` in this folder says what stands where."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kallm_bench.records import kind_of
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE
from kallm_bench.reporting.table import Figure, Row, Table

SCHEMA = 1
"""Raised when a field goes or changes its meaning; a new field leaves it as it is."""

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def to_json(tables: Sequence[Table], set_aside: Sequence[tuple[Path, str]] = ()) -> str:
    """All rows of all tables, with their notes; values in the units of the table of metrics.

    Args:
        set_aside: files of the store that are not in the tables, and why.
    """
    data = {
        "schema": SCHEMA,
        "tables": [_table(table) for table in tables],
        "published": {"rows": [dataclasses.asdict(row) for row in PUBLISHED], "note": PUBLISHED_NOTE},
        "set_aside": [{"file": str(path), "reason": reason} for path, reason in set_aside],
    }
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"


def _table(table: Table) -> dict[str, Any]:
    return {
        "suite": table.suite,
        "testbed": table.testbed,
        "table": table.kind,
        "columns": [
            {"metric": metric, "heading": heading, "unit": kind_of(metric).unit, "better": kind_of(metric).better}
            for metric, heading in zip(table.metrics, table.headings, strict=True)
        ],
        "rows": [_row(row) for row in table.rows],
        "notes": list(table.notes),
    }


def _row(row: Row) -> dict[str, Any]:
    comparison = row.comparison and dataclasses.asdict(row.comparison) | {"verdict": row.comparison.verdict}
    return {
        "arm": row.name,
        "number": row.number,
        "asked": row.asked,
        "what": row.what,
        "seeds": row.seeds,
        "figures": {metric: _plain(_figure(metric, figure)) for metric, figure in row.figures.items()},
        "words": row.words,
        "comparison": _plain(comparison),
        "tasks": {task: _plain(vars(score)) for task, score in row.tasks.items()},
        "curves": [{"metric": curve.metric, "points": list(curve.points)} for curve in row.curves],
    }


def _plain(value: Any) -> Any:
    """Ten digits of all numbers in it: the last of a float's sixteen are another processor's choice."""
    if isinstance(value, float):
        return float(f"{value:.10g}")
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _figure(metric: str, figure: Figure) -> dict[str, Any]:
    return dataclasses.asdict(figure) | {"unit": kind_of(metric).unit}
