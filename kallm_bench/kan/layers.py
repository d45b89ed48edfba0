"""The KAN layer: what nn.Linear is to a matrix product, KANLinear is to a univariate function per edge."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import SQUASHES, Basis, make_basis
from kallm_bench.kan.ops import kan_linear

CONSTANTS = ("bias", "edge")


class KANLinear(nn.Module):
    """A linear combination of univariate functions of each input: `kan_linear` with its parameters.

    Args:
        in_features, out_features: I and O.
        basis: a Basis, or its public name ("cheby2", "cheby2:degree=3").
        constant: "bias" folds the basis's constant function, which is the same number on all I edges of an output, into
            one bias: (O, K-1, I) coefficients + (O,). "edge" keeps it on every edge, as published: (O, K, I), no bias.
            Both represent the same functions. A basis without a constant function always has (O, K, I) + (O,).

    Shapes:
        x (..., I) -> (..., O)

    Raises:
        SpecError: unknown basis or `constant`.
    """

    def __init__(self, in_features: int, out_features: int, basis: Basis | str, *, constant: str = "bias") -> None:
        super().__init__()
        if constant not in CONSTANTS:
            raise SpecError(unknown("treatment of the constant", constant, CONSTANTS))
        self.in_features = in_features
        self.out_features = out_features
        self.basis = make_basis(basis) if isinstance(basis, str) else basis
        per_edge = constant == "edge" and self.basis.constant
        functions = self.basis.size - (self.basis.constant and not per_edge)
        self.coefficients = nn.Parameter(torch.empty(out_features, functions, in_features))
        self.bias = None if per_edge else nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return kan_linear(x, self.coefficients, self.basis, self.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws the coefficients anew: N(0, 1) inputs give outputs of mean square `gain`². Sets the bias to zero.

        Every basis function gets an equal share: c[o,k,i] ~ N(0, gain² / (I · K · E[B_k(squash(z))²])). Without that
        weight, a function of ten times the size would have ten times the say.
        """
        if self.coefficients.is_meta:
            return
        shares = mean_squares(self.basis)[-self.coefficients.shape[1] :]  # (K,)
        deviations = gain / (self.in_features * len(shares) * shares).sqrt()
        drawn = torch.randn(self.coefficients.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.coefficients.copy_(drawn * deviations.to(drawn.dtype)[:, None])
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@torch.no_grad()
def mean_squares(basis: Basis) -> Tensor:
    """E[B_k(squash(z))²] for z ~ N(0, 1), shape (K,), float64 on the CPU: the mean over 4,001 normal quantiles."""
    with torch.device("cpu"):
        quantiles = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
        z = torch.special.ndtri(quantiles)[:, None]  # (4001, 1)
        functions: Tensor = basis(SQUASHES[basis.squash](z))  # (4001, K, 1)
        return functions.square().mean(dim=(0, 2))
