"""What KAN layers compute, in plain PyTorch: the formula that kernels are held to and that checkpoints carry along."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kallm_bench.kan.bases import SQUASHES, Basis


def expand(x: Tensor, basis: Basis, functions: int) -> Tensor:
    """The last `functions` of a basis's K on every channel of raw x (..., I): (..., functions·I), function by function.

    One less than K leaves out the constant B_0, where a bias stands for it.
    """
    values: Tensor = basis(SQUASHES[basis.squash](x))  # (..., K, I)
    return values[..., basis.size - functions :, :].flatten(-2)


def kan_linear(
    x: Tensor, coefficients: Tensor, basis: Basis, bias: Tensor | None = None, linear: Tensor | None = None
) -> Tensor:
    """A learned univariate function on every edge: y_o = bias_o + Σ_i l[o,i] x_i + Σ_k Σ_i c[o,k,i] B_k(squash(x_i)).

    The functions of all edges share one basis, so the layer is an expansion of the input to K·I features and a single
    matrix product.

    Args:
        x: raw input (..., I); the basis's own squash is applied here.
        coefficients: (O, K, I), or (O, K-1, I) for a basis whose constant B_0 is folded into the bias.
        basis: the basis, of K functions.
        bias: (O,) or None.
        linear: (O, I), the path past the basis, or None.

    Returns:
        (..., O), in the dtype of x (under autocast, in autocast's).
    """
    features, weights = expand(x, basis, coefficients.shape[1]), coefficients.flatten(1)
    if linear is not None:
        features, weights = torch.cat([features, x], dim=-1), torch.cat([weights, linear], dim=1)
    return F.linear(features, weights, bias)


def group_function(x: Tensor, basis: Basis, coefficients: Tensor | None = None) -> Tensor:
    """A learned univariate function for each group of channels: f_g(x) = Σ_k c[g,k] B_k(squash(x)).

    Args:
        x: raw input (..., features); groups are channels side by side.
        basis: bound to the features; to the groups where it learns something and there are coefficients.
        coefficients: (G, K), or None for a basis that is learned for groups by itself, such as `rational`.

    Returns:
        (..., features).
    """
    return group_of_squashed(SQUASHES[basis.squash](x), basis, coefficients)


def group_of_squashed(x: Tensor, basis: Basis, coefficients: Tensor | None) -> Tensor:
    """`group_function` of what the squash gives."""
    if coefficients is None:
        own: Tensor = basis(x)
        return own.squeeze(-2)
    groups, features = len(coefficients), x.shape[-1]
    if any(True for _ in basis.parameters()):  # what it learns is a group's too: channels side by side, groups last
        of_groups: Tensor = basis(
            x.reshape(*x.shape[:-1], groups, features // groups).transpose(-1, -2)
        )  # (..., n, K, G)
        values = of_groups.movedim(-3, -1).flatten(-2)  # (..., K, G·n)
    else:
        values = basis(x)  # (..., K, features)
    weights = coefficients.repeat_interleave(features // groups, dim=0)  # (features, K)
    return (values * weights.T.to(values.dtype)).sum(dim=-2)
