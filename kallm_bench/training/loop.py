"""The training loop: equal data in equal order for every arm, and nothing lost when it is stopped.

What a step does is in step.py, how a batch goes through the model in forward.py, and what a stopped run needs to go on
in state.py.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.interrupts import StopRequest, deferred_stop
from kallm_bench.progress import Log, Watch, nobody, nowhere
from kallm_bench.training.checks import agrees_with_model, check_context, keeps_documents_apart
from kallm_bench.training.data import Rows
from kallm_bench.training.fit import Fit
from kallm_bench.training.forward import Forward
from kallm_bench.training.meter import Meter
from kallm_bench.training.optimiser import make_optimiser
from kallm_bench.training.processes import ALONE, Processes, heard
from kallm_bench.training.scope import apply_scope
from kallm_bench.training.settings import TrainSettings
from kallm_bench.training.sharding import shard
from kallm_bench.training.state import State
from kallm_bench.training.step import Stepper, batches_of, signals
from kallm_bench.training.teacher import Teacher

SAVE_EVERY_SECONDS = 60.0
"""A state is saved that often,"""

SAVE_SHARE = 0.05
"""or less often, so that saving takes no more than this share of the time."""


class Curriculum(Protocol):
    """What changes in the model as training goes, by the number of the step alone."""

    def set(self, step: int) -> None:
        """Makes the model what it shall be in step number `step`, from 0."""

    def finish(self) -> None:
        """Makes the model what it shall be for good."""


@dataclass(frozen=True)
class TrainResult:
    """What training did. Losses are in nats a token.

    Args:
        losses: the mean loss of every step.
        heldout_before, heldout_after, heldout_tokens: the held-out loss, and over how many tokens.
        heldout: (step, loss) of those taken on the way.
        first_step: number of the first step that this very run did: 0, unless it went on from a saved state.
        step_seconds: of the steps that it did, without those in which nothing bore loss.
        seconds: of all of it but loading.
        rows_at_once: how many went through the model at once, in the end.
        prefix_cache_share: of the rows of those very steps, those whose way through frozen blocks was read from the
            cache; None without one.
    """

    losses: tuple[float, ...]
    heldout_before: float
    heldout_after: float
    heldout_tokens: int
    trainable_parameters: int
    heldout: tuple[tuple[int, float], ...] = ()
    first_step: int = field(default=0, compare=False)
    step_seconds: tuple[float, ...] = field(default=(), compare=False)
    seconds: float = field(default=0.0, compare=False)
    rows_at_once: int = field(default=0, compare=False)
    prefix_cache_share: float | None = field(default=None, compare=False)


def train(
    model: PreTrainedModel,
    rows: Rows,
    heldout: Rows,
    settings: TrainSettings,
    state_folder: Path | None,
    *,
    autocast: torch.dtype | None = None,
    batch_rows: int = 4,
    watch: Watch = nobody,
    log: Log = nowhere,
    resume: bool = True,
    curriculum: Curriculum | None = None,
    teaching: Callable[[PreTrainedModel], Teacher] | None = None,
    processes: Processes = ALONE,
    sharded: bool = False,
    fast: bool = False,
    cache: Path | None = None,
) -> TrainResult:
    """Trains `model` in place, from where `state_folder` says an earlier run was stopped.

    Args:
        rows, heldout: what data.prepare returned.
        state_folder: where the state is kept while it runs; removed by the caller when the result is safe. None keeps
            none.
        autocast: dtype of the products, the parameters staying as they are; None computes in the model's own. float16
            scales the loss, and leaves a step out where its gradient is too large for float16.
        batch_rows: rows that go through the model at once; halved where memory runs out.
        log: given the figures of every step: loss, learning_rate, tokens_per_second; heldout_loss where it is taken.
        resume: whether a state that is there is taken up; else it is removed.
        curriculum: told of every step before it is done.
        teaching: makes the teacher of a model whose scope is known. The losses that are told are plain cross-entropy
            all the same.
        processes: who else runs this call, with the same arguments.
        sharded: whether the blocks' weights are split over the processes; `model` then lies on the CPU.
        fast: see Forward; it changes time and rounding, not the result.
        cache: folder in which to keep what frozen blocks give, for other runs that begin with them.

    Raises:
        Interrupted: a signal came; the state after the step it came in is saved.
        TrainingError: too little data for one pass, none that bears loss, rows longer than the model reads, a loss or
            gradient that is not finite (the last good state is kept), no memory for one row, another process that has
            ended, an architecture whose decoder and head cannot be run apart, a scope that cannot be, or split weights
            with a curriculum or a teacher.
        DiskError: the state could not be saved; the last one is intact.
    """
    steps = settings.steps
    check_rows(rows, settings)
    check_context(model.config, settings.row_length)
    if sharded and autocast == torch.float16:
        raise TrainingError("split weights and float16 do not go together; take --dtype bfloat16 or float32")
    if sharded and (curriculum or teaching):
        raise TrainingError(
            "split weights do not go together with a curriculum or a teacher, which need modules whole; leave --shard "
            "out, or train without them"
        )
    if steps:
        apply_scope(model, settings.scope, settings.tail_from, settings.lora, settings.seed)
    if sharded:
        shard(model, processes)
    device = model.device
    if not agrees_with_model(model, rows.batch([0], device)["input_ids"][:, :8]):
        raise TrainingError(
            f"{type(model).__name__} cannot be trained here: it does more between its decoder and its logits than is "
            "known here. Take another architecture, such as Llama, Qwen3 or GPT-2"
        )
    if rows.packed and not keeps_documents_apart(model, rows.batch([0], device)["input_ids"][:, :16]):
        instead = "give each a row of its own, by --no-packing, or packing = false in a suite's [train]"
        raise TrainingError(
            f"{type(model).__name__} lets documents that are packed into one row see each other: "
            + (instead if settings.task == "chat" else "take another architecture, such as Llama, Qwen3 or GPT-2")
        )
    fit = Fit(batch_rows, watch, fixed=sharded)
    with Forward(
        model,
        autocast=autocast,
        fast=fast and steps > 0,
        split=not sharded,
        changes=curriculum is not None,
        teacher=teaching(model) if teaching and steps else None,
    ) as forward:

        def measure() -> tuple[float, int]:
            return heldout_loss(forward, heldout, settings.heldout_rows, fit, watch, processes)

        if not steps:
            loss, count = measure()
            return TrainResult((), loss, _finite(loss), count, 0)
        fit.release = forward.release
        if kept := forward.keep(cache, {rows: steps * settings.rows_per_step, heldout: settings.heldout_rows}):
            watch(f"keeps what frozen blocks give in {cache}: {kept / 1e6:,.0f} MB when all rows are there", 0, 0)
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimiser = make_optimiser(model, learning, settings)
        scaler = torch.amp.GradScaler(device.type, enabled=autocast == torch.float16)
        state = State(learning, optimiser, scaler, state_folder, processes, fit)
        if not resume:
            state.discard()
        elif state.load(watch):
            watch(f"goes on from step {state.step} of {steps}, saved in {state_folder}", 0, 0)
        meter = Meter(state, settings, device, watch, log)
        if state.heldout_before is None:
            state.heldout_before = measure()[0]
            forward.settle()
            meter.measured(0, state.heldout_before)
        forward.train(True)
        first_step = state.step
        _run(Stepper(forward, rows, settings, state), heldout, curriculum, meter)
        read = forward.read_share(rows)
        if curriculum:
            curriculum.finish()
        forward.train(False)
        after, tokens = measure()
        meter.measured(steps, _finite(after))
    count = sum(parameter.numel() for parameter in learning.values())
    return TrainResult(
        tuple(state.losses), state.heldout_before, after, tokens, count, tuple(state.heldout),
        first_step, tuple(meter.seconds), state.seconds, fit.rows, read,
    )  # fmt: skip


def check_rows(rows: Rows, settings: TrainSettings) -> None:
    """Asks whether `rows` last for all steps, and whether there is something to learn. TrainingError if not."""
    steps, needed = settings.steps, settings.steps * settings.rows_per_step
    if needed > len(rows):
        raise TrainingError(
            f"{rows.source} fills {len(rows)} rows of {settings.row_length} tokens, {steps} steps need {needed}; "
            f"take at most {len(rows) * settings.row_length} tokens"
        )
    height = settings.rows_per_step
    if steps and not any(rows.bearing(np.arange(first, first + height)) for first in range(0, needed, height)):
        raise TrainingError(nothing_bears(rows, "training"))


def nothing_bears(rows: Rows, part: str) -> str:
    return (
        f"{rows.source}: no token of the {part} rows is the assistant's, so none bears loss; take more or "
        "longer rows, or conversations with messages of the role 'assistant'"
    )


def _run(stepper: Stepper, heldout: Rows, curriculum: Curriculum | None, meter: Meter) -> None:
    """All steps from where the state stands, which is saved now and then, and at the end."""
    state, settings = stepper.state, stepper.settings
    steps, height = settings.steps, settings.rows_per_step
    order = np.random.default_rng(settings.seed).permutation(steps * height)
    saved_at, interval = time.monotonic(), SAVE_EVERY_SECONDS

    def stopping() -> None:
        meter.watch("stopping; Ctrl-C again stops at once", state.step, steps)

    with deferred_stop(stopping) as stop:
        while state.step < steps:
            if curriculum:
                curriculum.set(state.step)
            _measure_if_due(stepper, heldout, stop, meter)
            now, then = (order[number * height : (number + 1) * height] for number in (state.step, state.step + 1))
            with meter.timed():
                step = stepper.take(now, then, stop, due=time.monotonic() - saved_at > interval)
            if step.trouble:
                if state.step:
                    state.save()
                raise TrainingError(step.trouble)
            if step.loss is not None:
                state.advance(step.loss)
                meter.stepped(state.optimiser.param_groups[0]["lr"], step.idle)
            if step.stopped_by or step.due:
                began = time.monotonic()
                state.save()
                stepper.forward.settle()
                saved_at = time.monotonic()
                interval = max(SAVE_EVERY_SECONDS, (saved_at - began) / SAVE_SHARE)
            if step.stopped_by:
                raise Interrupted(step.stopped_by, f"training stands at step {state.step} of {steps}")
        state.save()  # what follows may be stopped too
        if number := _agreed(stop, state.processes, stepper.forward.model.device):
            raise Interrupted(number, f"training stands at step {steps} of {steps}")


def _measure_if_due(stepper: Stepper, heldout: Rows, stop: StopRequest, meter: Meter) -> None:
    """Takes the held-out loss into the state where this step is one for it; not where `stop` comes meanwhile."""
    state, settings, forward = stepper.state, stepper.settings, stepper.forward
    interval = settings.heldout_interval
    if not interval or not state.step or state.step % interval or state.step in dict(state.heldout):
        return
    forward.train(False)
    loss, tokens = heldout_loss(
        forward, heldout, settings.heldout_rows, state.fit, meter.measuring, state.processes, stop
    )
    forward.train(True)
    if tokens:
        state.heldout.append((state.step, _finite(loss)))
        meter.measured(state.step, loss)


def _finite(heldout_loss: float) -> float:
    if not math.isfinite(heldout_loss):
        raise TrainingError(f"the held-out loss is {heldout_loss}: the model has diverged; train with a lower rate")
    return heldout_loss


def _agreed(stop: StopRequest, processes: Processes, device: torch.device) -> int:
    """The signal that has asked some process to stop; 0 where none has."""
    told = torch.tensor(signals(stop), dtype=torch.float64, device=device)
    processes.sum([told])
    interrupts, terminations = told.tolist()
    return signal.SIGTERM if terminations else signal.SIGINT if interrupts else 0


@torch.no_grad()
def heldout_loss(
    forward: Forward,
    heldout: Rows,
    most: int,
    fit: Fit,
    watch: Watch = nobody,
    processes: Processes = ALONE,
    stop: StopRequest | None = None,
) -> tuple[float, int]:
    """Mean loss over the first `most` held-out rows, and over how many tokens: 0 where `stop` came between two batches.

    Raises:
        TrainingError: none of those tokens bears loss.
    """
    numbers = np.arange(min(most, len(heldout)))

    def measure() -> Tensor:
        told = torch.zeros(3, dtype=torch.float64, device=forward.model.device)
        batches = batches_of(forward, heldout, numbers, fit, processes)
        for done, batch in enumerate(batches, 1):
            if stop and not fit.fixed:  # with split weights no process can run a block without the others
                told[2] = 1
                break
            loss, count = forward.loss_sum(batch)
            told[:2] += torch.stack([loss.double(), loss.new_tensor(count, dtype=torch.float64)])
            watch("held-out loss", done, len(batches))
        return told

    with heard():
        told = fit.within(measure)
    processes.sum([told])
    total, count, left = told.tolist()
    if left:
        return math.nan, 0
    if count == 0:
        raise TrainingError(nothing_bears(heldout, "held-out"))
    return total / count, int(count)
