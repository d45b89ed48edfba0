"""Legendre polynomials, orthogonal on [-1, 1] with equal weight everywhere."""

from __future__ import annotations

from kallm_bench.kan.bases.three_term import ThreeTerm


class Legendre(ThreeTerm, name="legendre"):
    """P_0 .. P_degree: 1, x, then (n+1) P_{n+1} = (2n+1) x P_n - n P_{n-1}; each in [-1, 1]. Source: DLMF 18.9."""

    def step(self, n: int) -> tuple[float, float, float]:
        return (2 * n + 1) / (n + 1), 0.0, n / (n + 1)
