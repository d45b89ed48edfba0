"""B-splines on a uniform grid over [-1, 1], by their local form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole, widened


class BSpline(Basis, name="bspline"):
    """B_0 .. B_{grid+order-1}: piecewise polynomials of degree `order`, non-negative, local, summing to 1 on [-1, 1].

    On each interval only order + 1 of them differ from zero. Those are computed from where x lies in its interval, by
    de Boor's triangle, which only adds and multiplies numbers in [0, 1]; then each is put into its slab. The textbook
    alternative, differences of truncated powers, loses every digit as the grid grows. The interval is found in float32.

    Source: de Boor 1972, "On calculating with B-splines", J. Approx. Theory 6; as a KAN: Liu et al. 2024, "KAN:
    Kolmogorov-Arnold Networks", arXiv:2404.19756, there over a residual base and unsquashed inputs.

    Args:
        grid: number of intervals, 1 to 256.
        order: degree of the pieces, 1 to 5; 3 are cubic splines.

    Shapes:
        x (..., I) in [-1, 1]  ->  (..., K, I) with K = grid + order.

    Raises:
        SpecError: grid or order out of range.
    """

    constant: ClassVar[bool] = False

    def __init__(self, grid: int = 5, order: int = 3) -> None:
        super().__init__()
        self.grid, self.order = whole(self.name, "grid", grid, 1, 256), whole(self.name, "order", order, 1, 5)
        self.size = grid + order

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        place = (wide + 1) * (self.grid / 2)
        interval = place.detach().floor().nan_to_num(0.0).clamp(0, self.grid - 1)
        u = place - interval  # in [0, 1]
        local = [torch.ones_like(u)]  # the splines that are not zero here, from the leftmost on
        for degree in range(1, self.order + 1):
            falling = [(m + 1 - u) / degree * term for m, term in enumerate(local)]
            rising = [(u + degree - 1 - m) / degree * term for m, term in enumerate(local)]
            inner = [down + up for down, up in zip(falling[1:], rising[:-1], strict=True)]
            local = [falling[0], *inner, rising[-1]]
        values = torch.stack(local, dim=-2)
        slabs = interval.long().unsqueeze(-2) + torch.arange(self.order + 1, device=x.device)[:, None]
        empty = values.new_zeros(*x.shape[:-1], self.size, x.shape[-1])
        return empty.scatter(-2, slabs, values).to(x.dtype)
