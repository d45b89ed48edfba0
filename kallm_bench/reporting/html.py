"""Tables and drawings as one page that needs nothing else: no network, no script from elsewhere.

`page.html` is its template, with `page.css` and `page.js` put inside. Drawings are in it as SVG, whose ink and grid are
of the page's colours, so that they are read on a light ground and on a dark one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kallm_bench.records import kind_of
from kallm_bench.reporting.beside import side_by_side
from kallm_bench.reporting.plots import INK, RULE, Drawing, drawings_of, rendered
from kallm_bench.reporting.published import PUBLISHED, PUBLISHED_NOTE
from kallm_bench.reporting.table import Row, Table
from kallm_bench.reporting.text import about, parts

FOLDER = Path(__file__).parent

ENLARGED = 1.2
"""How much larger a drawing may become on a wide screen."""


def to_html(tables: Sequence[Table], set_aside: Sequence[tuple[Path, str]] = ()) -> str:
    """The whole report.

    Args:
        set_aside: files of the store that are not in the tables, and why.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["coded"] = _coded
    groups = itertools.groupby(tables, key=lambda table: f"{table.suite} on {table.testbed}")
    sections = [_section(title, list(group)) for title, group in groups]
    return environment.get_template("page.html").render(
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        sections=sections,
        published=PUBLISHED,
        published_note=PUBLISHED_NOTE,
        set_aside=set_aside,
    )


def _section(title: str, tables: Sequence[Table]) -> dict[str, Any]:
    drawings = [drawing for table in tables for drawing in drawings_of(table)]
    return {
        "title": title,
        "tables": [_table(table) for table in tables],
        "drawings": [(drawing.title, inlined(drawing)) for drawing in drawings],
    }


def _coded(note: str) -> Any:
    """A note with what stands between backticks as code."""
    from markupsafe import Markup, escape

    texts = note.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(text) if number % 2 else escape(text) for number, text in enumerate(texts)
    )


def _table(table: Table) -> dict[str, Any]:
    """What the template shows of a table: columns of words, then of figures."""
    table = side_by_side(table)
    first = about(table)
    return {
        "title": table.title,
        "headings": [*first, *table.words],
        "columns": [(heading, _meaning(metric)) for metric, heading in zip(table.metrics, table.headings, strict=True)],
        "rows": [
            {
                "name": row.label,
                "what": row.what if {"what", "contender"} & set(first) else None,
                "seeds": row.seeds if "seeds" in first else None,
                "words": [row.words.get(name, "–") for name in table.words],
                "cells": [_cell(row, metric) for metric in table.metrics],
            }
            for row in table.rows
        ],
        "notes": table.notes,
    }


def _meaning(metric: str) -> str:
    """What a heading says when one points at it."""
    kind = kind_of(metric)
    better = f"; {kind.better} is better" if kind.better else ""
    return f"{kind.computed} ({kind.unit}{better})"


def _cell(row: Row, metric: str) -> dict[str, Any]:
    if metric not in row.figures:
        return {"value": None, "parts": ("–", "", "")}
    figure = row.figures[metric]
    return {"value": figure.value, "parts": parts(metric, figure)}


def inlined(drawing: Drawing) -> Any:
    """The drawing as an SVG element for a page with others: its ids are its own, its ink and rules are the page's."""
    from markupsafe import Markup, escape

    text = rendered(drawing, "svg", "none").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{re.escape(drawing.name)}-", text)
    text = text.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head = f'<svg viewBox="0 0 {width} {height}" style="max-width: {float(width) * ENLARGED:.0f}pt" role="img"'
    text = re.sub(r"<svg[^>]*>", lambda _: f'{head} aria-label="{escape(drawing.title)}">', text, count=1)
    return Markup(text)  # matplotlib escapes what it writes
