"""Tables as text: markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence

from kallm_bench.records import kind_of
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE
from kallm_bench.reporting.tables import STAGE_COLUMNS, Figure, Row, Table


def written(metric: str, figure: Figure) -> str:
    """A figure as a reader wants it: 125.67M, 43.8 % [40.1, 47.5], 2.391 [2.379, 2.403], 1.90 GiB, 1,234."""
    form = _FORMS.get(kind_of(metric).unit, "{:.3f}".format)
    ends = [form(end).removesuffix(" %") for end in figure.interval or ()]
    interval = f" [{', '.join(ends)}]" if len(set(ends)) == 2 else ""
    return form(figure.value) + interval + (f" {figure.mark}" if figure.mark else "")


_FORMS: dict[str, Callable[[float], str]] = {
    "fraction": lambda value: f"{100 * value:.1f} %",
    "parameters": lambda value: f"{value / 1e6:.2f}M" if value else "0",
    "bytes": lambda value: f"{value / 2**30:.2f} GiB",
    "tokens": "{:,.0f}".format,
    "tokens/s": "{:,.0f}".format,
    "FLOP/token": lambda value: f"{value / 1e6:,.1f} MFLOP",
    "s": lambda value: f"{value:.2f} s",
    "fraction of variance": "{:.3f}".format,
}


def grid(table: Table) -> list[list[str]]:
    """A table as text: a row of headings, then a row an arm."""
    header = ["arm", "what", "seeds", *table.headings]
    return [header] + [
        [row.name, row.what, str(row.seeds or ""), *(_text(row, metric) for metric in table.metrics)]
        for row in table.rows
    ]


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables, each with its notes, and the published figures last."""
    parts = []
    for table in tables:
        header, *lines = grid(table)
        parts.append(
            f"## {table.title}\n\n{_markdown(header, lines)}\n" + "".join(f"\n- {note}" for note in table.notes)
        )
    published = [[row.name, row.trainable, row.memory, row.accuracy] for row in PUBLISHED]
    header = ["published", "trained parameters", "GPU memory", "accuracy"]
    parts.append(f"## Published figures, for reference\n\n{_markdown(header, published)}\n\n- {PUBLISHED_NOTE}")
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """All rows of all tables as plain numbers: value, low and high of each metric, with its unit in the heading."""
    metrics = [metric for _, metric, _ in STAGE_COLUMNS]
    metrics += sorted({metric for table in tables for metric in table.metrics} - set(metrics))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    headings = [f"{metric} ({kind_of(metric).unit})" for metric in metrics]
    ends = [(heading, f"{heading} low", f"{heading} high") for heading in headings]
    writer.writerow(["suite", "testbed", "table", "arm", "what", "seeds", *itertools.chain.from_iterable(ends)])
    for table in tables:
        for row in table.rows:
            cells: list[float | str] = []
            for metric in metrics:
                figure = row.figures.get(metric)
                cells += [figure.value, *(figure.interval or ("", ""))] if figure else ["", "", ""]
            writer.writerow([table.suite, table.testbed, table.kind, row.name, row.what, row.seeds or "", *cells])
    return buffer.getvalue()


def _text(row: Row, metric: str) -> str:
    return written(metric, row.figures[metric]) if metric in row.figures else "–"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
