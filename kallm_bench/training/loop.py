"""The training loop: equal data in equal order for every arm, and nothing lost when it is stopped.

A step is a pure function of the seed and its number: which rows it sees, its learning rate, its random draws. So what
has to be saved is the learning parameters, the optimiser's two moments, and how many steps are done; a run that was
stopped anywhere ends, on a CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.files import new_folder
from kallm_bench.interrupts import StopRequest, deferred_stop
from kallm_bench.progress import Watch, nobody
from kallm_bench.training.checks import agrees_with_model, keeps_documents_apart
from kallm_bench.training.data import Rows
from kallm_bench.training.forward import Batch, Forward
from kallm_bench.training.scope import apply_scope

SAVE_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what training does.

    Args:
        data, heldout: see data.prepare; heldout None holds out a part of `data`.
        tokens: how many are seen, rounded down to whole steps; 0 trains nothing and measures the held-out loss alone.
        row_length: tokens in a packed row.
        rows_per_step: rows whose gradients make one step, however many go through the model at once.
        scope: a key of scope.SCOPES.
        tail_from: first block of the tail; None for the first replaced one.
        learning_rate: its peak; it warms up linearly and falls as a cosine to a tenth.
        warmup: share of the steps.
        weight_decay, clip_norm: AdamW's decay, and the largest norm of a step's gradient.
        heldout_rows: how many held-out rows are scored, at most.
        seed: permutes the rows.

    Raises:
        TrainingError: a value out of its range.
    """

    data: str = "bundled"
    heldout: str | None = None
    tokens: int = 1_000_000
    row_length: int = 1024
    rows_per_step: int = 32
    scope: str = "tail"
    tail_from: int | None = None
    learning_rate: float = 4e-4
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    heldout_rows: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"tokens": 0, "row_length": 2, "rows_per_step": 1, "heldout_rows": 1}.items():
            if getattr(self, name) < least:
                raise TrainingError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed < 0 or (self.tail_from or 0) < 0:
            raise TrainingError(f"seed and tail_from must be at least 0, got {self.seed} and {self.tail_from}")
        for name, (low, high) in {"learning_rate": (0, 1e3), "clip_norm": (0, math.inf)}.items():
            if not low < getattr(self, name) < high:
                raise TrainingError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if not (0 <= self.warmup <= 1 and 0 <= self.weight_decay < math.inf):
            raise TrainingError(
                f"warmup is a share from 0 to 1 and weight_decay at least 0, got {self.warmup} and {self.weight_decay}"
            )
        if 0 < self.tokens < self.rows_per_step * self.row_length:
            raise TrainingError(
                f"{self.tokens} tokens do not fill one step of {self.rows_per_step} rows of {self.row_length}: "
                "take more tokens, or fewer or shorter rows"
            )

    @property
    def steps(self) -> int:
        return self.tokens // (self.rows_per_step * self.row_length)


@dataclass(frozen=True)
class TrainResult:
    """What training did: the mean loss of every step, and the held-out loss before and after, in nats a token."""

    losses: tuple[float, ...]
    heldout_before: float
    heldout_after: float
    heldout_tokens: int
    trainable_parameters: int


