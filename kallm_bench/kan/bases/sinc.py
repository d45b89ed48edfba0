"""Cardinal sines: each is 1 at its own point of an even grid and 0 at all others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole


class Sinc(Basis, name="sinc"):
    """B_k = sinc((x - kh)/h) with sinc z = sin(πz)/(πz), for k = -M .. M and h = 1/M; x = tanh.

    Source: Yu et al. 2024, "Sinc Kolmogorov-Arnold Network", arXiv:2410.04096; Stenger 1993, chapter 1.

    Args:
        points: M, on each side of 0, 1 to 128; the basis has 2M + 1 functions.

    Shapes:
        x (..., I) in [-1, 1]  ->  (..., K, I) with K = 2 points + 1.

    Raises:
        SpecError: points out of range.
    """

    constant: ClassVar[bool] = False

    def __init__(self, points: int = 3) -> None:
        super().__init__()
        self.points = whole(self.name, "points", points, 1, 128)
        self.size = 2 * points + 1

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(-self.points, self.points + 1, device=x.device, dtype=x.dtype)[:, None]
        return torch.sinc(x.unsqueeze(-2) * self.points - numbers)
