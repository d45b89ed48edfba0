"""Jacobi polynomials: orthogonal on [-1, 1] with weight (1-x)^a (1+x)^b. Legendre, Chebyshev: special cases."""

from __future__ import annotations

from kallm_bench.kan.bases.base import between
from kallm_bench.kan.bases.three_term import ThreeTerm


class Jacobi(ThreeTerm, name="jacobi"):
    """P_0 .. P_degree: 1, ((a-b) + (a+b+2)x)/2, then with c = 2n+a+b and D = 2(n+1)(n+a+b+1)

        P_{n+1} = ((c+1)(c+2)/D x + (a²-b²)(c+1)/(Dc)) P_n - 2(n+a)(n+b)(c+2)/(Dc) P_{n-1}.

    Source: DLMF 18.9.2; as a KAN: Aghaei 2024, "fKAN", arXiv:2406.07456.

    Args:
        degree: see ThreeTerm.
        a, b: both above -1.
    """

    def __init__(self, degree: int = 2, a: float = 1.0, b: float = 1.0) -> None:
        self.a = between(self.name, "a", a, -1, 20)
        self.b = between(self.name, "b", b, -1, 20)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        a, b, c = self.a, self.b, 2 * n + self.a + self.b
        if n == 0:
            return (a + b + 2) / 2, (a - b) / 2, 0.0
        divisor = 2 * (n + 1) * (n + a + b + 1)
        return (
            (c + 1) * (c + 2) / divisor,
            (a * a - b * b) * (c + 1) / (divisor * c),
            2 * (n + a) * (n + b) * (c + 2) / (divisor * c),
        )
