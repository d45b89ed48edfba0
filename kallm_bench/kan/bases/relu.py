"""Bumps made of two ReLUs each."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole


class ReLUBumps(Basis, name="relu"):
    """B_j = [r ReLU(x - s_j) ReLU(e_j - x)]² with s_j = (j-k)/g, e_j = s_j + (k+1)/g, r = 4g²/(k+1)², peak 1.

    The source leaves inputs as they are, where half of a normal one lies outside [0, 1] and beyond most bumps; here a
    sigmoid brings all of them inside.

    Source: Qiu et al. 2024, "ReLU-KAN", arXiv:2406.02075.

    Args:
        grid: g, bumps to a unit, 1 to 64.
        span: k, how many neighbours a bump overlaps, 1 to 8.

    Shapes:
        x (..., I) in [0, 1]  ->  (..., K, I) with K = grid + span.

    Raises:
        SpecError: grid or span out of range.
    """

    squash: ClassVar[str] = "sigmoid"
    constant: ClassVar[bool] = False

    def __init__(self, grid: int = 5, span: int = 3) -> None:
        super().__init__()
        self.grid, self.span = whole(self.name, "grid", grid, 1, 64), whole(self.name, "span", span, 1, 8)
        self.size = grid + span

    def forward(self, x: Tensor) -> Tensor:
        left = torch.arange(-self.span, self.grid, device=x.device, dtype=x.dtype)[:, None] / self.grid
        half = (self.span + 1) / (2 * self.grid)
        z = (x.unsqueeze(-2) - left) / half  # 0 where the bump begins, 2 where it ends
        return (torch.relu(z) * torch.relu(2 - z)).square()
