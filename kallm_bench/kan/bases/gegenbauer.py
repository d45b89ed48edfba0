"""Gegenbauer, or ultraspherical, polynomials: orthogonal on [-1, 1] with weight (1-x²)^{λ-1/2}."""

from __future__ import annotations

from kallm_bench.errors import SpecError
from kallm_bench.kan.bases.base import between
from kallm_bench.kan.bases.three_term import ThreeTerm


class Gegenbauer(ThreeTerm, name="gegenbauer"):
    """C_0 .. C_degree: 1, 2λx, then (n+1) C_{n+1} = 2(n+λ) x C_n - (n+2λ-1) C_{n-1}. Source: DLMF 18.9.

    λ = 1/2 are the Legendre and λ = 1 the Chebyshev polynomials of the second kind.

    Args:
        degree: see ThreeTerm.
        lam: λ > -1/2, and at least 0.001 away from 0, where all but the constant vanish.
    """

    def __init__(self, degree: int = 2, lam: float = 1.5) -> None:
        self.lam = between(self.name, "lam", lam, -0.5, 20)
        if abs(lam) < 1e-3:
            raise SpecError(
                f"gegenbauer: lam = {lam:g} makes all but the constant vanish; take cheby1, which is its limit"
            )
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        return 2 * (n + self.lam) / (n + 1), 0.0, (n + 2 * self.lam - 1) / (n + 1)
