"""AdamW over what learns, and the rate of each step as a pure function of its number."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kallm_bench.kan.bases import Basis
from kallm_bench.models import replaced_modules
from kallm_bench.training.settings import TrainSettings


def make_optimiser(
    model: PreTrainedModel, learning: Mapping[str, nn.Parameter], settings: TrainSettings
) -> torch.optim.AdamW:
    """AdamW with a group for each combination of rate and decay; `group["peak"]` is the group's peak rate.

    Args:
        learning: names in `model` -> parameters; all on one device.
    """
    new = {id(parameter) for module in replaced_modules(model).values() for parameter in module.parameters()}
    functions = {
        id(parameter) for module in model.modules() if isinstance(module, Basis) for parameter in module.parameters()
    }
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in learning.values():
        rate = settings.new_learning_rate if id(parameter) in new else None
        decays = parameter.ndim > 1 and id(parameter) not in functions
        # torch takes sharded and whole tensors through one step each, never through one together
        kind = (
            rate or settings.learning_rate,
            settings.weight_decay if decays else 0.0,
            isinstance(parameter, DTensor),
        )
        groups.setdefault(kind, []).append(parameter)
    on_gpu = all(parameter.is_cuda for parameter in learning.values())
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
            for (peak, decay, _), parameters in groups.items()
        ],
        betas=settings.betas,
        fused=(on_gpu and not any(sharded for _, _, sharded in groups)) or None,
    )


def set_rate(optimiser: torch.optim.Optimizer, settings: TrainSettings, step: int) -> None:
    """Sets the rate of step number `step`, from 0."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * rate_share(settings, step)


def rate_share(settings: TrainSettings, step: int) -> float:
    """The learning rate of step number `step`, from 0, as a share of its peak; see settings.SCHEDULES."""
    steps, warmup = settings.steps, max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    start = warmup
    if settings.schedule == "wsd":
        start = max(warmup, steps - round(settings.decay_share * steps))
        if step < start:
            return 1.0
    done = (step - start) / max(1, steps - start)  # of the way down, 0 to below 1
    left = 1 - done if settings.schedule != "cosine" else 0.5 + 0.5 * math.cos(math.pi * done)
    return settings.final_share + (1 - settings.final_share) * left
