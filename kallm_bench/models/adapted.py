"""A linear layer of a model with a KAN beside it: what an adapter leaves where other retrofits replace."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kallm_bench.kan.adapter import LowRankKAN


class AdaptedLinear(nn.Module):
    """W x + bias, as it was, and what an adapter adds.

    It takes the very parameters of the layer over, under their names: in a checkpoint the model's own tensors are
    called what they were, and only the adapter's come on top. It is no nn.Linear, so that nothing takes its weight for
    the whole of it.

    Args:
        original: a linear layer, or one with an adapter, which is left out.
        adapter: of its widths.

    Shapes:
        x (..., I) -> (..., O), in the dtype that the layer alone answers in.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, original: nn.Module, adapter: LowRankKAN) -> None:
        super().__init__()
        assert isinstance(original, nn.Linear | Conv1D | AdaptedLinear)
        self.weight, self.bias = original.weight, original.bias
        self.turned: bool = original.turned if isinstance(original, AdaptedLinear) else isinstance(original, Conv1D)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.without_adapter(x)
        change: Tensor = self.adapter(x)
        return (y + change).to(y.dtype)

    def without_adapter(self, x: Tensor) -> Tensor:
        """What the layer alone answers, to the bit."""
        if not self.turned:
            return F.linear(x, self.weight, self.bias)
        assert self.bias is not None
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)  # Conv1D keeps (I, O)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[0 if self.turned else 1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[1 if self.turned else 0])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
