"""Fibonacci and Lucas polynomials: one recurrence, two beginnings. At x = 1 they are the numbers of those names.

Source: Koshy, "Fibonacci and Lucas Numbers with Applications", chapter 37.
"""

from __future__ import annotations

from typing import ClassVar

from kallm_bench.kan.bases.three_term import ThreeTerm


class Fibonacci(ThreeTerm, name="fibonacci"):
    """F_1 .. F_{degree+1}: 1, x, then F_{n+1} = x F_n + F_{n-1}; B_k is F_{k+1}, of degree k."""

    def step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, -1.0


class Lucas(ThreeTerm, name="lucas"):
    """L_0 .. L_degree: 2, x, then L_{n+1} = x L_n + L_{n-1}."""

    first: ClassVar[float] = 2.0

    def step(self, n: int) -> tuple[float, float, float]:
        return (0.5, 0.0, 0.0) if n == 0 else (1.0, 0.0, -1.0)
