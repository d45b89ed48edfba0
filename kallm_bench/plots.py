"""Drawings, by matplotlib, which is imported only when one is made."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kallm_bench.models.inspect import Curve

FORMATS = ("png", "svg")


def draw_curves(curves: Sequence[Curve], kind: str) -> bytes:
    """A small chart for each learned function, in one picture.

    Args:
        kind: one of FORMATS.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(6, math.ceil(math.sqrt(len(curves))))
    down = math.ceil(len(curves) / across)
    figure = Figure(figsize=(2.4 * across, 1.9 * down), layout="constrained")
    FigureCanvasAgg(figure)
    for number, curve in enumerate(curves):
        axes = figure.add_subplot(down, across, number + 1)
        axes.plot(curve.u, curve.values, linewidth=1.2)
        where = f"{curve.source}" if curve.source == curve.target else f"{curve.source} → {curve.target}"
        axes.set_title(f"block {curve.block} {curve.layer}\n{where}, curved {curve.curved:.0%}", fontsize=6)
        axes.tick_params(labelsize=5)
        axes.axhline(0, linewidth=0.4, color="grey")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()
