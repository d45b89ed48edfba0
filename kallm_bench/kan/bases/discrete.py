"""Polynomials orthogonal on whole numbers: Charlier, Meixner, Krawtchouk and Hahn, here between them as well.

The argument is a sigmoid: used as it is by the first two, times N by the others, whose points are 0 .. N.
Source: Koekoek, Lesky & Swarttouw 2010, "Hypergeometric Orthogonal Polynomials", 9.5, 9.10, 9.11, 9.14; DLMF 18.19.
"""

from __future__ import annotations

from typing import ClassVar

from kallm_bench.kan.bases.base import between, whole
from kallm_bench.kan.bases.three_term import HIGHEST_DEGREE, ThreeTerm


class Charlier(ThreeTerm, name="charlier"):
    """C_0 .. C_degree: 1, 1-x/a, then a C_{n+1} = (n+a-x) C_n - n C_{n-1}; Poisson weight. x = sigmoid.

    Args:
        degree: see ThreeTerm.
        a: mean of the Poisson distribution, above 0.
    """

    squash: ClassVar[str] = "sigmoid"

    def __init__(self, degree: int = 2, a: float = 1.0) -> None:
        self.a = between(self.name, "a", a, 0, 100)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        return -1 / self.a, (n + self.a) / self.a, n / self.a


class Meixner(ThreeTerm, name="meixner"):
    """M_0 .. M_degree: 1, 1+x(c-1)/(cβ), then c(n+β) M_{n+1} = ((c-1)x+n+(n+β)c) M_n - n M_{n-1}. x = sigmoid.

    Args:
        degree: see ThreeTerm.
        beta, c: of the negative binomial weight; β above 0, c between 0 and 1.
    """

    squash: ClassVar[str] = "sigmoid"

    def __init__(self, degree: int = 2, beta: float = 1.0, c: float = 0.5) -> None:
        self.beta = between(self.name, "beta", beta, 0, 100)
        self.c = between(self.name, "c", c, 0, 1)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        divisor = self.c * (n + self.beta)
        return (self.c - 1) / divisor, (n + (n + self.beta) * self.c) / divisor, n / divisor


class Krawtchouk(ThreeTerm, name="krawtchouk"):
    """K_0 .. K_degree: 1, 1-x/(pN), then p(N-n) K_{n+1} = (p(N-n)+n(1-p)-x) K_n - n(1-p) K_{n-1}. x = N sigmoid.

    Args:
        degree: see ThreeTerm; at most N.
        p: of the binomial weight, between 0 and 1.
        n: N, the last point.
    """

    squash: ClassVar[str] = "sigmoid"

    def __init__(self, degree: int = 2, p: float = 0.5, n: int = HIGHEST_DEGREE) -> None:
        self.p, self.last = between(self.name, "p", p, 0, 1), whole(self.name, "n", n, 1, 100)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        up, down = self.p * (self.last - n), n * (1 - self.p)
        return -self.last / up, (up + down) / up, down / up


class Hahn(ThreeTerm, name="hahn"):
    """Q_0 .. Q_degree: 1, 1-(α+β+2)x/((α+1)N), then A Q_{n+1} = (A+C-x) Q_n - C Q_{n-1}. x = N sigmoid. s = 2n+α+β,

        A = (n+α+β+1)(n+α+1)(N-n)/((s+1)(s+2)),  C = n(n+α+β+N+1)(n+β)/(s(s+1)).

    Args:
        degree: see ThreeTerm; at most N.
        alpha, beta: both above -1.
        n: N, the last point.
    """

    squash: ClassVar[str] = "sigmoid"

    def __init__(self, degree: int = 2, alpha: float = 0.0, beta: float = 0.0, n: int = HIGHEST_DEGREE) -> None:
        self.alpha, self.beta = between(self.name, "alpha", alpha, -1, 20), between(self.name, "beta", beta, -1, 20)
        self.last = whole(self.name, "n", n, 1, 100)
        super().__init__(degree)

    def step(self, n: int) -> tuple[float, float, float]:
        a, b, last = self.alpha, self.beta, self.last
        if n == 0:  # the general form divides by α+β, and by α+β+1
            return -(a + b + 2) / (a + 1), 1.0, 0.0
        s = 2 * n + a + b
        up = (n + a + b + 1) * (n + a + 1) * (last - n) / ((s + 1) * (s + 2))
        down = n * (n + a + b + last + 1) * (n + b) / (s * (s + 1))
        return -last / up, (up + down) / up, down / up
