"""The distilled start: each replacement learns to answer as the replaced module did, all of them side by side.

The model runs forward only; each block's regression is a problem of its own, with a loss of its own, so five blocks
cost hardly more than one. Rows count by their relative error (see Activations.weights).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from kallm_bench.models.calibration import Activations
from kallm_bench.models.sites import Site
from kallm_bench.progress import Watch, nobody

RATE = 2e-3
"""AdamW's peak learning rate; it falls as a cosine to a hundredth."""

TOKENS_A_STEP = 4096


def distill(
    modules: Mapping[Site, nn.Module],
    activations: Activations,
    steps: int,
    watch: Watch = nobody,
    *,
    in_sequence: bool = False,
) -> None:
    """Trains `modules` in place to answer as the modules at their sites do. Draws no random numbers.

    Args:
        modules: site -> what shall stand there, in float32.
        activations: of the untouched blocks.
        steps: of TOKENS_A_STEP tokens each, over the calibration rows again and again.
        in_sequence: feeds every block what the replaced blocks before it make of the text, instead of what the original
            ones do; what to answer there is asked of the original module.
    """
    device = activations.model.device
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    rows = activations.in_sequence(modules, TOKENS_A_STEP) if in_sequence else activations.endless(TOKENS_A_STEP)
    with torch.enable_grad():
        for step, part in zip(range(steps), rows, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
            missed = torch.zeros((), device=device)
            for site, module in modules.items():
                x, y = (each.float() for each in part.seen[site])
                weights = activations.weights(site, y).float()
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    predicted = module(x)
                errors = (predicted.float() - y).square().sum(-1)
                missed = missed + (weights * errors).sum() / (weights * y.square().sum(-1)).sum()
            torch.autograd.backward(missed)
            for module in modules.values():  # each is a problem of its own
                torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            watch("distilling", step + 1, steps, f"missed {float(missed.detach()) / len(modules):.3f}")