def train(
    model: PreTrainedModel,
    rows: Rows,
    heldout: Rows,
    settings: TrainSettings,
    state_folder: Path,
    *,
    autocast: torch.dtype | None = None,
    batch_rows: int = 4,
    fast: bool = False,
    cache: Path | None = None,
    watch: Watch = nobody,
) -> TrainResult:
    """Trains `model` in place, from where `state_folder` says an earlier run was stopped.

    Args:
        rows, heldout: what data.prepare returned.
        state_folder: where the state is kept while it runs; removed by the caller when the result is safe.
        autocast: dtype of the products, the parameters staying as they are; None computes in the model's own.
        batch_rows: rows that go through the model at once; changes memory and rounding, not the result.
        fast: see Forward; it changes time and rounding, not the result.
        cache: folder in which to keep what frozen blocks give, for other runs that begin with them.

    Raises:
        Interrupted: a signal came; the state after the step it came in is saved.
        TrainingError: too little data for one pass, a loss that is not finite (the last good state is kept), an
            architecture whose decoder and head cannot be run apart, or a scope that cannot be.
        DiskError: the state could not be saved; the last one is intact.
    """
    steps = settings.steps
    if steps * settings.rows_per_step > len(rows):
        raise TrainingError(
            f"{rows.source} fills {len(rows)} rows of {settings.row_length} tokens, {steps} steps need "
            f"{steps * settings.rows_per_step}; take at most {len(rows) * settings.row_length} tokens"
        )
    device = model.device
    if not agrees_with_model(model, rows.batch([0], device)["input_ids"][:, :8]):
        raise TrainingError(f"{type(model).__name__} does more between its decoder and its logits than is known here")
    if not keeps_documents_apart(model, rows.batch([0], device)["input_ids"][:, :16]):
        raise TrainingError(f"{type(model).__name__} lets documents packed into one row see each other")
    if not steps:
        with Forward(model, autocast=autocast) as forward:
            loss, count = heldout_loss(forward, heldout, settings.heldout_rows, batch_rows, watch)
        return TrainResult((), loss, _finite(loss), count, 0)
    learning = apply_scope(model, settings.scope, settings.tail_from)
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    state = _State(model, learning, settings, state_folder)
    state.load(watch)
    with Forward(model, autocast=autocast, fast=fast) as forward:
        forward.keep(cache, (rows, heldout))
        if state.heldout_before is None:
            state.heldout_before = heldout_loss(forward, heldout, settings.heldout_rows, batch_rows, watch)[0]
        forward.train(True)
        _run(forward, rows, order, state, batch_rows, watch)
        state.save()  # what follows may be stopped too
        forward.train(False)
        after, tokens = heldout_loss(forward, heldout, settings.heldout_rows, batch_rows, watch)
    count = sum(parameter.numel() for parameter in learning)
    return TrainResult(tuple(state.losses), state.heldout_before, _finite(after), tokens, count)


def _run(forward: Forward, rows: Rows, order: np.ndarray, state: _State, batch_rows: int, watch: Watch) -> None:
    """All steps from where `state` stands."""
    settings, steps = state.settings, state.settings.steps
    last_save = time.monotonic()

    def stopping() -> None:
        watch("stopping; Ctrl-C again stops at once", state.step, steps)

    with deferred_stop(stopping) as stop:
        while state.step < steps:
            first = state.step * settings.rows_per_step
            numbers = order[first : first + settings.rows_per_step]
            following = order[first + settings.rows_per_step :][:batch_rows] if state.step + 1 < steps else numbers[:0]
            mean = _step(forward, rows, numbers, following, state, batch_rows, stop)
            if mean is None:
                state.save()
                raise Interrupted(stop.number, f"training stands at step {state.step} of {steps}")
            if not math.isfinite(mean):
                if state.step:
                    state.save()
                raise TrainingError(
                    f"the loss of step {state.step + 1} is {mean}; the state before it is kept. A lower learning rate "
                    f"than {settings.learning_rate:g} may help"
                )
            state.advance(mean)
            watch("training", state.step, steps, f"loss {mean:.3f}")
            if stop or time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                state.save()
                last_save = time.monotonic()
            if stop:
                raise Interrupted(stop.number, f"training stands at step {state.step} of {steps}")


def _finite(heldout_loss: float) -> float:
    if not math.isfinite(heldout_loss):
        raise TrainingError(f"the held-out loss is {heldout_loss}: the model has diverged; train with a lower rate")
    return heldout_loss


