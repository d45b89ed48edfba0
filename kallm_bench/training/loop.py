"""The training loop: equal data in equal order for every arm, and nothing lost when it is stopped.

A step sums the gradients of its rows, batch after batch and process after process, divides by the number of tokens that
bear loss, and moves what learns once. How many rows go through at once, and on how many processes, changes memory, time
and rounding, not the result. What a stopped run needs to go on is in state.py.
"""

from __future__ import annotations

import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.interrupts import StopRequest, deferred_stop
from kallm_bench.progress import Watch, nobody
from kallm_bench.training.data import IGNORE, Rows
from kallm_bench.training.fit import Fit
from kallm_bench.training.loss import agrees_with_model, keeps_documents_apart, loss_sum
from kallm_bench.training.optimiser import make_optimiser, set_rate
from kallm_bench.training.processes import ALONE, Processes, heard
from kallm_bench.training.scope import apply_scope
from kallm_bench.training.settings import TrainSettings
from kallm_bench.training.sharding import clip, gradient_norm, is_sharded, shard
from kallm_bench.training.state import State

SAVE_EVERY_SECONDS = 60.0
"""A state is saved that often,"""

SAVE_SHARE = 0.05
"""or less often, so that saving takes no more than this share of the time."""


class Forward:
    """How a batch of Rows.batch goes through a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def loss_sum(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Summed cross-entropy, and the number of positions it is summed over."""
        return loss_sum(self.model, batch)

    def objective(self, batch: dict[str, Tensor]) -> Tensor:
        """What a step makes smaller, as a sum over positions: the cross-entropy; a teacher's loss is added here."""
        return self.loss_sum(batch)[0]


