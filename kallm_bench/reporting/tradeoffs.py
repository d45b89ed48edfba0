"""What skill costs: accuracy and loss against parameters, memory and speed; and which arms nothing beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kallm_bench.records import kind_of
from kallm_bench.reporting.arms import SHARED
from kallm_bench.reporting.beside import short_names
from kallm_bench.reporting.table import Figure, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

SKILLS = ("accuracy", "class_accuracy", "heldout_loss", "class_loss")
"""Up the page: a row of panels for each that there is."""

COSTS = (
    ("parameters",),
    tuple(f"{memory}_bytes{of}" for memory in ("peak_vram_allocated", "peak_resident") for of in ("", "/profile")),
    ("train_tokens_per_second/profile", "train_tokens_per_second"),
    ("decode_tokens_per_second",),
)
"""Across the page: of each, the first that two arms or more have. A profile's speed before a run's, which may have read
what another had to compute; that of a run in company is not drawn."""

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


@dataclass(frozen=True)
class Panel:
    """What is set against what; `asked` is how, where it is an accuracy on questions."""

    cost: str
    skill: str
    asked: str = ""


def points_of(table: Table, panel: Panel) -> list[Point]:
    """The arms that have both figures; of an arm's rows that differ in other things alone, one."""
    x_scale, y_scale = _scale(panel.cost)[0], _scale(panel.skill)[0]
    names = short_names(table)
    found: dict[tuple[str, float, float], Point] = {}
    for row in _having(table, panel.skill, panel.asked):
        if (x := row.figures.get(panel.cost)) and x.mark != SHARED:
            y = row.figures[panel.skill]
            ends = _ends(x, x_scale), _ends(y, y_scale)
            point = Point(names[row.label], x.value * x_scale, y.value * y_scale, *ends)
            found.setdefault((row.name, point.x, point.y), point)
    return list(found.values())


def pareto_front(points: Sequence[Point], cost: str, skill: str) -> list[Point]:
    """Those that no other point is at least as good as in both, and better in one; by x."""
    x_sign, y_sign = (1 if kind_of(metric).better == "higher" else -1 for metric in (cost, skill))
    scores = {point: (x_sign * point.x, y_sign * point.y) for point in points}

    def beaten(point: Point) -> bool:
        x, y = scores[point]
        return any(other != (x, y) and other[0] >= x and other[1] >= y for other in scores.values())

    return sorted((point for point in points if not beaten(point)), key=lambda point: (point.x, point.y))


def panels_of(table: Table) -> list[list[Panel]]:
    """The panels, row by row; empty where there is nothing to set against anything."""
    costs = [next((metric for metric in names if _arms_having(table, metric) > 1), None) for names in COSTS]
    skills = [(metric, asked) for metric in SKILLS for asked in _ways(table, metric)]
    skills = [(metric, asked) for metric, asked in skills if _arms_having(table, metric, asked) > 1]
    return [[Panel(cost, skill, asked) for cost in costs if cost] for skill, asked in skills if any(costs)]


def _ways(table: Table, metric: str) -> list[str]:
    """The ways of asking that accuracies are told apart by; of other skills there is one."""
    return list(dict.fromkeys(row.asked for row in _having(table, metric))) if metric == "accuracy" else [""]


def tradeoff_data(table: Table) -> Any:
    """All that is drawn, as JSON could hold it."""
    panels = [panel for row in panels_of(table) for panel in row]
    return [[vars(panel), [vars(point) for point in points_of(table, panel)]] for panel in panels]


def draw_tradeoffs(table: Table, canvas: Canvas, ink: str) -> None:
    """Panels with an error bar an arm, the Pareto front as a dashed line through ringed points, guessing as a line."""
    rows = panels_of(table)
    across = max(len(row) for row in rows)
    arms = list(dict.fromkeys(short_names(table).values()))
    looks = {arm: (COLOURS[n % len(COLOURS)], SHAPES[n % len(SHAPES)]) for n, arm in enumerate(arms)}
    lines = -(-len(arms) // 4)
    canvas.set_size_inches(2.9 * across, 2.5 * len(rows) + 0.3 + 0.22 * lines)
    handles: dict[str, Any] = {}
    for down, row in enumerate(rows):
        for right, panel in enumerate(row):
            axes = canvas.add_subplot(len(rows), across, down * across + right + 1)
            _draw_panel(axes, points_of(table, panel), panel, looks.__getitem__, ink, handles)
            for guessing in table.rows:
                if guessing.name.startswith("guessing") and guessing.asked == panel.asked:
                    _draw_guessing(axes, guessing, panel.skill, handles)
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)


def _draw_panel(
    axes: Axes,
    points: Sequence[Point],
    panel: Panel,
    look: Callable[[str], tuple[str, str]],
    ink: str,
    handles: dict[str, Any],
) -> None:
    front = pareto_front(points, panel.cost, panel.skill)
    (line,) = axes.plot([p.x for p in front], [p.y for p in front], "--", color=ink, linewidth=0.8, zorder=1)
    handles.setdefault("Pareto front", line)
    axes.plot([p.x for p in front], [p.y for p in front], "o", mfc="none", mec=ink, mew=0.8, markersize=10, zorder=1)
    for point in points:
        colour, shape = look(point.arm)
        handles[point.arm] = axes.errorbar(
            point.x,
            point.y,
            xerr=bars(point.x, point.x_ends),
            yerr=bars(point.y, point.y_ends),
            fmt=shape,
            color=colour,
            markersize=5,
            linewidth=0.8,
            capsize=2,
        )
    axes.set_xlabel(_label(panel.cost), fontsize=7)
    axes.set_ylabel(_label(panel.skill, panel.asked), fontsize=7)
    axes.tick_params(labelsize=6.5)
    axes.margins(0.15)
    axes.grid(linewidth=0.4)


def _draw_guessing(axes: Axes, guessing: Row, skill: str, handles: dict[str, Any]) -> None:
    if figure := guessing.figures.get(skill):
        handles["guessing"] = axes.axhline(figure.value * _scale(skill)[0], linestyle=":", color="#D55E00", linewidth=1)


def _label(metric: str, asked: str = "") -> str:
    """ "decode tokens per second, thousand/s", and below it "more is better" """
    name = (
        metric.replace("_bytes", "").replace("_", " ").replace("/profile", "").replace("vram allocated", "GPU memory")
    )
    better = {"higher": "more is better", "lower": "less is better", "": ""}[kind_of(metric).better]
    how = f" ({asked})" if asked else ""
    return f"{name.replace('heldout', 'held-out')}{how}, {_scale(metric)[1]}\n{better}"


def _scale(metric: str) -> tuple[float, str]:
    unit = kind_of(metric).unit
    return SCALES.get(unit, (1.0, unit))


def _having(table: Table, metric: str, asked: str = "") -> list[Row]:
    """The arms that have a figure, of those that were asked so."""
    rows = [row for row in table.rows if row.seeds and asked in ("", row.asked)]
    return [row for row in rows if (figure := row.figures.get(metric)) and figure.mark != SHARED]


def _arms_having(table: Table, metric: str, asked: str = "") -> int:
    names = short_names(table)
    return len({names[row.label] for row in _having(table, metric, asked)})


def _ends(figure: Figure, scale: float) -> tuple[float, float] | None:
    return (figure.interval[0] * scale, figure.interval[1] * scale) if figure.interval else None


def bars(value: float, ends: tuple[float, float] | None) -> list[list[float]] | None:
    """The lengths of an error bar's halves, as matplotlib takes them."""
    return [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]] if ends else None
