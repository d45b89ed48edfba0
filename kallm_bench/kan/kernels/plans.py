"""Which way each product of a layer goes: one fused kernel, or a bounded expansion and a library's product.

Fused wins where the products are small, the library where they are large; where one ends and the other begins is
measured, for each of the three products. `plans.json` beside this file holds what won on which GPU at which sizes, and
`kallm profile --kernels --tune` adds what it finds on the GPU at hand to a file in the cache folder. A size that was
not measured takes the plan of the nearest one that was, and a GPU that was not what another one found. Nothing is timed
while a model runs: the same machine always takes the same way.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kallm_bench.errors import DeviceError, SpecError, unknown
from kallm_bench.files import cache_folder, write_file
from kallm_bench.kan.kernels.hopper_plans import (
    HALVED,
    HALVED_GRADIENTS,
    LOCAL_HALVED,
    LOCAL_HALVED_GRADIENTS,
    LOCAL_PIPED,
    SPECIALISED,
    Halved,
    HalvedGradient,
    LocalHalved,
    LocalHalvedGradient,
    LocalPiped,
    Piped,
    Specialised,
)

OPERATIONS = ("forward", "input_gradient", "coefficient_gradient")
SHIPPED = Path(__file__).with_name("plans.json")


@dataclass(frozen=True)
class Tile:
    """One fused kernel.

    Args:
        rows, inputs: of the tile.
        outputs: of the tile; one number, or for the forward (width, how many of it, width of one more or 0).
        stages, warps: how many tiles are on their way at once, and how many warps work on one.
        degrees: the most that it has registers and shared memory for.
    """

    rows: int
    inputs: int
    outputs: tuple[int, int, int]
    stages: int
    warps: int
    degrees: int


@dataclass(frozen=True)
class Library:
    """An expansion into a buffer of so many bytes, the library's product on it, and on to the next chunk.

    A chunk is never smaller than the library needs to be fast, see `library`, whatever the buffer then takes.
    """

    buffer_bytes: int


@dataclass(frozen=True)
class LocalTile:
    """One fused kernel for B-splines or Gaussians, whose steps are of one function; it has room for any number of them.

    Args:
        rows, inputs, outputs: of the tile.
        stages, warps: as in Tile.
    """

    rows: int
    inputs: int
    outputs: int
    stages: int
    warps: int


Local = LocalTile | LocalHalved | LocalHalvedGradient | LocalPiped
Plan = Tile | Library | Specialised | Halved | HalvedGradient | Piped | Local
KINDS: tuple[type, ...] = (Tile, Library, Specialised, Halved, HalvedGradient, Piped)
"""Those for polynomials."""
LOCAL_KINDS: tuple[type, ...] = (Library, LocalTile, LocalHalved, LocalHalvedGradient, LocalPiped)
"""Those for B-splines and Gaussians."""

PLANS: dict[str, dict[str, Plan]] = {
    "forward": {
        "tile-64x128": Tile(64, 64, (128, 1, 0), 2, 4, degrees=6),
        "tile-64x128-narrow": Tile(64, 32, (128, 1, 0), 2, 4, degrees=8),
        "tile-64x384": Tile(64, 32, (256, 1, 128), 2, 4, degrees=4),
        "tile-64x192": Tile(64, 64, (128, 1, 64), 2, 4, degrees=4),
        "tile-128x128": Tile(128, 32, (128, 1, 0), 3, 8, degrees=8),
        "tile-128x192": Tile(128, 32, (128, 1, 64), 3, 4, degrees=4),
        "tile-128x256": Tile(128, 64, (256, 1, 0), 3, 8, degrees=2),
    },
    "input_gradient": {
        "tile-128x64": Tile(128, 64, (64, 1, 0), 3, 8, degrees=4),
        "tile-128x128": Tile(128, 128, (64, 1, 0), 3, 8, degrees=2),
        "tile-64x64": Tile(64, 64, (64, 1, 0), 3, 4, degrees=4),
        "tile-64x32": Tile(64, 32, (64, 1, 0), 3, 4, degrees=8),
        "pipe-64": Piped(1, 3, 2, degrees=2),
        "pipe-64-long": Piped(1, 4, 1, degrees=4),
        "pipe-128": Piped(2, 4, 1, degrees=2),
    },
    "coefficient_gradient": {
        "tile-64x128": Tile(64, 64, (128, 1, 0), 3, 4, degrees=2),
        "tile-64x64": Tile(64, 64, (64, 1, 0), 3, 4, degrees=4),
        "tile-32x32": Tile(32, 64, (32, 1, 0), 3, 4, degrees=8),
    },
}
PLANS["forward"].update(
    {
        "local-64x128x64": LocalTile(64, 64, 128, 3, 4),
        "local-128x256x64": LocalTile(128, 64, 256, 3, 8),
    }
)
PLANS["input_gradient"].update(
    {
        "local-128x64x64": LocalTile(128, 64, 64, 3, 4),
        "local-128x128x64": LocalTile(128, 128, 64, 3, 8),
    }
)
PLANS["coefficient_gradient"].update(
    {
        "local-64x64x256": LocalTile(64, 64, 256, 3, 4),
        "local-64x128x128": LocalTile(64, 128, 128, 3, 8),
    }
)
PLANS["forward"].update(HALVED)
PLANS["coefficient_gradient"].update(HALVED_GRADIENTS)
PLANS["forward"].update(LOCAL_HALVED)
PLANS["coefficient_gradient"].update(LOCAL_HALVED_GRADIENTS)
PLANS["input_gradient"].update(LOCAL_PIPED)
for _operation, _plans in PLANS.items():
    _plans.update(SPECIALISED.get(_operation, {}))
    _plans.update({f"library-{mib}": Library(mib * 2**20) for mib in (16, 32, 48)})


@dataclass(frozen=True)
class Problem:
    """The size of a product: M, I, O and D; and the kind of its functions."""

    rows: int
    inputs: int
    outputs: int
    degrees: int
    kind: str = "polynomial"

    @property
    def sizes(self) -> dict[str, int]:
        """Its four numbers, by name."""
        return {"rows": self.rows, "inputs": self.inputs, "outputs": self.outputs, "degrees": self.degrees}

    def __str__(self) -> str:
        functions = f"degree {self.degrees}" if self.kind == "polynomial" else f"{self.degrees} of {self.kind}"
        return f"{self.inputs}x{self.outputs} {functions}, {self.rows:,} rows"


def find_plan(operation: str, name: str) -> Plan:
    """A plan by its name. SpecError where there is none."""
    if name not in PLANS[operation]:
        raise SpecError(unknown(f"plan for the {operation.replace('_', ' ')}", name, PLANS[operation]))
    return PLANS[operation][name]


def can(plan: Plan, degrees: int, kinds: tuple[type, ...]) -> bool:
    """Whether a plan is of one of these kinds, and has room for so many degrees."""
    return isinstance(plan, kinds) and (isinstance(plan, Library | Local) or degrees <= plan.degrees)


def kinds_for(kind: str) -> tuple[type, ...]:
    """The kinds of plans that there are for functions of this kind."""
    return KINDS if kind == "polynomial" else LOCAL_KINDS


def choose(operation: str, problem: Problem, device: torch.device, kinds: tuple[type, ...]) -> Plan:
    """The plan for a product among those of these kinds."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return PLANS[operation][_chosen(operation, problem, gpu, kinds)]


