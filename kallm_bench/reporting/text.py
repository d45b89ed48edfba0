"""Tables as text: markdown for people, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence

from kallm_bench.records import kind_of
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE
from kallm_bench.reporting.rows import STAGE_COLUMNS
from kallm_bench.reporting.table import Figure, Row, Table


def written(metric: str, figure: Figure) -> str:
    """A figure as a reader wants it: 125.67M, 43.8 % [40.1, 47.5], 2.391 [2.379, 2.403], 1.90 GiB, 1,234 ± 2 %."""
    return " ".join(part for part in parts(metric, figure) if part)


def parts(metric: str, figure: Figure) -> tuple[str, str, str]:
    """The value, what is known of its uncertainty, and the mark; the last two may be empty."""
    form = _FORMS_OF.get(metric.partition("/")[0]) or _FORMS.get(kind_of(metric).unit, "{:.3f}".format)
    return form(figure.value), _spread(figure, form), figure.mark


def _spread(figure: Figure, form: Callable[[float], str]) -> str:
    """The interval in brackets; of the samples of one run, half their range as a share of the value."""
    if figure.interval is None:
        return ""
    low, high = figure.interval
    if figure.over == "samples":
        return f"± {50 * (high - low) / figure.value:.0f} %" if figure.value and high > low else ""
    ends = [form(end).removesuffix(" %") for end in (low, high)]
    return f"[{', '.join(ends)}]" if ends[0] != ends[1] else ""


_FORMS: dict[str, Callable[[float], str]] = {
    "fraction": lambda value: f"{100 * value:.1f} %",
    "%": "{:.1f} %".format,
    "parameters": lambda value: f"{value / 1e6:.2f}M" if value else "0",
    "bytes": lambda value: f"{value / 2**30:.2f} GiB",
    "tokens": "{:,.0f}".format,
    "tokens/s": "{:,.0f}".format,
    "FLOP/token": lambda value: f"{value / 1e6:,.1f} MFLOP",
    "s": lambda value: f"{value:.2f} s",
    "fraction of variance": "{:.3f}".format,
    "times": "{:.2f}".format,
    "points": "{:+.1f}".format,
}


def _microseconds(value: float) -> str:
    return f"{value * 1e6:,.1f}" if value < 1e-4 else f"{value * 1e6:,.0f}"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f}" if value >= 2**20 or not value else f"{value / 2**20:.2f}"


_FORMS_OF: dict[str, Callable[[float], str]] = {
    "forward_seconds": _microseconds,
    "forward_backward_seconds": _microseconds,
    "saved_bytes": _mebibytes,
    "peak_bytes": _mebibytes,
    "relative_error": "{:.1e}".format,
    "detectable_difference": "{:.1f}".format,
    "likelihood_difference": "{:+.3f}".format,
    "heldout_loss_difference": "{:+.3f}".format,
    "class_loss_difference": "{:+.3f}".format,
}
"""Of metrics whose unit stands in the heading of their column."""


def grid(table: Table) -> list[list[str]]:
    """A table as text: a row of headings, then a row an arm; of layers alone a row a contender, problem by problem."""
    if table.kind == "kernels":
        problems = ["", *(row.name for row in table.rows)]
        return [["problem", "contender", *table.headings]] + [
            [row.name if row.name != before else "", row.what, *(_text(row, metric) for metric in table.metrics)]
            for before, row in zip(problems[:-1], table.rows, strict=True)
        ]
    lines = [[*about(table), *table.words, *table.headings]]
    for row in table.rows:
        told = {"arm": row.label, "problem": row.label, "what": row.what, "seeds": str(row.seeds or "")}
        words = [row.words.get(name, "–") for name in table.words]
        lines.append(
            [*(told[name] for name in about(table)), *words, *(_text(row, metric) for metric in table.metrics)]
        )
    return lines


def about(table: Table) -> tuple[str, ...]:
    """The headings of what rows are called and what they are."""
    known = {"overview": ("problem",), "kernels": ("problem", "contender"), "differences": ("arm", "seeds")}
    return known.get(table.kind, ("arm", "what", "seeds"))


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables, each with its notes, and the published figures last where there are models to set beside them."""
    parts = [f"## {table.title}\n\n{markdown_table(table, notes=True)}" for table in tables]
    if tables and all(table.kind in ("kernels", "overview") for table in tables):
        return "\n".join(parts)
    published = [[row.name, row.trainable, row.memory, row.accuracy] for row in PUBLISHED]
    header = ["published", "trained parameters", "GPU memory", "accuracy"]
    parts.append(f"## Published figures, for reference\n\n{_markdown(header, published)}\n\n- {PUBLISHED_NOTE}\n")
    return "\n".join(parts)


def markdown_table(table: Table, notes: bool) -> str:
    """One table as lines of text, with its notes below it where they are asked for."""
    header, *lines = grid(table)
    text = _markdown(header, lines, len(table.metrics)) + "\n"
    return text + ("\n" + "".join(f"- {note}\n" for note in table.notes) if notes else "")


def to_csv(tables: Sequence[Table]) -> str:
    """All rows of all tables, as plain numbers: value, low and high of each metric, with its unit in the heading."""
    metrics = [metric for _, metric, _ in STAGE_COLUMNS]
    metrics += sorted({metric for table in tables for metric in table.metrics} - set(metrics))
    words = list(dict.fromkeys(name for table in tables for name in table.words))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    headings = [f"{metric} ({kind_of(metric).unit})" for metric in metrics]
    columns = [(heading, f"{heading} low", f"{heading} high") for heading in headings]
    first = ["suite", "testbed", "table", "arm", "what", "seeds", *words]
    writer.writerow([*first, *itertools.chain.from_iterable(columns)])
    for table in tables:
        for row in table.rows:
            cells: list[str] = []
            for metric in metrics:
                figure = row.figures.get(metric)
                ends = figure.interval or () if figure else ()
                cells += [_plain(figure.value), *map(_plain, ends), *[""] * (2 - len(ends))] if figure else [""] * 3
            told = [table.suite, table.testbed, table.kind, row.label, row.what, row.seeds or ""]
            writer.writerow([*told, *(row.words.get(name, "") for name in words), *cells])
    return buffer.getvalue()


def _plain(value: float) -> str:
    """Ten digits: the last of a float's sixteen are another processor's choice."""
    return f"{value:.10g}"


def _text(row: Row, metric: str) -> str:
    return written(metric, row.figures[metric]) if metric in row.figures else "–"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], figures: int = 0) -> str:
    """A table whose last `figures` columns are aligned to the right."""
    ruler = ["---"] * (len(header) - figures) + ["--:"] * figures
    lines = [header, ruler, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
