"""What a stopped run needs to go on: beside the last state, whole or not at all, as safetensors and JSON.

A step is a pure function of the seed and its number: which rows it sees, its learning rate, its random draws. So the
number of steps done stands for the position in the data and for the state of every random generator; what has to be
saved beside it is the learning parameters, AdamW's two moments and the loss scale of float16. Tensors are saved whole,
whatever processes hold parts of them, so that any other number of processes can go on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kallm_bench.files import new_folder
from kallm_bench.progress import Watch
from kallm_bench.training.fit import Fit
from kallm_bench.training.processes import Processes
from kallm_bench.training.sharding import is_sharded, placed_like, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Found(NamedTuple):
    """A state on disk: its note, its open safetensors file, and how often AdamW has moved each parameter it has."""

    note: dict[str, Any]
    tensors: Any
    counts: dict[str, float]


class State:
    """How far a run is, in memory and on disk. `save` and `load` have to be called by all processes.

    Args:
        learning: names -> parameters.
        folder: holds one folder "step-00000037" at a time, and for a moment two; the first process alone writes there.
            None saves nothing.

    Attributes:
        step, losses: steps done, and the mean loss of each.
        heldout_before: the held-out loss before the first step; None until it is known.
        heldout: the steps on the way after which the held-out loss was taken, and what it was.
    """

    def __init__(
        self,
        learning: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        folder: Path | None,
        processes: Processes,
        fit: Fit,
    ) -> None:
        self.learning = learning
        self.optimiser = optimiser
        self.scaler = scaler
        self.folder = folder
        self.processes = processes
        self.fit = fit
        self.step = 0
        self.losses: list[float] = []
        self.heldout_before: float | None = None
        self.heldout: list[tuple[int, float]] = []
        self._began, self._earlier = time.perf_counter(), 0.0
        self._on_disk: int | None = None

    def advance(self, loss: float) -> None:
        self.step += 1
        self.losses.append(loss)

    @property
    def seconds(self) -> float:
        """How long all of it has taken, without what was lost and done again."""
        return self._earlier + time.perf_counter() - self._began

    @property
    def newest_heldout(self) -> float | None:
        return self.heldout[-1][1] if self.heldout else self.heldout_before

    def save(self) -> None:
        """Writes the state beside the last one, then removes that. At any moment one whole state stands on the disk.

        Raises:
            DiskError: the disk refused; the last state is intact.
        """
        if self.folder is None or self._on_disk == self.step:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.learning.items():
            for what, tensor in {"value": parameter.detach(), **self.optimiser.state[parameter]}.items():
                entire = whole(tensor)
                if self.processes.first:
                    tensors[f"{what}.{name}"] = entire.contiguous().cpu()
        if self.processes.first:
            self._write(self.folder, tensors)
        self._on_disk = self.step

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        here = folder / f"step-{self.step:08d}"
        with new_folder(here, replace=True, needed_bytes=size) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            note = {
                "step": self.step,
                "losses": self.losses,
                "heldout_before": self.heldout_before,
                "heldout": self.heldout,
                "seconds": self.seconds,
                "scaler": self.scaler.state_dict(),
                "rows_at_once": [self.fit.asked, self.fit.rows],
            }
            (temporary / "state.json").write_text(json.dumps(note), encoding="utf-8")
        for path in folder.iterdir():  # older states, and what a killed run left half-written
            if path.name != here.name and path.is_dir():
                shutil.rmtree(path)

    def discard(self) -> None:
        """Removes what an earlier run has saved."""
        if self.folder and self.processes.first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def load(self, watch: Watch) -> bool:
        """Takes up the newest state on disk that can be read, if there is one; returns whether there was."""
        found = self._find(watch) if self.processes.first else None
        told = self.processes.tell(found and {"note": found.note, "counts": found.counts})
        if told is None:
            return False
        note = told["note"]
        self.step, self.losses, self.heldout_before = note["step"], note["losses"], note["heldout_before"]
        self.heldout = [(step, loss) for step, loss in note["heldout"]]
        self._earlier = note["seconds"]
        self._on_disk = self.step
        if note["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(note["scaler"])
        asked, fitted = note["rows_at_once"]
        if asked == self.fit.asked and not self.fit.fixed:
            self.fit.rows = fitted
        self._take(found.tensors if found else None, told["counts"])
        return True

    def _find(self, watch: Watch) -> _Found | None:
        there = self.folder.glob("step-*") if self.folder else ()
        for saved in sorted((path for path in there if path.is_dir()), reverse=True):
            try:
                note = json.loads((saved / "state.json").read_text(encoding="utf-8"))
                tensors: Any = safe_open(saved / "state.safetensors", framework="pt")
                shapes = {name: tensors.get_slice(f"value.{name}").get_shape() for name in self.learning}
                asked, fitted = note["rows_at_once"]
                if (
                    len(note["losses"]) != note["step"]
                    or any(shapes[name] != list(parameter.shape) for name, parameter in self.learning.items())
                    or not {"heldout_before", "heldout", "seconds", "scaler"} <= note.keys()
                    or not 1 <= int(fitted) <= int(asked)
                ):
                    raise ValueError("it is of another run")
                names = set(tensors.keys())
                counts = {
                    name: float(tensors.get_tensor(f"step.{name}")) for name in self.learning if f"step.{name}" in names
                }
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                watch(f"damaged, left aside: {saved}", 0, 0)
                continue
            return _Found(note, tensors, counts)
        return None

    @torch.no_grad()
    def _take(self, tensors: Any, counts: dict[str, float]) -> None:
        """Fills parameters and moments from the first process's open file; the others have none."""

        def read(name: str, like: Tensor) -> Tensor:
            values = tensors.get_tensor(name) if tensors else torch.empty(like.shape, dtype=like.dtype)
            values = placed_like(values, like)
            if not is_sharded(like):
                self.processes.spread(values)
            return values

        for name, parameter in self.learning.items():
            parameter.copy_(read(f"value.{name}", parameter.detach()))
            if name in counts:
                state = self.optimiser.state[parameter]
                for moment in MOMENTS:
                    state[moment] = read(f"{moment}.{name}", parameter.detach())
                where = parameter.device if self.optimiser.defaults["fused"] else "cpu"  # as AdamW keeps it
                state["step"] = torch.tensor(counts[name], dtype=torch.float32, device=where)
