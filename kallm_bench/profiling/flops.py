"""Floating-point operations of one token through the model: two for every weight of a matrix product."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.kan import KANLinear
from kallm_bench.models.anatomy import find_blocks

PEAKS = {
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 92e12),
    "A10G": (125e12, 35e12),
    "L4": (121e12, 30e12),
    "RTX 4090": (165e12, 83e12),
}
"""What data sheets promise without sparsity, FLOP/s in 16 bits and in float32, by a part of the GPU's name."""


def flops_per_token(model: PreTrainedModel) -> int:
    """Forward FLOP a token in matrix products; attention scores, which grow with the length, are left out.

    An embedding is looked up, not multiplied; tied to the head, it counts once, as the head. A KAN layer's expansion is
    a few operations an input and function, thousands of times less than its product, and is left out too.
    """
    return sum(2 * _product_weights(module) for module in model.modules())


def _product_weights(module: nn.Module) -> int:
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    return module.coefficients.numel() if isinstance(module, KANLinear) else 0


def training_flops(model: PreTrainedModel, bearing: float = 1.0) -> float:
    """FLOP a token that a training step cannot do without, in the model's scope as it is.

    Forward once; where something at or below a weight learns, its input's gradient too; and the weight's own where it
    learns itself. Computing anything twice counts once.

    Args:
        bearing: share of the positions that bear loss, on which alone the head is run.
    """
    blocks = list(find_blocks(model))
    learns = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    first = learns.index(True) if any(learns) else len(blocks)
    below = {id(module) for block in blocks[:first] for module in block.modules()}
    head = model.get_output_embeddings()
    total = 0.0
    for module in model.modules():
        if not (weights := _product_weights(module)):
            continue
        own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        times = 1 if id(module) in below else 2 + own
        total += 2 * weights * times * (bearing if module is head else 1.0)
    return total


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device could do at most in this dtype; None for one that is not in PEAKS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    return found and found[dtype == torch.float32]
