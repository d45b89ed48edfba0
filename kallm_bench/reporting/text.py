"""Tables as text: markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence

from kallm_bench.records import kind_of
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE
from kallm_bench.reporting.tables import STAGE_COLUMNS, Figure, Row, Table


def written(metric: str, figure: Figure) -> str:
    """A figure as a reader wants it: 125.7M, 43.8 % [40.1, 47.5], 2.391 ± 0.012, 1.9 GiB."""
    unit = kind_of(metric).unit
    if unit == "fraction":
        text = f"{100 * figure.value:.1f} %"
        low_high = [f"{100 * end:.1f}" for end in figure.interval or ()]
    elif unit == "parameters":
        return f"{figure.value / 1e6:.2f}M" if figure.value else "0"
    elif unit == "bytes":
        return f"{figure.value / 2**30:.2f} GiB"
    elif unit == "tokens/s":
        text, low_high = f"{figure.value:,.0f}", [f"{end:,.0f}" for end in figure.interval or ()]
    else:
        text, low_high = f"{figure.value:.3f}", [f"{end:.3f}" for end in figure.interval or ()]
    return text + (f" [{', '.join(low_high)}]" if low_high else "") + (f" {figure.mark}" if figure.mark else "")


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
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    headings = [f"{metric} ({kind_of(metric).unit})" for metric in metrics]
    ends = [(heading, f"{heading} low", f"{heading} high") for heading in headings]
    writer.writerow(["suite", "testbed", "arm", "what", "seeds", *itertools.chain.from_iterable(ends)])
    for table in tables:
        for row in table.rows:
            cells: list[float | str] = []
            for metric in metrics:
                figure = row.figures.get(metric)
                cells += [figure.value, *(figure.interval or ("", ""))] if figure else ["", "", ""]
            writer.writerow([table.suite, table.testbed, row.name, row.what, row.seeds or "", *cells])
    return buffer.getvalue()


def _text(row: Row, metric: str) -> str:
    return written(metric, row.figures[metric]) if metric in row.figures else "–"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