class _State:
    """What a stopped run needs to go on, in memory and on disk."""

    def __init__(
        self, model: PreTrainedModel, learning: list[nn.Parameter], settings: TrainSettings, folder: Path
    ) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parameters = {names[id(parameter)]: parameter for parameter in learning}
        self.settings = settings
        self.folder = folder
        self.optimiser = torch.optim.AdamW(
            learning, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=model.device.type == "cuda"
        )
        self.step = 0
        self.losses: list[float] = []
        self.heldout_before: float | None = None

    def set_rate(self) -> None:
        """The learning rate of the step to come: linear warm-up, then a cosine down to a tenth."""
        steps, warmup = self.settings.steps, max(1, round(self.settings.warmup * self.settings.steps))
        if self.step < warmup:
            share = (self.step + 1) / warmup
        else:
            share = 0.55 + 0.45 * math.cos(math.pi * (self.step - warmup) / max(1, steps - warmup))
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * share

    def advance(self, loss: float) -> None:
        self.step += 1
        self.losses.append(loss)

    def save(self) -> None:
        """Writes the state beside the last one, then removes that. At any moment one whole state stands on the disk."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"value.{name}"] = parameter.detach().contiguous()
            for moment, tensor in self.optimiser.state[parameter].items():
                tensors[f"{moment}.{name}"] = tensor.contiguous()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with new_folder(self.folder / f"step-{self.step:08d}", replace=True, needed_bytes=size) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            note = {"step": self.step, "losses": self.losses, "heldout_before": self.heldout_before}
            (temporary / "state.json").write_text(json.dumps(note), encoding="utf-8")
        for path in self.folder.iterdir():  # older states, and what a killed run left half-written
            if path.name != f"step-{self.step:08d}" and path.is_dir():
                shutil.rmtree(path)

    def load(self, watch: Watch) -> None:
        """Takes up the newest state on disk, if there is one that can be read."""
        for saved in sorted((path for path in self.folder.glob("step-*") if path.is_dir()), reverse=True):
            try:
                note = json.loads((saved / "state.json").read_text(encoding="utf-8"))
                tensors = load_file(saved / "state.safetensors")
                values = {name: tensors[f"value.{name}"] for name in self.parameters}
                step, losses, before = int(note["step"]), list(note["losses"]), note["heldout_before"]
                if len(losses) != step or any(values[name].shape != p.shape for name, p in self.parameters.items()):
                    raise ValueError("it is of another run")
            except (OSError, ValueError, KeyError, TypeError, SafetensorError):
                watch(f"damaged, left aside: {saved}", 0, 0)
                continue
            self.step, self.losses, self.heldout_before = step, losses, before
            self._take(tensors)
            return

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"value.{name}"])
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                if f"{moment}.{name}" in tensors:
                    fused = self.optimiser.defaults["fused"]
                    device = "cpu" if moment == "step" and not fused else parameter.device  # where AdamW keeps each
                    self.optimiser.state[parameter][moment] = tensors[f"{moment}.{name}"].to(device)


def _step(
    forward: Forward,
    rows: Rows,
    numbers: np.ndarray,
    following: np.ndarray,
    state: _State,
    batch_rows: int,
    stop: StopRequest,
) -> float | None:
    """One optimiser step on the rows of these numbers; returns their mean loss before it.

    The gradient is that of the mean over all loss-bearing tokens of the step, whatever `batch_rows`. None, with nothing
    changed, where `stop` came between two batches. `following` are the rows to get ready meanwhile.
    """
    state.set_rate()
    torch.manual_seed(state.settings.seed * 1_000_003 + state.step)  # dropout, in models that have it
    bearing = [batch for batch in _batches(forward, rows, numbers, batch_rows) if len(batch.targets)]
    if len(following):
        forward.prefetch(rows, np.sort(following))
    if not bearing:  # short rows may hold nobody's answer; the step then changes nothing
        return state.losses[-1] if state.losses else 0.0
    count = sum(len(batch.targets) for batch in bearing)
    losses = []
    for batch in bearing:
        if stop:
            state.optimiser.zero_grad()
            return None
        loss, _ = forward.loss_sum(batch)
        torch.autograd.backward(loss / count)
        losses.append(loss.detach())
    mean = float(sum(losses)) / count
    if math.isfinite(mean):
        torch.nn.utils.clip_grad_norm_(state.parameters.values(), state.settings.clip_norm)
        state.optimiser.step()
    state.optimiser.zero_grad()
    return mean


@torch.no_grad()
def heldout_loss(
    forward: Forward, heldout: Rows, most: int, batch_rows: int, watch: Watch = nobody
) -> tuple[float, int]:
    """Mean loss over the first `most` held-out rows, and over how many tokens.

    Raises:
        TrainingError: none of those tokens bears loss.
    """
    numbers = np.arange(min(most, len(heldout)))
    total, count = 0.0, 0
    for done, batch in enumerate(_batches(forward, heldout, numbers, batch_rows), 1):
        loss, tokens = forward.loss_sum(batch)
        total, count = total + float(loss), count + tokens
        watch("held-out loss", min(done * batch_rows, len(numbers)), len(numbers))
    if count == 0:
        raise TrainingError(f"{heldout.source}: no token of the held-out rows is the assistant's, so none bears loss")
    return total / count, count


def _batches(forward: Forward, rows: Rows, numbers: np.ndarray, batch_rows: int) -> Iterator[Batch]:
    for start in range(0, len(numbers), batch_rows):
        yield forward.batch(rows, np.sort(numbers[start : start + batch_rows]), batch_rows)
