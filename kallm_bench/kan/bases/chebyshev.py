"""Chebyshev polynomials of the four kinds: one recurrence, four second terms. On [-1, 1].

With x = cos θ: T_k = cos kθ, U_k = sin (k+1)θ / sin θ, V_k = cos (k+½)θ / cos ½θ, W_k = sin (k+½)θ / sin ½θ.
Source: DLMF 18.3, 18.5, 18.9; as a KAN: SS et al. 2024, "Chebyshev Polynomial-Based KANs", arXiv:2405.07200.
"""

from __future__ import annotations

from kallm_bench.kan.bases.three_term import ThreeTerm


class Chebyshev1(ThreeTerm, name="cheby1"):
    """T_0 .. T_degree: 1, x, then T_{n+1} = 2x T_n - T_{n-1}; each in [-1, 1]."""

    def step(self, n: int) -> tuple[float, float, float]:
        return (1.0, 0.0, 0.0) if n == 0 else (2.0, 0.0, 1.0)


class Chebyshev2(ThreeTerm, name="cheby2"):
    """U_0 .. U_degree: 1, 2x, then U_{n+1} = 2x U_n - U_{n-1}; |U_k| ≤ k + 1."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 2.0, 0.0, 1.0


class Chebyshev3(ThreeTerm, name="cheby3"):
    """V_0 .. V_degree: 1, 2x - 1, then V_{n+1} = 2x V_n - V_{n-1}; |V_k| ≤ 2k + 1."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 2.0, -1.0 if n == 0 else 0.0, 1.0


class Chebyshev4(ThreeTerm, name="cheby4"):
    """W_0 .. W_degree: 1, 2x + 1, then W_{n+1} = 2x W_n - W_{n-1}; |W_k| ≤ 2k + 1."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 2.0, 1.0 if n == 0 else 0.0, 1.0
