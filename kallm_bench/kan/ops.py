"""kan_linear: the one function every KAN layer goes through."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kallm_bench.kan.bases import SQUASHES, Basis


def kan_linear(x: Tensor, coefficients: Tensor, basis: Basis, bias: Tensor | None = None) -> Tensor:
    """A learned univariate function on every edge: y[o] = bias[o] + Σ_k Σ_i c[o,k,i] B_k(squash(x[i])).

    The functions of all edges share one basis, so the layer is an expansion of the input to K·I features and a single
    matrix product.

    Args:
        x: raw input (..., I); the basis's own squash is applied here.
        coefficients: (O, K, I), or (O, K-1, I) for a basis whose constant B_0 is folded into the bias.
        basis: the basis, of K functions.
        bias: (O,) or None.

    Returns:
        (..., O), in the dtype of x (under autocast, in autocast's).
    """
    features = basis(SQUASHES[basis.squash](x))  # (..., K, I)
    features = features[..., basis.size - coefficients.shape[1] :, :]  # B_0 left out where the bias stands for it
    return F.linear(features.flatten(-2), coefficients.flatten(1), bias)
