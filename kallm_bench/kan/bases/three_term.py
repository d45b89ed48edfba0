"""The template of every polynomial family that obeys a three-term recurrence, which is nearly all of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kallm_bench.errors import SpecError
from kallm_bench.kan.bases.base import Basis


class ThreeTerm(Basis):
    """P_0 = first, P_{n+1} = (A_n x + B_n) P_n - C_n P_{n-1}, with P_{-1} = 0.

    A family says `step(n) -> (A_n, B_n, C_n)` and nothing else. The recurrence, not a closed form such as
    cos(n arccos x): arccos has infinite slope at -1 and 1, so autograd gives nan or inf there, and in bfloat16 tanh is
    exactly 1 from x = 3.5 on.

    Args:
        degree: highest polynomial degree, 1 to `highest_degree`; the basis has degree + 1 functions.

    Shapes:
        x (..., I), dimensionless, in the family's domain  ->  (..., K, I) with K = degree + 1.

    Raises:
        SpecError: degree out of range.
    """

    first: ClassVar[float] = 1.0
    highest_degree: ClassVar[int] = 16

    def __init__(self, degree: int = 2) -> None:
        super().__init__()
        if not isinstance(degree, int) or not 1 <= degree <= self.highest_degree:
            raise SpecError(f"{self.name}: degree must be a whole number from 1 to {self.highest_degree}, got {degree}")
        self.size = degree + 1

    def step(self, n: int) -> tuple[float, float, float]:
        """(A_n, B_n, C_n) for n ≥ 0; C_0 is not used."""
        raise NotImplementedError(f"{type(self).__name__} must define step")  # abstract

    def forward(self, x: Tensor) -> Tensor:
        before, terms = torch.zeros_like(x), [torch.full_like(x, self.first)]
        for n in range(self.size - 1):
            a, b, c = self.step(n)
            before, after = terms[-1], (a * x + b) * terms[-1] - c * before
            terms.append(after)
        return torch.stack(terms, dim=-2)
