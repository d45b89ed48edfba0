"""Floating-point operations of one token through the model: two for every weight of a matrix product."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.kan import KANLinear


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
