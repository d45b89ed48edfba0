"""Rational functions with learned coefficients, one for each group of channels, in both published definitions.

Source: Molina et al. 2020, "Padé Activation Units", arXiv:1907.06732 (rational-abs); Yang & Wang 2024,
"Kolmogorov-Arnold Transformer", arXiv:2409.10594: the paper writes `rational`, its kernels compute `rational-abs`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from kallm_bench.errors import SpecError
from kallm_bench.kan.bases.base import Basis, whole, widened

FIT_ON = np.linspace(-8.0, 8.0, 1601)
"""Where a rational function is fitted to an activation."""


class Rational(Basis, name="rational"):
    """F_g(x) = (a_0 + a_1 x + .. + a_p x^p) / (1 + |b_1 x + .. + b_q x^q|) for each group g of channels.

    One function a channel, K = 1, which is learned itself. It starts as the best fit to SiLU on [-8, 8]: a denominator
    of zeros would never learn, since |u| has no slope at 0. Computed in float32 where x is of a half type.

    Args:
        numerator, denominator: p, 1 to 8, and q, 1 to 8; for p > q + 1 values would outgrow float16.
        groups: how many; they divide the channels.

    Shapes:
        x (..., I)  ->  (..., 1, I); learned: numerator (G, p+1), denominator (G, q).

    Raises:
        SpecError: an argument out of range; channels that the groups do not divide.
    """

    squash: ClassVar[str] = "none"
    constant: ClassVar[bool] = False
    size = 1

    def __init__(self, numerator: int = 5, denominator: int = 4, groups: int = 8) -> None:
        super().__init__()
        self.degrees = (
            whole(self.name, "numerator", numerator, 1, 8),
            whole(self.name, "denominator", denominator, 1, 8),
        )
        if numerator > denominator + 1:
            raise SpecError(f"{self.name}: numerator {numerator} may exceed denominator {denominator} by 1 at most")
        self.groups: int = whole(self.name, "groups", groups, 1, 4096)
        self.numerator = nn.Parameter(torch.empty(1, numerator + 1))
        self.denominator = nn.Parameter(torch.empty(1, denominator))
        self.reset_parameters()

    def bound(self, in_features: int) -> Self:
        if in_features % self.groups:
            raise SpecError(f"{self.name}: {in_features} channels are not divisible by {self.groups} groups")
        own = copy.copy(self)
        own._parameters = {}  # not those of the unbound one
        own.numerator = nn.Parameter(torch.empty(self.groups, self.degrees[0] + 1))
        own.denominator = nn.Parameter(torch.empty(self.groups, self.degrees[1]))
        own.reset_parameters()
        return own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.start_as("silu")

    @torch.no_grad()
    def start_at_zero(self) -> None:
        self.numerator.zero_()  # the denominator stays that of the fit: were it zero too, neither could learn

    @torch.no_grad()
    def start_as(self, activation: str) -> None:
        """Starts every group from the best fit to an activation, a key of ACTIVATIONS."""
        above, below, _ = fitted(type(self).name, activation, *self.degrees)
        for number, value in enumerate(above):
            self.numerator[:, number].fill_(value)
        for number, value in enumerate(below):
            self.denominator[:, number].fill_(value)

    def forward(self, x: Tensor) -> Tensor:
        wide = widened(x)
        grouped = wide.reshape(
            *wide.shape[:-1], len(self.numerator), wide.shape[-1] // len(self.numerator)
        )  # (..., G, I/G)
        above = _polynomial(grouped, self.numerator.to(wide.dtype))
        values = above / (1 + self._divisor(grouped, self.denominator.to(wide.dtype)))
        return values.flatten(-2).unsqueeze(-2).to(x.dtype)

    def _divisor(self, x: Tensor, coefficients: Tensor) -> Tensor:
        return (x * _polynomial(x, coefficients)).abs()


class RationalAbs(Rational, name="rational-abs"):
    """F_g(x) = (a_0 + a_1 x + .. + a_p x^p) / (1 + |b_1| |x| + .. + |b_q| |x|^q): the safe Padé unit. See Rational."""

    def _divisor(self, x: Tensor, coefficients: Tensor) -> Tensor:
        return x.abs() * _polynomial(x.abs(), coefficients.abs())


def _polynomial(x: Tensor, coefficients: Tensor) -> Tensor:
    """Horner's rule: x (..., G, I/G), coefficients (G, n) from the lowest power on."""
    value = coefficients[:, -1, None].expand_as(x)
    for number in range(coefficients.shape[1] - 2, -1, -1):
        value = value * x + coefficients[:, number, None]
    return value


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: torch.nn.functional.gelu(torch.from_numpy(x)).numpy(),
    "gelu-tanh": lambda x: torch.nn.functional.gelu(torch.from_numpy(x), approximate="tanh").numpy(),
    "relu": lambda x: np.maximum(x, 0.0),
    "identity": lambda x: x,
}
"""What a rational function can start as."""


@functools.cache
def fitted(family: str, activation: str, p: int, q: int) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """The numerator and denominator that fit an activation best on FIT_ON, and the largest error there.

    Least squares by Levenberg and Marquardt from the Taylor-like start x/2 + x²/4; the same on every machine to a few
    digits, and kept in the checkpoint anyway.
    """
    x, y = FIT_ON, ACTIVATIONS[activation](FIT_ON)
    powers = np.vander(x, p + 1, increasing=True)
    below = np.vander(x if family == "rational" else np.abs(x), q + 1, increasing=True)[:, 1:]

    def value(c: np.ndarray) -> Any:
        divisor = np.abs(below @ c[p + 1 :]) if family == "rational" else below @ np.abs(c[p + 1 :])
        return (powers @ c[: p + 1]) / (1 + divisor)

    start = np.zeros(p + 1 + q)
    start[1], start[min(2, p)] = 0.5, 0.25
    start[p + 1 :] = 0.1 / np.arange(1, q + 1) ** 2
    best = optimize.least_squares(lambda c: value(c) - y, start, method="lm", xtol=1e-12, max_nfev=4000).x
    return tuple(map(float, best[: p + 1])), tuple(map(float, best[p + 1 :])), float(np.abs(value(best) - y).max())
