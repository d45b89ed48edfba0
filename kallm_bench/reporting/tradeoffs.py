"""What skill costs: accuracy and loss against parameters, memory and speed; and which arms nothing beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kallm_bench.records import kind_of
from kallm_bench.reporting.table import Figure, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SKILLS = ("accuracy", "class_accuracy", "heldout_loss", "class_loss")
"""Up the page: a row of panels for each that there is."""

COSTS = (
    ("parameters",),
    tuple(f"{memory}_bytes{of}" for memory in ("peak_vram_allocated", "peak_resident") for of in ("", "/profile")),
    ("train_tokens_per_second", "train_tokens_per_second/profile"),
    ("decode_tokens_per_second",),
)
"""Across the page: of each, the first that two arms or more have."""

SCALES = {"fraction": (100, "%"), "parameters": (1e-6, "M"), "bytes": (2**-30, "GiB"), "tokens/s": (1e-3, "thousand/s")}
"""Unit -> by what a value is multiplied, and what it is then written in."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8A00")
"""Okabe and Ito's, which colour-blind readers tell apart as well; black and yellow would vanish on one background."""

SHAPES = "osD^vPX<>p"


@dataclass(frozen=True)
class Point:
    """An arm in one panel, in the panel's units."""

    arm: str
    x: float
    y: float
    x_ends: tuple[float, float] | None
    y_ends: tuple[float, float] | None


def points_of(table: Table, cost: str, skill: str) -> list[Point]:
    """The arms that have both figures."""
    x_scale, y_scale = _scale(cost)[0], _scale(skill)[0]
    return [
        Point(row.label, x.value * x_scale, y.value * y_scale, _ends(x, x_scale), _ends(y, y_scale))
        for row in table.rows
        if row.seeds and (x := row.figures.get(cost)) and (y := row.figures.get(skill))
    ]


def pareto_front(points: Sequence[Point], cost: str, skill: str) -> list[Point]:
    """Those that no other point is at least as good as in both, and better in one; by x."""
    x_sign, y_sign = (1 if kind_of(metric).better == "higher" else -1 for metric in (cost, skill))
    scores = {point: (x_sign * point.x, y_sign * point.y) for point in points}

    def beaten(point: Point) -> bool:
        x, y = scores[point]
        return any(other != (x, y) and other[0] >= x and other[1] >= y for other in scores.values())

    return sorted((point for point in points if not beaten(point)), key=lambda point: (point.x, point.y))


def panels_of(table: Table) -> list[list[tuple[str, str]]]:
    """(cost, skill) of each panel, row by row; empty where there is nothing to set against anything."""
    costs = [next((metric for metric in names if len(_having(table, metric)) > 1), None) for names in COSTS]
    skills = [metric for metric in SKILLS if len(_having(table, metric)) > 1]
    return [[(cost, skill) for cost in costs if cost] for skill in skills if any(costs)]


def tradeoff_data(table: Table) -> Any:
    """All that is drawn, as JSON could hold it."""
    return [
        [cost, skill, [vars(point) for point in points_of(table, cost, skill)]]
        for row in panels_of(table)
        for cost, skill in row
    ]


def draw_tradeoffs(table: Table, canvas: Canvas, ink: str) -> None:
    """Panels with an error bar an arm, the Pareto front as a dashed line through ringed points, guessing as a line."""
    rows = panels_of(table)
    across = max(len(row) for row in rows)
    arms = [row.label for row in table.rows if row.seeds]
    looks = {arm: (COLOURS[n % len(COLOURS)], SHAPES[n % len(SHAPES)]) for n, arm in enumerate(arms)}
    lines = -(-len(arms) // 4)
    canvas.set_size_inches(2.9 * across, 2.5 * len(rows) + 0.3 + 0.22 * lines)
    handles: dict[str, Any] = {}
    for down, row in enumerate(rows):
        for right, (cost, skill) in enumerate(row):
            axes = canvas.add_subplot(len(rows), across, down * across + right + 1)
            _draw_panel(axes, points_of(table, cost, skill), cost, skill, looks.__getitem__, ink, handles)
            if guessing := next((each for each in table.rows if each.name.startswith("guessing")), None):
                _draw_guessing(axes, guessing, skill, handles)
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)


def _draw_panel(
    axes: Axes,
    points: Sequence[Point],
    cost: str,
    skill: str,
    look: Callable[[str], tuple[str, str]],
    ink: str,
    handles: dict[str, Any],
) -> None:
    front = pareto_front(points, cost, skill)
    (line,) = axes.plot([p.x for p in front], [p.y for p in front], "--", color=ink, linewidth=0.8, zorder=1)
    handles.setdefault("Pareto front", line)
    axes.plot([p.x for p in front], [p.y for p in front], "o", mfc="none", mec=ink, mew=0.8, markersize=10, zorder=1)
    for point in points:
        colour, shape = look(point.arm)
        handles[point.arm] = axes.errorbar(
            point.x,
            point.y,
            xerr=_bars(point.x, point.x_ends),
            yerr=_bars(point.y, point.y_ends),
            fmt=shape,
            color=colour,
            markersize=5,
            linewidth=0.8,
            capsize=2,
        )
    axes.set_xlabel(_label(cost), fontsize=7)
    axes.set_ylabel(_label(skill), fontsize=7)
    axes.tick_params(labelsize=6.5)
    axes.margins(0.15)
    axes.grid(linewidth=0.4)


def _draw_guessing(axes: Axes, guessing: Row, skill: str, handles: dict[str, Any]) -> None:
    if figure := guessing.figures.get(skill):
        handles["guessing"] = axes.axhline(figure.value * _scale(skill)[0], linestyle=":", color="#D55E00", linewidth=1)


def _label(metric: str) -> str:
    """ "decode tokens per second, thousand/s, better →" """
    name = (
        metric.replace("_bytes", "").replace("_", " ").replace("/profile", "").replace("vram allocated", "GPU memory")
    )
    better = {"higher": ", more is better", "lower": ", less is better", "": ""}[kind_of(metric).better]
    return f"{name.replace('heldout', 'held-out')}, {_scale(metric)[1]}\n{better.removeprefix(', ')}"


def _scale(metric: str) -> tuple[float, str]:
    unit = kind_of(metric).unit
    return SCALES.get(unit, (1.0, unit))


def _having(table: Table, metric: str) -> list[Row]:
    return [row for row in table.rows if row.seeds and metric in row.figures]


def _ends(figure: Figure, scale: float) -> tuple[float, float] | None:
    return (figure.interval[0] * scale, figure.interval[1] * scale) if figure.interval else None


def _bars(value: float, ends: tuple[float, float] | None) -> list[list[float]] | None:
    """The lengths of an error bar's halves, as matplotlib takes them."""
    return [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]] if ends else None
