"""Gaussian radial basis functions on evenly spaced centres."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole, widened

REACH = 2.0
"""The centres span [-2, 2], where 95 % of normalised inputs lie."""


class GaussianRBF(Basis, name="rbf"):
    """B_k = exp(-((x-μ_k)/h)²) with centres μ_k from -2 to 2, h apart. Inputs are normalised, each token by itself.

    Source: Li 2024, "Kolmogorov-Arnold Networks are Radial Basis Function Networks" (FastKAN), arXiv:2405.06721.

    Args:
        centers: how many, 2 to 256; as many functions.

    Shapes:
        x (..., I)  ->  (..., K, I) with K = centers.

    Raises:
        SpecError: centers out of range.
    """

    squash: ClassVar[str] = "norm"
    constant: ClassVar[bool] = False

    def __init__(self, centers: int = 8) -> None:
        super().__init__()
        self.size = whole(self.name, "centers", centers, 2, 256)

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        width = 2 * REACH / (self.size - 1)
        centres = torch.linspace(-REACH, REACH, self.size, device=x.device, dtype=wide.dtype)[:, None]
        z = ((wide.unsqueeze(-2) - centres) / width).clamp(-16, 16)  # beyond, the function is 0
        return torch.exp(-z.square()).to(x.dtype)
