"""What a training step costs: as a tutorial would write it, as `kallm train` does it, and with the frozen part kept.

The plain loop has the model and what is frozen of it in the compute dtype, the model's own loss over all logits, and
documents that see each other where they lie in one row, which spares it the masks. Rows are like packed conversations:
documents of about 185 tokens, of which 30 % bear loss. MFU counts the FLOP that have to be, so what is computed for
nothing or left out does not raise it: forward once, and gradients where something learns.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from kallm_bench.profiling.flops import peak_flops, training_flops
from kallm_bench.profiling.memory import peak_memory
from kallm_bench.profiling.throughput import ProfileSettings, timed
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Metric
from kallm_bench.training import Forward, Rows, apply_scope
from kallm_bench.training.data import FIRST, LEARN

WARM_STEPS = 4
"""Steps before those that count: they compile, record, and fill the optimiser's state. Each has rows of its own."""

DOCUMENT, BEARING = 185, 0.3
"""Tokens in a conversation, and the share of them that bears loss, in the chat data of the published experiment."""


def measure_training(
    model: PreTrainedModel, settings: ProfileSettings, autocast: torch.dtype | None = None, watch: Watch = nobody
) -> list[Metric]:
    """Throughput, peak memory and MFU of training steps, in each of the settings' ways.

    Set up as training is: parameters in float32, products in `autocast`. Changes the model's scope and not its weights,
    since the rate is zero; but the plain way, which comes last, changes their dtype.
    """
    learning = apply_scope(model, settings.scope, settings.tail_from)
    rows = _rows(model, settings)
    found = []
    for way in (each for each in STEPS if each in settings.ways):
        name = "" if way == "ours" else f"/{way}"
        with peak_memory(model.device) as peak, STEPS[way](model, learning, rows, autocast, settings) as step:
            for _ in range(WARM_STEPS - 1):
                step()
            tokens = settings.batch * settings.length
            metric = f"train_tokens_per_second{name}"
            found.append(timed(metric, tokens, step, model.device, settings.repeats, watch))
        found += [Metric(f"{each.name}{name}", each.value, note=each.note) for each in peak]
        found.append(_mfu(model, found[-len(peak) - 1], name, rows, autocast))
    return found


def _mfu(model: PreTrainedModel, speed: Metric, name: str, rows: Rows, autocast: torch.dtype | None) -> Metric:
    most = peak_flops(model.device, autocast or torch.float32)
    if most is None:
        return Metric(f"train_mfu{name}", None, note="no data sheet is known of this device")
    share = rows.bearing(range(len(rows))) / (len(rows) * rows.tokens.shape[1])
    assert speed.value is not None
    return Metric(f"train_mfu{name}", speed.value * training_flops(model, share) / most)


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
        batches = _batches(rows, settings)
        following = next(batches)

        def step() -> None:
            nonlocal following
            batch = forward.batch(rows, following)
            following = next(batches, following)
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
    batches = _batches(rows, settings)

    def step() -> None:
        batch = rows.batch(next(batches), model.device)
        labels = batch["targets"].roll(1, dims=1)  # the model's own loss shifts them back
        loss = model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    yield step
    model.eval()


STEPS: dict[str, Callable[..., AbstractContextManager[Callable[[], None]]]] = {
    "ours": _ours,
    "kept": functools.partial(_ours, kept=True),
    "plain": _plain,
}
"""Of each of WAYS, in the order in which they are measured: the plain one changes the model's dtype."""


def _batches(rows: Rows, settings: ProfileSettings) -> Iterator[list[int]]:
    for start in range(0, len(rows), settings.batch):
        yield list(range(start, start + settings.batch))