@functools.cache
def _chosen(operation: str, problem: Problem, gpu: str, kinds: tuple[type, ...]) -> str:
    """Of the plans that can be, the one that was fastest at the nearest size on this GPU, or on any other.

    What was measured of another kind of functions counts only where nothing was of this one.
    """
    entries = [entry for entry in measured() if entry["operation"] == operation]

    def apart(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        return entry["kind"] != problem.kind, entry["gpu"] != gpu, _distance(entry, problem)

    for entry in sorted(entries, key=apart):
        times = {
            name: time
            for name, time in entry["microseconds"].items()
            if name in PLANS[operation] and can(PLANS[operation][name], problem.degrees, kinds)
        }
        if times:
            return str(entry["plan"]) if entry["plan"] in times else min(times, key=lambda name: times[name])
    return "library-16"


def _distance(entry: dict[str, Any], problem: Problem) -> float:
    """How far a measured size is from this one, in factors of each of its numbers."""
    return sum(math.log(entry[name] / max(wanted, 1)) ** 2 for name, wanted in problem.sizes.items())


@functools.cache
def measured() -> tuple[dict[str, Any], ...]:
    """What won where, {gpu, operation, kind, plan, rows, inputs, outputs, degrees, microseconds} each, the user's
    own first.

    The microseconds are those of all plans that were tried.
    """
    return tuple(entry for path in (_own_file(), SHIPPED) for entry in _read(path))


def remember(gpu: str, operation: str, problem: Problem, plan: str, seconds: dict[str, float]) -> None:
    """Keeps a measurement, and the times it rests on, in the user's own file, in place of one of the same size."""
    same = {"gpu": gpu, "operation": operation, "kind": problem.kind, **problem.sizes}
    new = {**same, "plan": plan, "microseconds": {name: round(each * 1e6, 1) for name, each in seconds.items()}}
    others = [entry for entry in _read(_own_file()) if {name: entry.get(name) for name in same} != same]
    _own_file().parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(entry) for entry in [*others, new])
    write_file(_own_file(), f"[\n{text}\n]\n".encode())
    measured.cache_clear()
    _chosen.cache_clear()


def _own_file() -> Path:
    return cache_folder() / "plans.json"


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file whose plans there still are; none where there is no file. DeviceError for a damaged one."""
    if not path.is_file():
        return []
    sizes = Problem(1, 1, 1, 1).sizes
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not all(
            entry["gpu"] and entry["microseconds"] and min(entry[size] for size in sizes) > 0 for entry in entries
        ):
            raise ValueError("an entry is not complete")
        known = [entry for entry in entries if entry["plan"] in PLANS.get(entry["operation"], {})]
        return [{"kind": "polynomial", **entry} for entry in known]  # as all were, when none was said
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeviceError(f"{path} is damaged ({error}); delete it, and tune again if you did") from error
