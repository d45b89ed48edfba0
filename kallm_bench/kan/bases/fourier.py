"""Sines and cosines of whole frequencies."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole, widened


class Fourier(Basis, name="fourier"):
    """cos x, cos 2x .. cos Gx, sin x .. sin Gx. Inputs are normalised, each token by itself.

    Source: Xu et al. 2024, "FourierKAN-GCF", arXiv:2406.01034.

    Args:
        frequencies: G, 1 to 64; the basis has 2G functions, none of them constant.

    Shapes:
        x (..., I)  ->  (..., K, I) with K = 2 frequencies.

    Raises:
        SpecError: frequencies out of range.
    """

    squash: ClassVar[str] = "norm"
    constant: ClassVar[bool] = False

    def __init__(self, frequencies: int = 4) -> None:
        super().__init__()
        self.size = 2 * whole(self.name, "frequencies", frequencies, 1, 64)

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        numbers = torch.arange(1, self.size // 2 + 1, device=x.device, dtype=wide.dtype)[:, None]
        angles = wide.unsqueeze(-2) * numbers
        return torch.cat([angles.cos(), angles.sin()], dim=-2).to(x.dtype)
