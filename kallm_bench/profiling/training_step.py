"""What a training step costs: as a tutorial would write it, as `kallm train` does it, and with the frozen part kept.

The plain loop has the model and what is frozen of it in the compute dtype, the model's own loss over all logits, and
documents that see each other where they lie in one row, which spares it the masks. Rows are like packed conversations:
documents of about 185 tokens, of which 30 % bear loss. MFU counts the FLOP that have to be, so what is computed for
nothing or left out does not raise it: forward once, and gradients where something learns.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kallm_bench.profiling.flops import limits_of, step_bytes, training_flops
from kallm_bench.profiling.memory import peak_memory, suppressed_lack
from kallm_bench.profiling.rig import OUT_OF_MEMORY, Measured, Rig
from kallm_bench.profiling.room import ADAM_BYTES, too_large
from kallm_bench.profiling.settings import ProfileSettings, Step
from kallm_bench.profiling.throughput import fractions
from kallm_bench.profiling.turns import alone
from kallm_bench.records import Metric
from kallm_bench.training import Forward, Rows, apply_scope, merge
from kallm_bench.training.data import FIRST, LEARN

WARM_STEPS = 4
"""Steps on a GPU before those that count: they compile, record, and fill the optimiser's state."""

DOCUMENT, BEARING = 185, 0.3
"""Tokens in a conversation, and the share of them that bears loss, in the chat data of the published experiment."""


def measure_training(
    models: Sequence[PreTrainedModel], settings: ProfileSettings, rig: Rig, autocast: torch.dtype | None = None
) -> list[list[Metric]]:
    """Throughput, peak memory, energy, MFU and fraction of the roofline of training steps, of models in turn.

    In each of the settings' ways, and in each of its scopes. Set up as training is: parameters in float32, products in
    `autocast`. Changes the models' scope and not their weights, since the rate is zero; but the plain way, which comes
    last, changes their dtype. What does not fit into memory is None, with the reason.
    """
    found: list[list[Metric]] = [[] for _ in models]
    for step in settings.steps:
        for mine, metrics in zip(found, _measure_step(models, step, settings, rig, autocast), strict=True):
            mine += metrics
    return found


def no_steps(settings: ProfileSettings, reason: str) -> list[Metric]:
    """What is told of steps that nobody tried."""
    return [Metric(f"train_tokens_per_second{step.part}", None, n=0, note=reason) for step in settings.steps]


@dataclass(frozen=True)
class _Job:
    """A model that takes steps, in its scope: what learns, and on which rows."""

    model: PreTrainedModel
    learning: list[nn.Parameter]
    rows: Rows
    autocast: torch.dtype | None
    settings: ProfileSettings

    def ready(self, way: str) -> AbstractContextManager[Callable[[], None]]:
        """Sets up; what is entered takes a step."""
        return STEPS[way](self.model, self.learning, self.rows, self.autocast, self.settings)

    def metrics(self, part: str, measured: Measured, peaks: Sequence[Metric], device: torch.device) -> list[Metric]:
        tokens = self.settings.batch * self.settings.length
        share = self.rows.bearing(range(len(self.rows))) / (len(self.rows) * self.rows.tokens.shape[1])
        flops = training_flops(self.model, share)
        found = [
            measured.metric(f"train_tokens_per_second{part}", lambda seconds: tokens / seconds),
            *peaks,
            Metric(f"train_flops_per_token{part}", flops),
            measured.joules_per_token(f"train_joules_per_token{part}", tokens),
        ]
        dtype = self.autocast or torch.float32
        return found + fractions(
            "train", part, measured, tokens * flops, step_bytes(self.model, dtype), limits_of(device, dtype)
        )


def _measure_step(
    models: Sequence[PreTrainedModel],
    step: Step,
    settings: ProfileSettings,
    rig: Rig,
    autocast: torch.dtype | None,
) -> list[list[Metric]]:
    jobs = [
        _Job(model, apply_scope(model, step.scope, settings.tail_from), _rows(model, settings), autocast, settings)
        for model in models
    ]
    try:
        learning = sum(parameter.numel() for job in jobs for parameter in job.learning)
        if reason := too_large(ADAM_BYTES * learning, rig.device):
            return [job.metrics(step.part, Measured(reason=reason), [], rig.device) for job in jobs]
        return _sampled(jobs, step, rig)
    finally:
        for model in models:
            model.zero_grad(set_to_none=True)
            merge(model, step.scope)


