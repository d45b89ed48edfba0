"""Tables as text: markdown for people, CSV for spreadsheets."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kallm_bench.records import kind_of
from kallm_bench.reporting.beside import side_by_side
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE, PUBLISHED_TITLE
from kallm_bench.reporting.rows import STAGE_COLUMNS
from kallm_bench.reporting.table import Figure, Row, Table


def written(metric: str, figure: Figure, headed: bool = True) -> str:
    """A figure as a reader wants it: 125.67M, 43.8 % [40.1, 47.5], 2.39 [2.37, 2.41], 1.90 GiB, 1,234 ± 2 %, 48.5 ms.

    Args:
        headed: whether it stands below its heading, which for some metrics says the unit.
    """
    return " ".join(part for part in parts(metric, figure, headed) if part)


def parts(metric: str, figure: Figure, headed: bool = True) -> tuple[str, str, str]:
    """The value, what is known of its uncertainty, and the mark; the last two may be empty."""
    form = _form(metric, figure.value, headed)
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


@dataclass(frozen=True)
class Form:
    """How a value is written: multiplied, with so many digits after the point, and what follows."""

    scale: float
    digits: int
    unit: str = ""
    sign: str = ""

    def __call__(self, value: float) -> str:
        return f"{value * self.scale:{self.sign},.{self.digits}f}{self.unit}"

    def showing(self, value: float) -> Form:
        """With as many digits more as it takes to see that a value is not zero; of a difference that needs none."""
        size = abs(value * self.scale)
        if self.sign or not size or size >= 0.5 * 10**-self.digits:
            return self
        return dataclasses.replace(self, digits=math.ceil(-math.log10(size)))


_FORMS = {
    "fraction": Form(100, 1, " %"),
    "%": Form(1, 1, " %"),
    "parameters": Form(1e-6, 2, "M"),
    "bytes": Form(2**-30, 2, " GiB"),
    "tokens": Form(1, 0),
    "tokens/s": Form(1, 0),
    "FLOP/token": Form(1e-6, 1, " MFLOP"),
    "times": Form(1, 2),
    "points": Form(1, 1, sign="+"),
}
"""By unit; of others three digits."""

_PREFIXED = ("s", "J/token")
"""Units of figures that may be very small: below 1 they are written in thousandths, millionths or less."""

_PREFIXES = {"": 1.0, "m": 1e-3, "µ": 1e-6, "n": 1e-9}


def _form(metric: str, value: float, headed: bool) -> Callable[[float], str]:
    """How a metric of about that value is written: its interval's ends in the same unit."""
    name, unit = metric.partition("/")[0], kind_of(metric).unit
    if headed and name in _FORMS_OF:
        return _FORMS_OF[name]
    if unit in _PREFIXED:
        return _prefixed(unit, value)
    if unit == "parameters" and value < 5000:  # less than 0.01M
        return Form(1, 0)
    return _FORMS.get(unit, Form(1, 3)).showing(value)


def _prefixed(unit: str, value: float) -> Form:
    """Three digits that count, in the largest unit that the value is one of; of the whole unit two after the point."""
    size = abs(value) * 1.0005  # 999.6 thousandths are written as 1.00
    prefix = next((each for each, factor in _PREFIXES.items() if size >= factor), "n" if value else "")
    shown = size / _PREFIXES[prefix]
    digits = 2 if not prefix or shown < 10 else 1 if shown < 100 else 0
    return Form(1 / _PREFIXES[prefix], digits, f" {prefix}{unit}").showing(value)


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
    "detectable_difference": Form(1, 1),
    "likelihood_difference": Form(1, 3, sign="+"),
    "heldout_loss_difference": Form(1, 3, sign="+"),
    "class_loss_difference": Form(1, 3, sign="+"),
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
    table = side_by_side(table)
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
    known = {
        "overview": ("problem",),
        "kernels": ("problem", "contender"),
        "differences": ("arm", "seeds"),
        "failures": ("arm",),
    }
    return known.get(table.kind, ("arm", "what", "seeds"))


def to_markdown(tables: Sequence[Table]) -> str:
    """All tables, each with its notes, and the published figures last where there are models to set beside them."""
    parts = [f"## {table.title}\n\n{markdown_table(table, notes=True)}" for table in tables]
    if cells := published_grid(tables):
        parts.append(f"## {PUBLISHED_TITLE}\n\n{_markdown(cells[0], cells[1:])}\n\n- {PUBLISHED_NOTE}\n")
    return "\n".join(parts)


def published_grid(tables: Sequence[Table]) -> list[list[str]]:
    """The published figures as text, headings first; empty where there are no models to set beside them."""
    if tables and all(table.kind in ("kernels", "overview", "failures") for table in tables):
        return []
    lines = [[row.name, row.trainable, row.memory, row.accuracy] for row in PUBLISHED]
    return [["published", "trained parameters", "GPU memory", "accuracy"], *lines]


def markdown_table(table: Table, notes: bool) -> str:
    """One table as lines of text, with its notes below it where they are asked for."""
    header, *lines = grid(table)
    text = _markdown(header, lines, len(side_by_side(table).metrics)) + "\n"
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
