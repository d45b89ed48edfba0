"""A suite's drawings: what skill costs, losses during training and by learning rate, each task against guessing.

Drawn by matplotlib, which is imported only when something is drawn. Each drawing bears the sha256 of what it shows, so
that one can tell whether a picture is of these results whatever version of matplotlib has drawn it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kallm_bench.reporting.beside import short_names
from kallm_bench.reporting.sweeps import draw_sweeps, sweeps_of
from kallm_bench.reporting.table import Table
from kallm_bench.reporting.tradeoffs import COLOURS, draw_tradeoffs, panels_of, tradeoff_data

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

INK, RULE = "#24292f", "#b4bcc6"
"""Of text and axes, and of the grid. A page replaces them by its own, so that they suit light and dark."""

PICTURES = ("svg", "png")


@dataclass(frozen=True)
class Drawing:
    """A picture of one table.

    Args:
        name: for its file.
        title: what it shows.
        data: all that is drawn, as JSON could hold it.
        draw: puts it on an empty matplotlib figure.
    """

    name: str
    title: str
    data: Any
    draw: Callable[[Canvas], None]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([self.title, _rounded(self.data)], sort_keys=True).encode()).hexdigest()


def _rounded(data: Any) -> Any:
    """All numbers with six digits: the last of a float's sixteen are another processor's choice."""
    if isinstance(data, float):
        return float(f"{data:.6g}")
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    return [_rounded(value) for value in data] if isinstance(data, list | tuple) else data


def drawings_of(table: Table) -> list[Drawing]:
    """What can be drawn of a suite's arms; nothing of other tables."""
    if table.kind != "arms":
        return []
    name = f"{table.suite}-{table.testbed}"
    found = []
    if panels_of(table):
        title = "What skill costs. Bars: intervals; dashed, through ringed points: the Pareto front"
        found.append(
            Drawing(f"{name}-costs", title, tradeoff_data(table), lambda canvas: draw_tradeoffs(table, canvas, INK))
        )
    if curves := _curves(table):
        title = "Loss during training. Lines: on the batches trained on; dots: on held-out rows"
        arms = list(dict.fromkeys(short_names(table).values()))
        found.append(Drawing(f"{name}-losses", title, curves, lambda canvas: _draw_losses(arms, curves, canvas)))
    if lines := sweeps_of(table):
        title = "Held-out loss by learning rate, of what was else trained alike"
        found.append(Drawing(f"{name}-rates", title, lines, lambda canvas: draw_sweeps(lines, canvas)))
    ways = list(dict.fromkeys(row.asked for row in table.rows))
    asked = sorted((row for row in table.rows if row.tasks), key=lambda row: ways.index(row.asked))
    tasks = {row.label: {task: vars(score) for task, score in row.tasks.items()} for row in asked}
    if tasks:
        title = "Accuracy by task, in points above or below guessing. *: above guessing, after Holm's correction"
        found.append(Drawing(f"{name}-tasks", title, tasks, lambda canvas: _draw_tasks(tasks, canvas)))
    return found


def _curves(table: Table) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """(arm, metric, points); once for an arm whose rows differ in how they were asked alone."""
    names = short_names(table)
    found = {
        (row.name, curve.metric, tuple(curve.points)): (names[row.label], curve.metric, list(curve.points))
        for row in reversed(table.rows)
        for curve in row.curves
    }
    return list(reversed(found.values()))


def rendered(drawing: Drawing, kind: str, ground: str = "white") -> bytes:
    """The picture as a file's content; the same bytes for the same data and version of matplotlib.

    Args:
        kind: one of PICTURES.
        ground: a colour, or "none" for what is put on a page that has its own.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "grid.color": RULE,
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": drawing.name,
        "font.family": "sans-serif",
        "font.size": 8,
    }
    with matplotlib.rc_context(style):
        canvas = Figure(layout="constrained")
        FigureCanvasAgg(canvas)
        drawing.draw(canvas)
        buffer = io.BytesIO()
        about = {"Title": drawing.title, "Description": f"data {drawing.fingerprint}"}
        about |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}  # type: ignore[dict-item]
        canvas.savefig(buffer, format=kind, dpi=160, metadata=about, facecolor=ground)
    return buffer.getvalue()


def _draw_losses(
    arms: Sequence[str], curves: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], canvas: Canvas
) -> None:
    """Every arm in the colour that it has in the other drawings, and in a dash of its own."""
    canvas.set_size_inches(7.5, 3.4 + 0.18 * -(-len(arms) // 4))
    axes = canvas.add_subplot()
    for arm, metric, points in curves:
        number = arms.index(arm)
        axes.plot(
            [x / 1e6 for x, _ in points],
            [y for _, y in points],
            ("-", "--", "-.", ":")[number % 4] if metric == "train_loss" else "o",
            color=COLOURS[number % len(COLOURS)],
            label=arm if metric == "train_loss" else None,
            linewidth=1,
            markersize=3,
        )
    end = max(x for _, _, points in curves for x, _ in points)
    late = [y for _, _, points in curves for x, y in points if x >= 0.1 * end]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    axes.set_ylim(min(late) - margin, max(late) + margin)  # the first steps would press the rest flat
    axes.set_xlabel("trained tokens, million")
    axes.set_ylabel("loss, nats/token")
    axes.grid(linewidth=0.4)
    canvas.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)


def _draw_tasks(tasks: dict[str, dict[str, dict[str, Any]]], canvas: Canvas) -> None:
    """A heat map: a row a task, a column an arm, white at guessing."""
    names = sorted({task for scores in tasks.values() for task in scores})
    arms = list(tasks)
    canvas.set_size_inches(2.6 + 0.75 * len(arms), 1.6 + 0.2 * len(names))
    axes = canvas.add_subplot()
    above = [[_above(tasks[arm].get(task)) for arm in arms] for task in names]
    most = max([abs(cell) for line in above for cell in line if cell == cell], default=0.0) or 1.0
    mesh = axes.pcolormesh(above, cmap="PuOr", vmin=-most, vmax=most, edgecolors=RULE, linewidth=0.4)
    for down, task in enumerate(names):
        for right, arm in enumerate(arms):
            cell = above[down][right]
            if cell == cell:
                text = f"{round(cell):+d}".replace("+0", "0") + ("*" if tasks[arm][task]["sure"] else "")
                colour = "#ffffff" if abs(cell) > 0.65 * most else "#111111"
                axes.text(right + 0.5, down + 0.5, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes.set_yticks([n + 0.5 for n in range(len(names))], [name.replace("_", " ") for name in names], fontsize=7)
    axes.set_xticks([n + 0.5 for n in range(len(arms))], arms, fontsize=7, rotation=30, ha="right")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    canvas.colorbar(mesh, ax=axes, label="points above guessing", shrink=0.6)


def _above(score: dict[str, Any] | None) -> float:
    """Points above guessing; nan, which stays blank, where either is not known."""
    if score is None or score["guessing"] is None:
        return float("nan")
    return 100 * float(score["accuracy"] - score["guessing"])
