"""kan_linear: the one function every KAN layer goes through."""

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
