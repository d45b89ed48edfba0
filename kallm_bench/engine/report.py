"""A suite's tables, written beside its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kallm_bench.files import write_file
from kallm_bench.records import Ending, ResultsStore, RunRecord
from kallm_bench.reporting import Table, build_tables, to_csv, to_markdown
from kallm_bench.suites import Suite


class Report(NamedTuple):
    """A suite's tables, and the folder that holds them as report.md and report.csv."""

    tables: list[Table]
    folder: Path


def write_report(store: ResultsStore, suite: Suite, testbed: str, records: Sequence[RunRecord]) -> Report:
    """Writes a suite's tables beside its records.

    Args:
        records: what the cells that were just run stand for; the others' come from the store, by the suite's arms.
    """
    ran = {(record.arm, record.seed) for record in records}
    ids = {record.id for record in records}

    def stands(filed: RunRecord | Ending) -> bool:
        return filed.id in ids if (filed.arm, filed.seed) in ran else filed.arm in suite.arms

    tables = build_tables(store, suite.name, testbed, stands, order=lambda named: suite.arms)
    folder = store.folder / testbed / suite.name
    write_file(folder / "report.md", to_markdown(tables).encode())
    write_file(folder / "report.csv", to_csv(tables).encode())
    return Report(tables, folder)
