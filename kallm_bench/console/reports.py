"""The tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kallm_bench.console import streams
from kallm_bench.console.grids import show_grid, show_groups

if TYPE_CHECKING:
    from kallm_bench.reporting import Table


def show_published(tables: Sequence[Table]) -> None:
    """The published figures, where the tables are of models that can be set beside them."""
    from kallm_bench.reporting.published import PUBLISHED_NOTE, PUBLISHED_TITLE
    from kallm_bench.reporting.text import published_grid

    if cells := published_grid(tables):
        show_grid(PUBLISHED_TITLE, cells)
        streams.out.print(f"· {PUBLISHED_NOTE}", style="dim")


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
