"""Bessel polynomials: orthogonal on a circle around 0 of the complex plane, here used on [-1, 1]."""

from __future__ import annotations

from kallm_bench.kan.bases.three_term import ThreeTerm


class Bessel(ThreeTerm, name="bessel"):
    """y_0 .. y_degree: 1, 1+x, then y_{n+1} = (2n+1) x y_n + y_{n-1}. They grow as (2n)!/n!, so the safe limit is low.

    Source: Krall & Frink 1949, "A new class of orthogonal polynomials", Trans. AMS 65; DLMF 18.34.
    """

    def step(self, n: int) -> tuple[float, float, float]:
        return 2.0 * n + 1, 1.0 if n == 0 else 0.0, -1.0
