"""What a training run cost, from the run itself: its speed, its arithmetic, how much of the GPU it used.

The median over steps leaves out what only some steps do: compile, measure the held-out loss, save. A run that was
resumed knows the speed of the steps it did itself, and says which.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from kallm_bench.profiling.flops import peak_flops, training_flops
from kallm_bench.records import Metric
from kallm_bench.training import Processes, Rows, TrainResult, TrainSettings

SAMPLES = 100
"""Of more steps than that, every second one's speed is kept, or every third ..."""

NO_CACHE = "nothing of frozen blocks is kept: without --prefix-cache, or with all of the model learning"

BEARING_ROWS = 512
"""How much of the head's work bears loss is counted on so many rows, evenly spread."""


def describe_run(
    model: PreTrainedModel,
    rows: Rows,
    settings: TrainSettings,
    result: TrainResult,
    dtype: torch.dtype,
    processes: Processes,
    surroundings: Sequence[str] = (),
) -> list[Metric]:
    """Speed, time, FLOP and MFU of a run of `settings.steps` steps that has just ended.

    Args:
        model: in the scope it was trained in.
        dtype: of the products.
        surroundings: what else went on meanwhile.
    """
    tokens = settings.rows_per_step * settings.row_length
    speeds = [tokens / seconds for seconds in result.step_seconds]
    first, last = result.first_step + 1, settings.steps
    note = f"of steps {first} to {last} alone, the run was resumed" if first > 1 else ""
    if not speeds:
        note = "every step that bore loss was done before the run was resumed"
    note = "; ".join([*([note] if note else []), *surroundings])
    speed = statistics.median(speeds) if speeds else None
    numbers = np.unique(np.linspace(0, len(rows) - 1, BEARING_ROWS, dtype=np.int64))
    bearing = rows.bearing(numbers) / (len(numbers) * settings.row_length)
    flops = training_flops(model, bearing)
    most = peak_flops(model.device, dtype)
    mfu, why = None, note
    if most is None:
        why = "the peak of this device is not known" if model.device.type == "cuda" else "a CPU's peak is not known"
    elif speed is not None:
        mfu = flops * speed / (most * processes.count)
    return [
        Metric("train_tokens_per_second", speed, n=len(speeds), samples=_thinned(speeds), note=note),
        _prefix_share(settings, result),
        Metric("train_seconds", result.seconds),
        Metric("train_flops_per_token", flops),
        Metric("bearing_share", bearing, n=len(numbers) * settings.row_length),
        Metric("train_mfu", mfu, n=len(speeds), note=why),
    ]


def _prefix_share(settings: TrainSettings, result: TrainResult) -> Metric:
    """What a speed depends on as much as on the model: what frozen blocks give may be computed, or read."""
    share, rows = result.prefix_cache_share, len(result.step_seconds) * settings.rows_per_step
    return Metric("prefix_cache_share", share, n=rows, note=NO_CACHE if share is None else "")


def heldout_curve(settings: TrainSettings, result: TrainResult) -> list[Metric]:
    """The held-out losses in order, where some were taken on the way."""
    if not result.heldout:
        return []
    losses = (result.heldout_before, *(loss for _, loss in result.heldout), result.heldout_after)
    steps = [0, *(step for step, _ in result.heldout), settings.steps]
    note = f"lowest after step {steps[losses.index(min(losses))]}; samples every {settings.heldout_interval} steps"
    return [Metric("heldout_curve", min(losses), n=len(losses), samples=losses, note=note)]


def _thinned(samples: list[float]) -> list[float]:
    return samples[:: -(-len(samples) // SAMPLES) or 1]
