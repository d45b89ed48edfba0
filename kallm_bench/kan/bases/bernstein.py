"""Bernstein polynomials: all of one degree, non-negative, summing to 1."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.kan.bases.base import Basis, whole
from kallm_bench.kan.bases.three_term import HIGHEST_DEGREE


class Bernstein(Basis, name="bernstein"):
    """B_k = C(degree, k) t^k (1-t)^{degree-k}, by B^d_k = (1-t) B^{d-1}_k + t B^{d-1}_{k-1}; t = sigmoid, in [0, 1].

    Source: Farouki 2012, "The Bernstein polynomial basis: a centennial retrospective", CAGD 29.

    Args:
        degree: of all of them, 1 to 16; the basis has degree + 1 functions, none of them constant.

    Shapes:
        t (..., I) in [0, 1]  ->  (..., K, I) with K = degree + 1.

    Raises:
        SpecError: degree out of range.
    """

    squash: ClassVar[str] = "sigmoid"
    constant: ClassVar[bool] = False

    def __init__(self, degree: int = 2) -> None:
        super().__init__()
        self.size = whole(self.name, "degree", degree, 1, HIGHEST_DEGREE) + 1

    def forward(self, x: Tensor) -> Tensor:
        terms = [torch.ones_like(x)]
        for _ in range(self.size - 1):
            falling, rising = [(1 - x) * term for term in terms], [x * term for term in terms]
            inner = [down + up for down, up in zip(falling[1:], rising[:-1], strict=True)]
            terms = [falling[0], *inner, rising[-1]]
        return torch.stack(terms, dim=-2)
