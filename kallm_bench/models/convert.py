"""Change of basis and raise of degree: the same functions, or the nearest ones, written in another basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kallm_bench.errors import SpecError
from kallm_bench.kan import Basis, KANFeedForward, KANLinear
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.kan.bases.base import DOMAINS

POINTS = 2001


@dataclass(frozen=True)
class Conversion:
    """How one basis's functions are written in another.

    Args:
        matrix: (K_new, K_old) float64: old B_k = Σ_j matrix[j, k] new B_j, nearly.
        error: the largest miss over points and functions, relative to each old function's largest value.
    """

    matrix: Tensor
    error: float


def conversion(old: Basis, new: Basis) -> Conversion:
    """By least squares: over the domain where both squash alike, and then exact for functions that the new basis holds;
    else over normally distributed inputs.

    Raises:
        SpecError: a basis with learned parameters, whose functions differ between channels.
    """
    for basis in (old, new):
        if any(True for _ in basis.parameters()):
            raise SpecError(f"'{basis.name}' is learned itself, channel by channel; its functions cannot be converted")
    if old.squash == new.squash:
        low, high = DOMAINS[old.squash]
        nodes = torch.cos(torch.linspace(0, torch.pi, POINTS, dtype=torch.float64))  # dense at the ends
        before = after = ((high - low) / 2 * nodes + (high + low) / 2)[:, None]
        weights = torch.ones(POINTS, 1, dtype=torch.float64)
    else:
        z = torch.linspace(-4, 4, POINTS, dtype=torch.float64)[:, None]
        before, after = (z if basis.squash == "norm" else SQUASHES[basis.squash](z) for basis in (old, new))
        weights = torch.exp(-z.square() / 4)  # the root of the normal density
    values, targets = new(after)[..., 0] * weights, old(before)[..., 0] * weights
    matrix = torch.linalg.lstsq(values, targets, driver="gelsd").solution
    misses = (values @ matrix - targets).abs().amax(0) / targets.abs().amax(0)
    return Conversion(matrix, float(misses.max()))


@torch.no_grad()
def convert_layer(old: KANLinear, new: KANLinear) -> float:
    """Gives `new` the functions of `old`, a layer of equal shape; returns the conversion's error.

    Raises:
        SpecError: the shapes differ, or the new layer lacks a path that the old one has.
    """
    if (old.in_features, old.out_features) != (new.in_features, new.out_features):
        raise SpecError(
            f"a layer of {old.in_features} -> {old.out_features} cannot become one of {new.in_features} -> "
            f"{new.out_features}: keep the form and the hidden size"
        )
    if (old.linear is not None and new.linear is None) or (old.scale is None) != (new.scale is None):
        raise SpecError("the linear path and the input scale must be kept when a basis is changed")
    changed = conversion(old.basis, new.basis)
    matrix = changed.matrix.to(old.coefficients.device)
    offset = old.basis.size - old.coefficients.shape[1]
    values = torch.einsum("jk,oki->oji", matrix[:, offset:], old.coefficients.double())  # (O, K_new, I)
    bias = torch.zeros(old.out_features, dtype=torch.float64, device=values.device)
    if old.bias is not None:
        bias += old.bias.double()
    if new.coefficients.shape[1] < new.basis.size:  # the constants of all edges fold into the bias
        bias += values[:, 0].sum(-1) * _constant_of(new.basis)
    functions = values[:, new.basis.size - new.coefficients.shape[1] :]
    linear = torch.zeros(0) if old.linear is None else old.linear.double()
    rest = [] if new.linear is None else [linear if old.linear is not None else torch.zeros_like(new.linear).double()]
    new.load_matrix(torch.cat([functions.flatten(1), *rest], dim=1), bias)
    if new.scale is not None and old.scale is not None:
        new.scale.copy_(old.scale)
    return changed.error


def convert_module(old: nn.Module, new: nn.Module) -> float:
    """Gives every layer of `new` the functions of the same layer of `old`; returns the largest error.

    Raises:
        SpecError: another form or number of layers; see convert_layer.
    """
    if isinstance(old, KANLinear) and isinstance(new, KANLinear):
        return convert_layer(old, new)
    if not (isinstance(old, KANFeedForward) and isinstance(new, KANFeedForward) and old.form == new.form != "glu"):
        raise SpecError("a basis is changed within one of the forms stack, single and gated; this block holds another")
    pairs = list(zip(old.kan_layers(), new.kan_layers(), strict=True))
    error = max(convert_layer(before, after) for before, after in pairs)
    for before, after in zip(old.linear_layers(), new.linear_layers(), strict=True):
        after.load_state_dict(before.state_dict())
    return error


def _constant_of(basis: Basis) -> float:
    return float(basis(torch.zeros(1, dtype=torch.float64))[0, 0])