class Curriculum(Protocol):
    """What changes in the model as training goes, by the number of the step alone."""

    def set(self, step: int) -> None:
        """Makes the model what it shall be in step number `step`, from 0."""

    def finish(self) -> None:
        """Makes the model what it shall be for good."""


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
    watch: Watch = nobody,
    resume: bool = True,
    curriculum: Curriculum | None = None,
    processes: Processes = ALONE,
    sharded: bool = False,
) -> TrainResult:
    """Trains `model` in place, from where `state_folder` says an earlier run was stopped.

    Args:
        rows, heldout: what data.prepare returned.
        state_folder: where the state is kept while it runs; removed by the caller when the result is safe.
        autocast: dtype of the products, the parameters staying as they are; None computes in the model's own. float16
            scales the loss, and leaves a step out where its gradient is too large for float16.
        batch_rows: rows that go through the model at once; halved where memory runs out.
        resume: whether a state that is there is taken up; else it is removed.
        curriculum: told of every step before it is done.
        processes: who else runs this call, with the same arguments.
        sharded: whether the blocks' weights are split over the processes; `model` then lies on the CPU.

    Raises:
        Interrupted: a signal came; the state after the step it came in is saved.
        TrainingError: too little data for one pass, a loss or gradient that is not finite (the last good state is
            kept), no memory for one row, another process that has ended, an architecture whose decoder and head cannot
            be run apart, or a scope that cannot be.
        DiskError: the state could not be saved; the last one is intact.
    """
    steps = settings.steps
    if steps * settings.rows_per_step > len(rows):
        raise TrainingError(
            f"{rows.source} fills {len(rows)} rows of {settings.row_length} tokens, {steps} steps need "
            f"{steps * settings.rows_per_step}; take at most {len(rows) * settings.row_length} tokens"
        )
    if sharded and autocast == torch.float16:
        raise TrainingError("split weights and float16 do not go together; take --dtype bfloat16 or float32")
    if steps:
        apply_scope(model, settings.scope, settings.tail_from)
    if sharded:
        shard(model, processes)
    device = model.device
    if not agrees_with_model(model, rows.batch([0], device)["input_ids"][:, :8]):
        raise TrainingError(f"{type(model).__name__} does more between its decoder and its logits than is known here")
    precision = torch.autocast(device.type, autocast) if autocast else nullcontext()
    if not keeps_documents_apart(model, rows.batch([0], device)["input_ids"][:, :16]):
        raise TrainingError(f"{type(model).__name__} lets documents packed into one row see each other")

    forward = Forward(model)
    fit = Fit(batch_rows, watch, fixed=sharded)

    def measure() -> tuple[float, int]:
        return heldout_loss(forward, heldout, settings.heldout_rows, precision, fit, watch, processes)

    if not steps:
        loss, count = measure()
        return TrainResult((), loss, _finite(loss), count, 0)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = make_optimiser(model, learning, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
    state = State(learning, optimiser, scaler, state_folder, processes, fit)
    if not resume:
        state.discard()
    elif state.load(watch):
        watch(f"goes on from step {state.step} of {steps}, saved in {state_folder}", 0, 0)
    if state.heldout_before is None:
        state.heldout_before = measure()[0]

    stepper = _Stepper(forward, rows, settings, precision, state)
    order = np.random.default_rng(settings.seed).permutation(len(rows))
    model.train()
    saved_at, interval = time.monotonic(), SAVE_EVERY_SECONDS

    def stopping() -> None:
        watch("stopping; Ctrl-C again stops at once", state.step, steps)

    with deferred_stop(stopping) as stop:
        while state.step < steps:
            if curriculum:
                curriculum.set(state.step)
            numbers = order[state.step * settings.rows_per_step : (state.step + 1) * settings.rows_per_step]
            step = stepper.take(numbers, stop, due=time.monotonic() - saved_at > interval)
            if step.trouble:
                if state.step:
                    state.save()
                raise TrainingError(step.trouble)
            if step.loss is not None:
                state.advance(step.loss)
                watch("training", state.step, steps, f"loss {step.loss:.3f}")
            if step.stopped_by or step.due:
                began = time.monotonic()
                state.save()
                saved_at = time.monotonic()
                interval = max(SAVE_EVERY_SECONDS, (saved_at - began) / SAVE_SHARE)
            if step.stopped_by:
                raise Interrupted(step.stopped_by, f"training stands at step {state.step} of {steps}")
        state.save()  # what follows may be stopped too
        if number := _agreed(stop, processes, device):
            raise Interrupted(number, f"training stands at step {steps} of {steps}")
    if curriculum:
        curriculum.finish()
    model.eval()
    after, tokens = measure()
    count = sum(parameter.numel() for parameter in learning.values())
    return TrainResult(tuple(state.losses), state.heldout_before, _finite(after), tokens, count)


def _finite(heldout_loss: float) -> float:
    if not math.isfinite(heldout_loss):
        raise TrainingError(f"the held-out loss is {heldout_loss}: the model has diverged; train with a lower rate")
    return heldout_loss


@dataclass(frozen=True)
class _Step:
    """What became of a step, the same on every process.

    Args:
        loss: the mean loss before it; None where it was left, with nothing changed.
        stopped_by: the signal that asked some process to stop; 0 where none did.
        due: whether the state shall be saved now.
        trouble: why training cannot go on; empty where it can. Then nothing was changed.
    """

    loss: float | None
    stopped_by: int = 0
    due: bool = False
    trouble: str = ""


@dataclass(frozen=True)
class _Stepper:
    """Takes steps."""

    forward: Forward
    rows: Rows
    settings: TrainSettings
    precision: AbstractContextManager[None]
    state: State

    def take(self, numbers: np.ndarray, stop: StopRequest, due: bool) -> _Step:
        """One optimiser step on the rows of these numbers.

        The gradient is that of the mean over all loss-bearing tokens of the step. It is left, with nothing changed,
        where `stop` comes between two batches.
        """
        state, processes = self.state, self.state.processes
        parameters, device = list(state.learning.values()), self.forward.model.device
        set_rate(state.optimiser, self.settings, state.step)
        count = int((self.rows.batch(numbers)["targets"] != IGNORE).sum())
        if count == 0:  # short rows may hold nobody's answer; the step then changes nothing
            return _Step(state.losses[-1] if state.losses else 0.0)
        with heard():
            loss, left = state.fit.within(lambda: self._backward(numbers, count, stop))

        own = [left, *_signals(stop), due and processes.first, *(each.grad is not None for each in parameters)]
        told = torch.cat([loss.reshape(1), torch.tensor(own, dtype=torch.float64, device=device)])
        processes.sum([told])
        total, some_left, interrupts, terminations, is_due, *learns = told.tolist()
        stopped_by = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
        if some_left:
            state.optimiser.zero_grad()
            return _Step(None, stopped_by)
        mean = total / count
        trouble = "" if math.isfinite(mean) else self._trouble(f"loss of step {state.step + 1} is {mean}")
        if not trouble:
            for parameter, somewhere in zip(parameters, learns, strict=True):
                if somewhere and parameter.grad is None:  # a part of the model that this process's rows did not reach
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            processes.sum([each for each in gradients if not is_sharded(each)])
            trouble = self._move()
        state.optimiser.zero_grad()
        if trouble:
            return _Step(None, trouble=trouble)
        return _Step(mean, stopped_by, bool(is_due))

    def _backward(self, numbers: np.ndarray, count: int, stop: StopRequest) -> tuple[Tensor, bool]:
        """Leaves this process's part of the gradient in the parameters; returns its loss, and whether it was left."""
        state, model = self.state, self.forward.model
        together = state.fit.fixed  # with split weights no process can run a block without the others
        state.optimiser.zero_grad()
        draw = (self.settings.seed * 1_000_003 + state.step) * state.processes.count + state.processes.number
        set_seed(draw % SEEDS)  # dropout, in models that have it
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for batch, weight in _batches(self.rows, numbers, state.fit, state.processes, together):
            if stop and not together:
                return total, True
            with self.precision:
                loss = self.forward.objective({name: tensor.to(model.device) for name, tensor in batch.items()})
            torch.autograd.backward(state.scaler.scale(loss * (weight / count)))
            total += weight * loss.detach()
        return total, False

    def _move(self) -> str:
        """Clips the gradient and moves what learns by it; what is wrong with it, if something is."""
        state = self.state
        parameters = list(state.learning.values())
        state.scaler.unscale_(state.optimiser)
        norm = gradient_norm([each.grad for each in parameters if each.grad is not None], state.processes)
        if not state.scaler.is_enabled() and not math.isfinite(float(norm)):
            return self._trouble(f"gradient of step {state.step + 1} is {float(norm)}")
        clip(parameters, self.settings.clip_norm, norm)
        state.scaler.step(state.optimiser)
        state.scaler.update()
        if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
            return (
                f"the gradient of step {state.step + 1} is too large for float16, even unscaled; the state before it "
                "is kept. Take --dtype bfloat16 or float32"
            )
        return ""

    def _trouble(self, what: str) -> str:
        rate = self.settings.learning_rate
        return f"the {what}; the state before it is kept. A lower learning rate than {rate:g} may help"


SEEDS = 2**32
"""How many NumPy takes."""


def _batches(
    rows: Rows, numbers: np.ndarray, fit: Fit, processes: Processes, together: bool
) -> list[tuple[dict[str, Tensor], float]]:
    """This process's part of these rows, as batches on the CPU, each with the weight of its loss.

    Batches in which nothing bears loss are left out; but where all processes have to run `together`, every one gets
    equally many, and those that count for nothing have a weight of 0.
    """
    own = processes.share(numbers)
    batches = [rows.batch(np.sort(own[start : start + fit.rows])) for start in range(0, len(own), fit.rows)]
    if not together:
        return [(batch, 1.0) for batch in batches if (batch["targets"] != IGNORE).any()]
    most = math.ceil(math.ceil(len(numbers) / processes.count) / fit.rows)
    batches += [rows.batch(numbers[:1]) for _ in range(most - len(batches))]
    weights = [1.0] * most
    for place, batch in enumerate(batches):
        if place * fit.rows >= len(own) or not (batch["targets"] != IGNORE).any():
            batch["targets"][0, 0] = batch["input_ids"][0, 0]  # a loss there has to be, for all to run backward
            weights[place] = 0.0
    return list(zip(batches, weights, strict=True))


def _signals(stop: StopRequest) -> tuple[bool, bool]:
    return stop.number == signal.SIGINT, stop.number == signal.SIGTERM


def _agreed(stop: StopRequest, processes: Processes, device: torch.device) -> int:
    """The signal that has asked some process to stop; 0 where none has."""
    told = torch.tensor(_signals(stop), dtype=torch.float64, device=device)
    processes.sum([told])
    interrupts, terminations = told.tolist()
    return signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0


@torch.no_grad()
def heldout_loss(
    forward: Forward,
    heldout: Rows,
    most: int,
    precision: AbstractContextManager[None],
    fit: Fit,
    watch: Watch = nobody,
    processes: Processes = ALONE,
) -> tuple[float, int]:
    """Mean loss over the first `most` held-out rows, and over how many tokens.

    Raises:
        TrainingError: none of those tokens bears loss.
    """
    numbers = np.arange(min(most, len(heldout)))
    device = forward.model.device

    def measure() -> Tensor:
        told = torch.zeros(2, dtype=torch.float64, device=device)
        batches = _batches(heldout, numbers, fit, processes, together=fit.fixed)
        for done, (batch, weight) in enumerate(batches, 1):
            with precision:
                loss, count = forward.loss_sum({name: tensor.to(device) for name, tensor in batch.items()})
            told += weight * torch.stack([loss.double(), loss.new_tensor(count, dtype=torch.float64)])
            watch("held-out loss", done, len(batches))
        return told

    with heard():
        told = fit.within(measure)
    processes.sum([told])
    total, count = told.tolist()
    if count == 0:
        raise TrainingError(f"{heldout.source}: no token of the held-out rows is the assistant's, so none bears loss")
    return total / count, int(count)
