"""Wavelets with a learned scale and shift for each function and input channel.

Source: Bozorgasl & Chen 2024, "Wav-KAN", arXiv:2405.12832, there with one wavelet an edge; Daubechies 1992, chapter 3.
"""

from __future__ import annotations

import copy
import math
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from kallm_bench.kan.bases.base import Basis, whole

NORMALISING: float = 2 / (math.sqrt(3) * math.pi**0.25)
CUT_OFF = 12.0
"""Arguments beyond it are cut off there: every wavelet is below 1e-28, and its square still fits float16."""


class Wavelet(Basis):
    """B_k = ψ(w_{k,i} x_i - v_{k,i}) for a mother wavelet ψ, with learned w and v. They start with w = 1 and v spread
    evenly over [-2, 2]. The scale multiplies, so that no division can blow up.

    Args:
        wavelets: how many on each channel, 1 to 64.

    Shapes:
        x (..., I)  ->  (..., K, I) with K = wavelets; learned: scale and shift, each (K, I).

    Raises:
        SpecError: wavelets out of range.
    """

    squash: ClassVar[str] = "none"
    constant: ClassVar[bool] = False

    def __init__(self, wavelets: int = 4) -> None:
        super().__init__()
        self.size = whole(self.name, "wavelets", wavelets, 1, 64)
        self.scale = nn.Parameter(torch.ones(self.size, 1))
        self.shift = nn.Parameter(torch.ones(self.size, 1))
        self.reset_parameters()

    def bound(self, in_features: int) -> Self:
        own = copy.copy(self)
        own._parameters = {}  # not those of the unbound one
        own.scale = nn.Parameter(torch.empty(self.size, in_features))
        own.shift = nn.Parameter(torch.empty(self.size, in_features))
        own.reset_parameters()
        return own

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.scale.fill_(1.0)
        for number, place in enumerate(self._places()):
            self.shift[number].fill_(place)

    def _places(self) -> list[float]:
        return [4 * (number + 0.5) / self.size - 2 for number in range(self.size)]

    def forward(self, x: Tensor) -> Tensor:
        z = x.unsqueeze(-2) * self.scale.to(x.dtype) - self.shift.to(x.dtype)
        return self.mother(z.clamp(-CUT_OFF, CUT_OFF))

    def mother(self, z: Tensor) -> Tensor:
        """ψ(z)."""
        raise NotImplementedError(f"{type(self).__name__} must define mother")  # abstract


class MexicanHat(Wavelet, name="mexican-hat"):
    """ψ(z) = 2/(√3 π^¼) (1 - z²) exp(-z²/2): minus the second derivative of a Gaussian, of norm 1. See Wavelet."""

    def mother(self, z: Tensor) -> Tensor:
        values: Tensor = (1 - z.square()) * torch.exp(-z.square() / 2)
        return values * NORMALISING


class DerivativeOfGaussian(Wavelet, name="dog"):
    """ψ(z) = -z exp(-z²/2): the first derivative of a Gaussian. See Wavelet."""

    def mother(self, z: Tensor) -> Tensor:
        values: Tensor = -z * torch.exp(-z.square() / 2)
        return values


class Morlet(Wavelet, name="morlet"):
    """ψ(z) = cos(5z) exp(-z²/2): the real part of a Gabor wave of frequency 5. See Wavelet."""

    def mother(self, z: Tensor) -> Tensor:
        return torch.cos(5 * z) * torch.exp(-z.square() / 2)