def _sampled(jobs: Sequence[_Job], step: Step, rig: Rig) -> list[list[Metric]]:
    """Steps of all models in turn; the peak memory of each is of steps that it takes alone."""
    warm_runs = WARM_STEPS if rig.device.type == "cuda" else 2
    name = f"training, {step.scope}, {step.way}"
    rig.watch(f"profile of {name}", 0, 1 + rig.repeats)  # setting up takes its time
    alone_peaks = [_peaks(jobs, number, step, rig, warm_runs) for number in range(len(jobs))] if len(jobs) > 1 else []
    measured = [Measured(reason=OUT_OF_MEMORY)] * len(jobs)
    with peak_memory(rig.device, rig.gpu, step.part) as peak, suppressed_lack(), ExitStack() as stack:
        works = [functools.partial(rig.clocked, stack.enter_context(job.ready(step.way))) for job in jobs]
        measured = rig.measure(name, works, warm_runs, runs=1)
    return [
        job.metrics(step.part, each, peaks if each.seconds else [], rig.device)
        for job, each, peaks in zip(jobs, measured, alone_peaks or [peak], strict=True)
    ]


def _peaks(jobs: Sequence[_Job], number: int, step: Step, rig: Rig, steps: int) -> list[Metric]:
    """Peak memory of some steps of one model, with the others elsewhere."""
    job = jobs[number]
    models = [each.model for each in jobs]
    with (
        alone(models, number),
        peak_memory(rig.device, rig.gpu, step.part) as peak,
        suppressed_lack(),
        job.ready(step.way) as take,
    ):
        for _ in range(steps):
            rig.clocked(take)
        if rig.gpu:
            rig.gpu.look()
    return peak


def _rows(model: PreTrainedModel, settings: ProfileSettings) -> Rows:
    """As many as the steps of one way see, the same each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = np.random.default_rng(0)
    shape = (settings.batch * (WARM_STEPS + settings.repeats), settings.length)
    learn, first = (generator.random(shape) < share for share in (BEARING, 1 / DOCUMENT))
    tokens = generator.integers(0, vocabulary, shape, dtype=np.uint32)
    return Rows(tokens, (LEARN * learn + FIRST * first).astype(np.uint8), "rows like chats", "drawn")


@contextmanager
def _ours(
    model: PreTrainedModel,
    learning: list[nn.Parameter],
    rows: Rows,
    autocast: torch.dtype | None,
    settings: ProfileSettings,
    kept: bool = False,
) -> Iterator[Callable[[], None]]:
    optimiser = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0, fused=model.device.type == "cuda" or None)
    with Forward(model, autocast=autocast, fast=True) as forward, tempfile.TemporaryDirectory() as folder:
        if kept and forward.keep(Path(folder), {rows: len(rows)}):
            for numbers in _batches(rows, settings):
                forward.fill(forward.batch(rows, numbers))
            forward.settle()
        forward.train(True)
        batches = itertools.cycle(_batches(rows, settings))
        following = next(batches)

        def step() -> None:
            nonlocal following
            batch = forward.batch(rows, following)
            following = next(batches)
            forward.prefetch(rows, following)
            loss, count = forward.loss_sum(batch)
            torch.autograd.backward(loss / count)
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            optimiser.zero_grad()

        yield step


@contextmanager
def _plain(
    model: PreTrainedModel,
    learning: list[nn.Parameter],
    rows: Rows,
    autocast: torch.dtype | None,
    settings: ProfileSettings,
) -> Iterator[Callable[[], None]]:
    model.to(autocast or torch.float32).train()
    optimiser = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0)
    batches = itertools.cycle(_batches(rows, settings))

    def step() -> None:
        batch = rows.batch(next(batches), model.device)
        labels = batch["targets"].roll(1, dims=1)  # the model's own loss shifts them back
        loss = model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    try:
        yield step
    finally:
        model.eval()


STEPS: dict[str, Callable[..., AbstractContextManager[Callable[[], None]]]] = {
    "ours": _ours,
    "kept": functools.partial(_ours, kept=True),
    "plain": _plain,
}
"""Of each of WAYS, in the order in which they are measured: the plain one changes the model's dtype."""


def _batches(rows: Rows, settings: ProfileSettings) -> Iterator[list[int]]:
    """All rows; first those with the most documents, then those with the fewest.

    What is compiled and recorded depends on how many there are, roughly, and belongs to the steps that do not count.
    """
    batches = [list(range(start, start + settings.batch)) for start in range(0, len(rows), settings.batch)]
    most, *others, fewest = sorted(batches, key=lambda batch: -np.count_nonzero(rows.flags[batch] & FIRST))
    yield from [most, fewest, *sorted(others)]
