"""Hermite polynomials: orthogonal on the real line under a Gaussian weight, here used on [-1, 1]. Source: DLMF 18.9."""

from __future__ import annotations

from kallm_bench.kan.bases.three_term import ThreeTerm


class Hermite(ThreeTerm, name="hermite"):
    """Physicists' H_0 .. H_degree: 1, 2x, then H_{n+1} = 2x H_n - 2n H_{n-1}; weight exp(-x²)."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 2.0, 0.0, 2.0 * n


class HermiteE(ThreeTerm, name="hermite-e"):
    """Probabilists' He_0 .. He_degree: 1, x, then He_{n+1} = x He_n - n He_{n-1}; weight exp(-x²/2)."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, float(n)
