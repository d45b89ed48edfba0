"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kallm_bench.console import streams
from kallm_bench.console.grids import show_grid, show_groups

if TYPE_CHECKING:
    from kallm_bench.reporting import Table


def show_tables(tables: Sequence[Table]) -> None:
    """Report tables, with their notes below: a row an arm where that fits, else a column an arm."""
    from kallm_bench.reporting import grid

    for table in tables:
        cells = grid(table)
        if table.kind == "kernels":
            show_groups(table.title, cells)
        else:
            show_grid(table.title, cells)
        for note in table.notes:
            streams.out.print(f"· {note}", style="dim")
