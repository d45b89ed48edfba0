"""Held-out loss against learning rate, of what was trained at several rates and was else the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kallm_bench.reporting.table import Table
from kallm_bench.reporting.tradeoffs import COLOURS, SHAPES, bars

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

LEAST = 3
"""Rates that make a line; fewer are told in the table."""

Line = tuple[str, list[tuple[float, float, tuple[float, float] | None]]]
"""What it is called, and (learning rate, loss, interval) by rate."""


def sweeps_of(table: Table) -> list[Line]:
    """A line for all that was trained at LEAST rates or more, called by what the names of its arms begin with."""
    groups: dict[str, dict[float, tuple[str, Any]]] = {}
    for row in table.rows:
        if row.sweep and (loss := row.figures.get("heldout_loss")):
            groups.setdefault(row.sweep.alike, {}).setdefault(row.sweep.rate, (row.name, loss))
    lines = []
    for group in groups.values():
        if len(group) >= LEAST:
            points = [(rate, loss.value, loss.interval) for rate, (_, loss) in sorted(group.items())]
            lines.append((_beginning([name for name, _ in group.values()]), points))
    return lines


def _beginning(names: Sequence[str]) -> str:
    """What all of them begin with, or the first where they have nothing in common."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letter for letter, *_ in same).rstrip("-_+ ") or names[0]


def draw_sweeps(lines: Sequence[Line], canvas: Canvas) -> None:
    """Both axes as the eye reads them: rates by their ratio, losses by their difference."""
    canvas.set_size_inches(7.5, 3.4 + 0.18 * -(-len(lines) // 4))
    axes = canvas.add_subplot()
    for number, (name, points) in enumerate(lines):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        axes.plot([rate for rate, _, _ in points], [loss for _, loss, _ in points], color=colour, linewidth=0.8)
        for rate, loss, ends in points:
            axes.errorbar(
                rate, loss, yerr=bars(loss, ends), fmt=shape, color=colour, markersize=5, linewidth=0.8, capsize=2
            )
        axes.plot([], [], f"{shape}-", color=colour, markersize=5, linewidth=0.8, label=name)
    rates = sorted({rate for _, points in lines for rate, _, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("held-out loss, nats/token\nless is better")
    axes.grid(linewidth=0.4)
    canvas.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)
