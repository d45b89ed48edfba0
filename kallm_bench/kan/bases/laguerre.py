"""Generalised Laguerre polynomials: orthogonal on x ≥ 0 with weight x^alpha e^{-x}, here used on [-1, 1]."""

from __future__ import annotations

from kallm_bench.kan.bases.base import between
from kallm_bench.kan.bases.three_term import ThreeTerm


class Laguerre(ThreeTerm, name="laguerre"):
    """L_0 .. L_degree: 1, 1+α-x, then (n+1) L_{n+1} = (2n+1+α-x) L_n - (n+α) L_{n-1}. Source: DLMF 18.9.

    Args:
        degree: see ThreeTerm.
        alpha: α > -1.
    """

    def __init__(self, degree: int = 2, alpha: float = 0.0) -> None:
        self.alpha = between(self.name, "alpha", alpha, -1, 20)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        return -1 / (n + 1), (2 * n + 1 + self.alpha) / (n + 1), (n + self.alpha) / (n + 1)
