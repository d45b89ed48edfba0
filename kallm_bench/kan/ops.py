"""The two functions every KAN layer goes through, and the one place that chooses between truth and speed."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

import kallm_bench.kan.reference as reference
from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import SQUASHES, Basis
from kallm_bench.kan.bases.bspline import BSpline
from kallm_bench.kan.bases.rational import Rational, RationalAbs
from kallm_bench.kan.bases.rbf import GaussianRBF
from kallm_bench.kan.bases.three_term import ThreeTerm

if importlib.util.find_spec("triton"):  # Linux alone has it
    from kallm_bench.kan.kernels import layer, local, rational  # each registers operators in torch.ops.kallm
    from kallm_bench.kan.kernels.device import runs_on as runs_on
else:

    def runs_on(device: torch.device) -> bool:
        return False


BACKENDS = ("auto", "reference", "triton")
"""`reference` is the bases' own PyTorch; `triton` the kernels; `auto` these on a GPU wherever they are, else that."""


def kan_linear(
    x: Tensor,
    coefficients: Tensor,
    basis: Basis,
    bias: Tensor | None = None,
    linear: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`reference.kan_linear`, by a kernel where one can.

    Args:
        x, coefficients, basis, bias, linear: as there.
        backend: a name of BACKENDS. Second derivatives and torch.func need "reference".

    Returns:
        (..., O), in the dtype of x (under autocast, in autocast's).

    Raises:
        SpecError: no such backend, or "triton" where it cannot be.
    """
    family = _family(basis)
    if not _fast(backend, x, coefficients, basis, known=family is not None):
        return reference.kan_linear(x, coefficients, basis, bias, linear)
    assert family is not None
    dtype = _product_dtype(x)
    if basis.constant and coefficients.shape[1] == basis.size:  # the constant function adds the same to every row
        constant = family[1][0] * coefficients[:, 0].sum(-1)
        coefficients, bias = coefficients[:, 1:], constant if bias is None else constant + bias
    bias = bias if bias is None else bias.to(dtype)
    # as F.linear under autocast: kernels take x and coefficients in one dtype, and it is what backward keeps
    y: Tensor = layer.edge_functions(x.to(dtype), coefficients.to(dtype), bias, *family, basis.squash)
    return y if linear is None else y + F.linear(x, linear)


def group_function(x: Tensor, basis: Basis, coefficients: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`reference.group_function`, by a kernel where one can.

    Args:
        x, basis, coefficients: as there.
        backend: a name of BACKENDS.

    Returns:
        (..., features).
    """
    known = isinstance(basis, Rational) if coefficients is None else isinstance(basis, BSpline | GaussianRBF)
    if _fast(backend, x, x, basis, known=known):
        if isinstance(basis, Rational):
            return rational.rational(x, basis.numerator, basis.denominator, isinstance(basis, RationalAbs))
        assert coefficients is not None
        order = basis.order if isinstance(basis, BSpline) else 0
        x, squash = (SQUASHES["norm"](x), "none") if basis.squash == "norm" else (x, basis.squash)
        return local.group_local(x, coefficients, basis.name, order, squash)
    return reference.group_function(x, basis, coefficients)


def _family(basis: Basis) -> tuple[str, list[float]] | None:
    """A basis as `layer.edge_functions` takes it, or None where there is no kernel for it."""
    if isinstance(basis, ThreeTerm):
        return "polynomial", [basis.first, *(number for n in range(basis.size - 1) for number in basis.step(n))]
    if isinstance(basis, BSpline):
        return "bspline", [float(basis.grid), float(basis.order)]
    return ("rbf", [float(basis.size)]) if isinstance(basis, GaussianRBF) else None


def _fast(backend: str, x: Tensor, parameter: Tensor, basis: Basis, *, known: bool) -> bool:
    """Whether a kernel computes this; `known` is whether there is one for the basis. SpecError where there must be."""
    if backend not in BACKENDS:
        raise SpecError(unknown("backend", backend, BACKENDS))
    if backend == "auto":
        if not known or x.device.type != "cuda" or not runs_on(x.device) or x.dtype == torch.float64:
            return False
        return parameter.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
    if backend == "reference":
        return False
    if not known:
        raise SpecError(f"there is no kernel for basis '{basis.name}'; take backend 'auto'")
    if x.dtype == torch.float64:
        raise SpecError("kernels compute in float32 at most; for float64 take backend 'auto'")
    if not runs_on(x.device):
        raise SpecError(f"kernels run on an NVIDIA GPU, not on '{x.device}'; take backend 'auto' or TRITON_INTERPRET=1")
    return True


def _product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products are computed in: autocast's dtype where that is on, else x's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
