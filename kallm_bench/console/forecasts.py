"""What work would take, before it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kallm_bench.console.grids import gib, minutes, show_grid, show_pairs, show_rows
from kallm_bench.console.streams import fail, say, show_json, tell

if TYPE_CHECKING:
    from kallm_bench.budget import Budget, Room
    from kallm_bench.engine import CellForecast
    from kallm_bench.forecast import Forecast


def show_forecast(coming: Forecast, as_json: bool) -> None:
    """What a retrofit would come to: place by place, then the whole."""
    if as_json:
        show_json(coming.to_json())
        return
    rows = [
        [place.name, place.before[0], f"{place.before[1]:,}", place.after[0], f"{place.after[1]:,}"]
        for place in coming.places
    ]
    show_rows(["site", "goes", "parameters", "comes", "parameters"], rows)
    before, after = coming.parameters
    replaced = [sum(place.before[1] for place in coming.places), sum(place.after[1] for place in coming.places)]
    pairs = [
        ("start", coming.spec.start),
        ("parameters", f"{before:,} -> {after:,}"),
        ("of them replaced", f"{replaced[0]:,} -> {replaced[1]:,}"),
        ("FLOP a token, forward", f"{coming.flops[0]:,} -> {coming.flops[1]:,}"),
        ("weights", ", ".join(f"{gib(size)} in {name}" for name, size in coming.weights.items())),
    ]
    pairs += [
        (f"learn in scope {scope}", f"{count:,}; {gib(coming.training_bytes(scope))} and activations")
        for scope, count in coming.trainable.items()
    ]
    show_pairs("Nothing was done: this is what it would come to", pairs)


def show_training(coming: Budget, room: Room, as_json: bool) -> None:
    """What a training run would take."""
    if as_json:
        show_json(coming.to_json() | {"room": dataclasses.asdict(room)})
        return
    pairs = [
        ("steps", f"{coming.steps:,}"),
        ("tokens", f"{coming.tokens:,}"),
        ("parameters", f"{coming.parameters:,}"),
        ("of them learn", f"{coming.trainable_parameters:,}"),
        ("takes", f"about {minutes(coming.seconds)}, loading aside"),
        *((name, gib(size)) for name, size in coming.peaks.items()),
        ("rows at once", str(coming.rows_at_once)),
        ("checkpoint", gib(coming.checkpoint_bytes)),
        ("state of a stopped run", gib(coming.state_bytes)),
        ("disk, at most at one time", gib(coming.disk_bytes)),
    ]
    if coming.cache_bytes:
        pairs.append(("what frozen blocks give, if kept", gib(coming.cache_bytes)))
    pairs.append(("known from", coming.source))
    show_pairs("Nothing was saved: this is what it would take", pairs)
    for line in _too_much([coming.peak_bytes or 0], coming.disk_bytes, room):
        tell(line)


def _too_much(peaks: Sequence[float], disk_bytes: float, room: Room) -> list[str]:
    """Whether memory and disk will do."""
    lines = []
    for what, needed, there in (
        ("memory", max(peaks, default=0), room.memory_bytes),
        ("disk", disk_bytes, room.disk_bytes),
    ):
        verdict = "fits" if needed <= there else "does not fit"
        lines.append(f"{what}: {gib(needed)} of {gib(there)}: {verdict}")
    return lines


STAGES = {"retrofit": "retrofit", "train": "training", "eval-bbh": "questions", "profile": "profile"}
"""Stages, and what stands above the time that each takes."""


def show_cells(cells: Sequence[CellForecast], room: Room, as_json: bool, keep_weights: bool = True) -> None:
    """The cells of a suite with what each would take, all of it, and why the suite would be refused as things are."""
    if as_json:
        show_json([_as_json(cell) for cell in cells])
        return
    columns = [_column(heading, cells) for heading in _CELL_COLUMNS]
    told = [column for column in columns if any(text != NOTHING for text in column[1:])]
    show_grid("Nothing was run: this is what it would take", list(zip(*told, strict=True)))
    _show_sum(cells, room, keep_weights)
    for trouble, arm in {cell.trouble: cell.arm for cell in reversed(cells) if cell.trouble}.items():
        fail(f"as things are, it would be refused: arm '{arm}': {trouble}")


def _show_sum(cells: Sequence[CellForecast], room: Room, keep_weights: bool) -> None:
    whole = sum(cell.seconds for cell in cells)
    if not whole:
        return
    apart = {label: sum(_seconds(cell, stage) for cell in cells) for stage, label in STAGES.items()}
    parts = ", ".join(f"{label} {minutes(seconds)}" for label, seconds in apart.items() if seconds)
    say(f"About {minutes(whole)} in all{f': {parts}' if parts else ''}.")
    if filed := sum(cell.filed for cell in cells):
        say(f"{filed} of {len(cells)} cells have their records here: what has not changed since is not done again.")
    # every cell keeps what it retrofitted and what it trained, or the largest alone; states go one after the other
    left = [4 * cell.parameters * len({"retrofit", "train"} & set(cell.efforts)) for cell in cells]
    kept = sum(left) if keep_weights else max(left, default=0)
    states = (cell.budget.disk_bytes - cell.budget.checkpoint_bytes for cell in cells if cell.budget)
    for line in _too_much([cell.peak_bytes or 0 for cell in cells], kept + max(states, default=0), room):
        tell(line)


NOTHING = "–"
"""In the place of what a cell does not have."""


def _seconds(cell: CellForecast, stage: str) -> float:
    """Of the parts of a cell that belong to a stage."""
    return sum(effort.seconds for name, effort in cell.efforts.items() if name.split()[-1] == stage)


def _time_of(stage: str) -> Callable[[CellForecast], str]:
    def shown(cell: CellForecast) -> str:
        return minutes(seconds) if (seconds := _seconds(cell, stage)) else NOTHING

    return shown


_CELL_COLUMNS: dict[str, Callable[[CellForecast], str]] = {
    "arm": lambda cell: cell.arm,
    "seed": lambda cell: cell.seed or NOTHING,
    "what": lambda cell: cell.what,
    "training tokens": lambda cell: f"{cell.budget.tokens:,}" if cell.budget else NOTHING,
    "parameters": lambda cell: f"{cell.parameters / 1e6:.2f}M" if cell.parameters else NOTHING,
    "that learn": lambda cell: f"{cell.budget.trainable_parameters / 1e6:.2f}M" if cell.budget else NOTHING,
    **{label: _time_of(stage) for stage, label in STAGES.items()},
    "takes": lambda cell: minutes(cell.seconds) if cell.seconds else NOTHING,
    "peak memory": lambda cell: gib(cell.peak_bytes) if cell.peak_bytes else NOTHING,
    "checkpoint": lambda cell: gib(cell.budget.checkpoint_bytes) if cell.budget else NOTHING,
    "known from": lambda cell: "; ".join(cell.sources) or _why_not(cell),
    "questions from": lambda cell: cell.questions or NOTHING,
}


def _why_not(cell: CellForecast) -> str:
    """Why a cell would take nothing."""
    return "would be refused" if cell.trouble else "done with another cell" if cell.parameters else NOTHING


def _column(heading: str, cells: Sequence[CellForecast]) -> list[str]:
    return [heading, *map(_CELL_COLUMNS[heading], cells)]


def _as_json(cell: CellForecast) -> dict[str, Any]:
    sums = {"seconds": cell.seconds, "peak_bytes": cell.peak_bytes}
    return dataclasses.asdict(cell) | sums | {"budget": cell.budget and cell.budget.to_json()}
