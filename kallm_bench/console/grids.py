"""Tables for a terminal of any width: whole where they fit, else turned, or in parts; never a broken figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table as RichTable
from rich.text import Text

from kallm_bench.console import streams

LONG = ("what", "why it failed")
"""Headings of columns of whole sentences."""


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """A small two-column table."""
    table = RichTable(title=title, title_justify="left", show_header=False)
    for name, value in pairs:
        table.add_row(name, value)
    streams.out.print(table)


def show_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table."""
    table = RichTable()
    for number, heading in enumerate(headings):
        figures = number > 0 and all(_is_figure(row[number]) for row in rows)
        widest = max((len(row[number]) for row in rows), default=0) if figures else None  # a figure is never broken
        table.add_column(heading, justify="right" if figures else "left", overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*row)
    streams.out.print(table)


def _is_figure(text: str) -> bool:
    return not text or text.removeprefix("-")[:1].isdigit()


def show_grid(title: str, cells: Sequence[Sequence[str]]) -> None:
    """A table where it fits; else without its longest words, which then stand above it, or turned, or in parts."""
    if _fits(shown := _grid(title, cells)):
        streams.out.print(shown)
        return
    if long := next((place for place, heading in enumerate(cells[0]) if heading in LONG), 0):
        streams.out.print(Text(title, style="bold"))
        for row in cells[1:]:
            streams.out.print(Text(f"{', '.join(filter(None, row[:long]))}: {row[long]}"), soft_wrap=True)
        title, cells = "", [[*row[:long], *row[long + 1 :]] for row in cells]
        if long == len(cells[0]):
            return  # all has been said
    turned = [list(column) for column in zip(*cells, strict=True)]
    whole = next((each for each in (cells, turned) if _fits(_grid(title, each))), None)
    for part in [whole] if whole else _parts(cells):
        streams.out.print(_grid(title, part))
        title = ""


def _fits(table: RichTable) -> bool:
    out = streams.out
    return table.__rich_measure__(out, out.options.update(max_width=10_000)).maximum <= out.width


def _parts(cells: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """A table in as many as it takes to fit, each with the first column and at least one more."""
    begin, columns = 1, len(cells[0])
    while begin < columns:
        end = begin + 1
        while end < columns and _fits(_grid("", _columns(cells, begin, end + 1))):
            end += 1
        yield _columns(cells, begin, end)
        begin = end


def _columns(cells: Sequence[Sequence[str]], begin: int, end: int) -> list[list[str]]:
    return [[row[0], *row[begin:end]] for row in cells]


def _grid(title: str, cells: Sequence[Sequence[str]]) -> RichTable:
    """A table of which the first row and the first column are headings."""
    table = RichTable(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(cells[0]):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in cells[1:]:
        table.add_row(*row)
    return table


def show_groups(title: str, cells: Sequence[Sequence[str]]) -> None:
    """A table of many rows: the first column, where it says something, is the heading of those that follow."""
    (_, *headings), *rows = cells
    longest = [
        max(len(text) for text in (*heading.split(), *(row[number] for row in rows)))
        for number, heading in enumerate(headings, start=1)
    ]

    def part(group: Sequence[Sequence[str]]) -> RichTable:
        table = RichTable(box=None, show_header=not group)
        for number, (heading, width) in enumerate(zip(headings, longest, strict=True)):
            table.add_column(heading, justify="right" if number else "left", vertical="bottom", width=width)
        for row in group:
            table.add_row(*row[1:])
        return table

    streams.out.print(title, style="bold")
    streams.out.print(part([]))
    starts = [number for number, row in enumerate(rows) if row[0]]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        streams.out.print(rows[start][0], style="italic")
        streams.out.print(part(rows[start:end]))


def minutes(seconds: float) -> str:
    """As minutes:seconds; from two hours on in hours, as "12 h"."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
