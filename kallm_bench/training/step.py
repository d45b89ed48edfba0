"""One optimiser step: the gradient of all its rows, batch after batch and process after process, and one move by it.

The loss of a step is the mean over its tokens that bear loss. So how many rows go through at once, and on how many
processes, changes memory, time and rounding, not the result.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from kallm_bench.interrupts import StopRequest
from kallm_bench.training.data import Rows
from kallm_bench.training.fit import Fit
from kallm_bench.training.forward import Batch, Forward
from kallm_bench.training.optimiser import set_rate
from kallm_bench.training.processes import Processes, heard
from kallm_bench.training.settings import TrainSettings
from kallm_bench.training.sharding import clip, gradient_norm, is_sharded
from kallm_bench.training.state import State

SEEDS = 2**32
"""How many NumPy takes."""


@dataclass(frozen=True)
class Step:
    """What became of a step, the same on every process.

    Args:
        loss: the mean cross-entropy before it, the last one known where nothing in it bore loss; None where it was
            left, with nothing changed.
        idle: whether nothing in it bore loss, so that nothing was computed.
        stopped_by: the signal that asked some process to stop; 0 where none did.
        due: whether the state shall be saved now.
        trouble: why training cannot go on; empty where it can. Then nothing was changed.
    """

    loss: float | None
    stopped_by: int = 0
    due: bool = False
    trouble: str = ""
    idle: bool = False


@dataclass(frozen=True)
class Stepper:
    """Takes steps."""

    forward: Forward
    rows: Rows
    settings: TrainSettings
    state: State

    def take(self, numbers: np.ndarray, following: np.ndarray, stop: StopRequest, due: bool) -> Step:
        """One optimiser step on the rows of these numbers; those that follow are got ready meanwhile.

        The gradient is that of the mean over all loss-bearing tokens of the step. It is left, with nothing changed,
        where `stop` comes between two batches.
        """
        state, processes = self.state, self.state.processes
        parameters, device = list(state.learning.values()), self.forward.model.device
        set_rate(state.optimiser, self.settings, state.step)
        count = self.rows.bearing(numbers)
        if count == 0:  # short rows may hold nobody's answer; the step then changes nothing
            return Step(state.losses[-1] if state.losses else state.heldout_before, idle=True)
        with heard():
            loss, left = state.fit.within(lambda: self._backward(numbers, following, count, stop))

        own = [left, *signals(stop), due and processes.first, *(each.grad is not None for each in parameters)]
        told = torch.cat([loss.reshape(1), torch.tensor(own, dtype=torch.float64, device=device)])
        processes.sum([told])
        total, some_left, interrupts, terminations, is_due, *learns = told.tolist()
        stopped_by = signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0
        if some_left:
            state.optimiser.zero_grad()
            return Step(None, stopped_by)
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
            return Step(None, trouble=trouble)
        return Step(mean, stopped_by, bool(is_due))

    def _backward(
        self, numbers: np.ndarray, following: np.ndarray, count: int, stop: StopRequest
    ) -> tuple[Tensor, bool]:
        """Leaves this process's part of the gradient in the parameters; returns its loss, and whether it was left."""
        state, forward = self.state, self.forward
        together = state.fit.fixed  # with split weights no process can run a block without the others
        state.optimiser.zero_grad()
        draw = (self.settings.seed * 1_000_003 + state.step) * state.processes.count + state.processes.number
        set_seed(draw % SEEDS)  # dropout, in models that have it
        total = torch.zeros((), dtype=torch.float64, device=forward.model.device)
        state.scaler.scale(total)  # it has to be asked once, also where nothing of this process bears loss
        batches = batches_of(forward, self.rows, numbers, state.fit, state.processes)
        if len(own := state.processes.share(following)):
            height = min(state.fit.rows, len(own))
            forward.prefetch(self.rows, np.sort(own[:height]), height)
        for number, batch in enumerate(batches):
            if number:
                forward.keep_gradients(state.learning.values())
            if stop and not together:
                return total, True
            objective = forward.objective(batch)
            torch.autograd.backward(state.scaler.scale(objective.total / count))
            total += objective.cross_entropy
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


def batches_of(forward: Forward, rows: Rows, numbers: np.ndarray, fit: Fit, processes: Processes) -> list[Batch]:
    """This process's part of these rows.

    Batches in which nothing bears loss are left out; but where all processes have to run together, every one gets
    equally many, if need be of rows that bear no loss.
    """
    own = processes.share(numbers)
    starts = range(0, len(own), fit.rows)
    height = min(fit.rows, len(own))
    batches = [forward.batch(rows, np.sort(own[start : start + fit.rows]), height) for start in starts]
    if not fit.fixed:
        return [batch for batch in batches if len(batch.targets)]
    most = math.ceil(math.ceil(len(numbers) / processes.count) / fit.rows)
    return batches + [forward.batch(rows, numbers[:0], 1) for _ in range(most - len(batches))]


def signals(stop: StopRequest) -> tuple[bool, bool]:
    """Whether it was Ctrl-C, and whether it was SIGTERM."""
    return stop.number == signal.SIGINT, stop.number == signal.SIGTERM
