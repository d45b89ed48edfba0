"""What work would take, before it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kallm_bench.console.grids import gib, minutes, show_grid, show_pairs, show_rows
from kallm_bench.console.streams import say, show_json, tell

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


CELL_HEADINGS = (
    "arm", "seed", "what", "training tokens", "steps", "parameters", "that learn", "takes", "peak memory",
    "checkpoint", "known from", "questions from",
)  # fmt: skip


def show_cells(cells: Sequence[CellForecast], room: Room, as_json: bool) -> None:
    """The cells of a suite, with what each one's training would take, and all of it."""
    if as_json:
        show_json([dataclasses.asdict(cell) | {"budget": cell.budget and cell.budget.to_json()} for cell in cells])
        return
    show_grid("Nothing was run: this is what it would take", [CELL_HEADINGS, *(_cell_row(cell) for cell in cells)])
    budgets = [cell.budget for cell in cells if cell.budget]
    if budgets:
        # every cell keeps what it retrofitted and what it trained; states go one after the other
        kept = sum(2 * budget.checkpoint_bytes for budget in budgets)
        disk = kept + max(budget.disk_bytes - budget.checkpoint_bytes for budget in budgets)
        say(f"Training takes about {minutes(sum(budget.seconds for budget in budgets))} in all.")
        for line in _too_much([budget.peak_bytes or 0 for budget in budgets], disk, room):
            tell(line)


def _cell_row(cell: CellForecast) -> list[str]:
    budget = cell.budget
    if budget is None:
        return [cell.arm, cell.seed, cell.what, *("–" for _ in range(7)), cell.trouble or "–", cell.questions or "–"]
    return [
        cell.arm, cell.seed, cell.what, f"{budget.tokens:,}", f"{budget.steps:,}", f"{budget.parameters / 1e6:.2f}M",
        f"{budget.trainable_parameters / 1e6:.2f}M", minutes(budget.seconds),
        gib(budget.peak_bytes) if budget.peak_bytes else "–", gib(budget.checkpoint_bytes), budget.source,
        cell.questions or "–",
    ]  # fmt: skip
