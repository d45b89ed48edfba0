"""Where the new parameters start."""

from __future__ import annotations

import torch
from torch import nn

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward
from kallm_bench.models.sites import LINEAR


@torch.no_grad()
def start_randomly(module: nn.Module, seed: int, block: int, deviation: float) -> None:
    """Draws every parameter of a replacement anew; the same on every machine and device for equal (seed, block).

    Args:
        module: what make_replacement built; changed in place.
        seed, block: which draw.
        deviation: standard deviation of linear weights, the model's own `initializer_range`.

    Raises:
        SpecError: the module holds parameters of a kind that has no known start.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + block)
    if isinstance(module, KANFeedForward):
        module.reset_parameters(generator)
        return
    for layer in module.modules():
        if isinstance(layer, LINEAR):
            drawn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            layer.weight.copy_(drawn * deviation)
            if layer.bias is not None:
                layer.bias.zero_()
        elif any(True for _ in layer.parameters(recurse=False)):
            raise SpecError(f"cannot restart {type(module).__name__}: no start is known for its {type(layer).__name__}")
