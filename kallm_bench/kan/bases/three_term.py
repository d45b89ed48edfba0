"""The template of every polynomial family that obeys a three-term recurrence, which is nearly all of them."""

from __future__ import annotations

import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from kallm_bench.errors import SpecError
from kallm_bench.kan.bases.base import DOMAINS, Basis, whole

HIGHEST_DEGREE = 16
SAFE_VALUE = 2.0**14
"""No basis function, and none of their slopes, may exceed this on the domain: float16 ends at 65,504."""


class ThreeTerm(Basis):
    """P_0 = first, P_{n+1} = (A_n x + B_n) P_n - C_n P_{n-1}, with P_{-1} = 0.

    A family says `step(n) -> (A_n, B_n, C_n)` and nothing else. The recurrence, not a closed form such as
    cos(n arccos x): arccos has infinite slope at -1 and 1, so autograd gives nan or inf there, and in bfloat16 tanh is
    exactly 1 from x = 3.5 on.

    Args:
        degree: highest polynomial degree, from 1 to the family's numerically safe limit: no value and no slope on the
            domain beyond SAFE_VALUE, and HIGHEST_DEGREE at most. The basis has degree + 1 functions.

    Shapes:
        x (..., I), dimensionless, in the family's domain  ->  (..., K, I) with K = degree + 1.

    Raises:
        SpecError: degree out of range; says the limit.
    """

    first: ClassVar[float] = 1.0

    def __init__(self, degree: int = 2) -> None:
        super().__init__()
        limit = self._safe_degree()
        whole(self.name, "degree", degree, 1, HIGHEST_DEGREE)
        if degree > limit:
            raise SpecError(
                f"{self.name}: degree {degree} leaves float16's range; its numerically safe limit is {limit}"
            )
        self.size = degree + 1

    def step(self, n: int) -> tuple[float, float, float]:
        """(A_n, B_n, C_n) for n ≥ 0; C_0 is not used."""
        raise NotImplementedError(f"{type(self).__name__} must define step")  # abstract

    def of_degree(self, degree: int) -> Self:
        lower = copy.copy(self)
        lower.size = 1 + whole(self.name, "degree", degree, 1, self.size - 1)
        return lower

    def forward(self, x: Tensor) -> Tensor:
        before, terms = torch.zeros_like(x), [torch.full_like(x, self.first)]
        for n in range(self.size - 1):
            a, b, c = self.step(n)
            before, after = terms[-1], (a * x + b) * terms[-1] - c * before
            terms.append(after)
        return torch.stack(terms, dim=-2)

    def _safe_degree(self) -> int:
        """The last degree whose values and slopes stay below SAFE_VALUE on the domain."""
        x = torch.linspace(*DOMAINS[self.squash], 257, dtype=torch.float64, device="cpu")
        before, value, slope_before, slope = 0 * x, 0 * x + self.first, 0 * x, 0 * x
        for n in range(HIGHEST_DEGREE):
            try:
                a, b, c = self.step(n)
            except ZeroDivisionError:  # finite families end where their points do
                return n
            next_value = (a * x + b) * value - c * before
            slope, slope_before = a * value + (a * x + b) * slope - c * slope_before, slope
            before, value = value, next_value
            if not float(torch.maximum(value.abs(), slope.abs()).max()) <= SAFE_VALUE:  # nor is nan safe
                return n
        return HIGHEST_DEGREE
