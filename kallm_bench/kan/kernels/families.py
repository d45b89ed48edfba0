"""What a kernel is told of a family of functions: its kind, its numbers and its squash."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("polynomial", "bspline", "rbf")


class Family(NamedTuple):
    """A family of D functions of one number.

    Args:
        kind: "polynomial" stands for P_1 .. P_D of P_0 = first, P_{n+1} = (A_n t + B_n) P_n - C_n P_{n-1}; "bspline"
            and "rbf" for all the functions that `local` knows.
        numbers: first, A_0, B_0, C_0, A_1, ..; grid intervals and order; how many centres.
        squash: "none", "tanh" or "sigmoid", what x is mapped by first; a layer also knows "norm".
    """

    kind: str
    numbers: tuple[float, ...]
    squash: str

    @property
    def functions(self) -> int:
        """D."""
        return len(self.numbers) // 3 if self.kind == "polynomial" else int(sum(self.numbers))

    @property
    def first(self) -> float:
        """P_0, a constant."""
        return self.numbers[0]

    @property
    def steps(self) -> tuple[tuple[float, ...], ...]:
        """(A_n, B_n, C_n) for n = 0 .. D-1."""
        return tuple(self.numbers[at : at + 3] for at in range(1, len(self.numbers), 3))
