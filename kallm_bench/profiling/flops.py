"""What a model needs at least, in operations and in bytes, and what a device could do at most.

A token through the model takes two floating-point operations for every weight of a matrix product.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.kan import KANLinear
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.models.anatomy import find_blocks

NO_DATA_SHEET = "no data sheet is known of this device"


class DataSheet(NamedTuple):
    """What a GPU's maker promises without sparsity: FLOP/s in 16 bits and in float32, and bytes/s of its memory."""

    half: float
    single: float
    bandwidth: float


DATA_SHEETS = {
    "H100 PCIe": DataSheet(756e12, 51e12, 2.0e12),
    "H100 NVL": DataSheet(835e12, 60e12, 3.9e12),
    "H100 80GB HBM3": DataSheet(989e12, 67e12, 3.35e12),
    "H200 NVL": DataSheet(835e12, 60e12, 4.8e12),
    "H200": DataSheet(989e12, 67e12, 4.8e12),
    "A100-SXM4-80GB": DataSheet(312e12, 19.5e12, 2.039e12),
    "A100 80GB PCIe": DataSheet(312e12, 19.5e12, 1.935e12),
    "A100-SXM4-40GB": DataSheet(312e12, 19.5e12, 1.555e12),
    "A100-PCIE-40GB": DataSheet(312e12, 19.5e12, 1.555e12),
    "L40S": DataSheet(362e12, 92e12, 0.864e12),
    "A10G": DataSheet(125e12, 35e12, 0.6e12),
    "L4": DataSheet(121e12, 30e12, 0.3e12),
    "RTX 4090": DataSheet(165e12, 83e12, 1.008e12),
}
"""By the last words of the GPU's name; what ends in others is a slice of a GPU, or a smaller one for laptops."""


class Limits(NamedTuple):
    """What a device could do at most, in one dtype: FLOP/s, and bytes/s to and from its memory."""

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The time that work of so many FLOP which moves so many bytes cannot beat."""
        return max(flops / self.flops, moved / self.bandwidth)


def flops_per_token(model: PreTrainedModel) -> int:
    """Forward FLOP a token in matrix products; attention scores, which grow with the length, are left out.

    An embedding is looked up, not multiplied; tied to the head, it counts once, as the head. A KAN layer's expansion is
    a few operations an input and function, thousands of times less than its product, and is left out too.
    """
    return sum(2 * product_weights(module) for module in model.modules())


def product_weights(module: nn.Module) -> int:
    """Weights of the matrix product that a module does by itself, apart from those inside it."""
    if isinstance(module, nn.Linear | Conv1D | AdaptedLinear):
        return module.weight.numel()
    return module.coefficients.numel() if isinstance(module, KANLinear) else 0


def training_flops(model: PreTrainedModel, bearing: float = 1.0) -> float:
    """FLOP a token that a training step cannot do without, in the model's scope as it is; see training_flops_of."""
    return sum(training_flops_of(model, bearing).values())


def training_flops_of(model: PreTrainedModel, bearing: float = 1.0) -> dict[nn.Module, float]:
    """Module that does a matrix product -> its FLOP a token of a training step, in the model's scope as it is.

    Forward once; where something at or below a weight learns, its input's gradient too; and the weight's own where it
    learns itself. Computing anything twice counts once.

    Args:
        bearing: share of the positions that bear loss, on which alone the head is run.
    """
    below = {id(module) for block in _frozen_blocks(model) for module in block.modules()}
    head = model.get_output_embeddings()
    found = {}
    for module in model.modules():
        if not (weights := product_weights(module)):
            continue
        own = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        times = 1 if id(module) in below else 2 + own
        found[module] = 2 * weights * times * (bearing if module is head else 1.0)
    return found


def frozen_flops(model: PreTrainedModel) -> float:
    """Those of training_flops that blocks take below the first one that learns."""
    return sum(2.0 * product_weights(module) for block in _frozen_blocks(model) for module in block.modules())


def _frozen_blocks(model: PreTrainedModel) -> list[nn.Module]:
    blocks = list(find_blocks(model))
    learns = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return blocks[: learns.index(True)] if any(learns) else blocks


def forward_flops(model: PreTrainedModel, tokens: int, heads: int) -> int:
    """FLOP of a forward pass over `tokens` with the head run at `heads` of them alone; see flops_per_token."""
    head = 2 * product_weights(model.get_output_embeddings())
    return tokens * (flops_per_token(model) - head) + heads * head


def weight_bytes(model: PreTrainedModel) -> int:
    """What a forward pass reads of the weights: all but an embedding that is no head, of which it looks up a few."""
    embedding = model.get_input_embeddings().weight
    looked_up = embedding is not model.get_output_embeddings().weight
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if not (looked_up and parameter is embedding)
    )


def cache_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What a cache keeps of one token: keys and values of every block; 0 where the configuration names no heads."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 0
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * shared * size * dtype.itemsize)


def step_bytes(model: PreTrainedModel, computed_in: torch.dtype) -> int:
    """What a training step cannot do without moving: weights read for forward, and for learning ones AdamW's work.

    That is the gradient written and read, and the value and two moments read and written, all in float32.
    """
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    return int(every * computed_in.itemsize + learning * 8 * 4)


def limits_of(device: torch.device, dtype: torch.dtype) -> Limits | None:
    """What the device could do at most in this dtype; None for a CPU, and for a GPU that is not in DATA_SHEETS."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    sheets = [sheet for last, sheet in DATA_SHEETS.items() if re.search(rf"\b{last}$", name)]
    if not sheets:
        return None
    return Limits(sheets[0].single if dtype == torch.float32 else sheets[0].half, sheets[0].bandwidth)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of limits_of; None where they are not known."""
    limits = limits_of(device, dtype)
    return limits and limits.flops
