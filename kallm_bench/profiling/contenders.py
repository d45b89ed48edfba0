"""Who is timed on a problem: our layer, the same in plain and compiled PyTorch, what it replaces, packages, the limit.

The limit of a layer with a function on every edge is what remains if the expansion costs nothing: the three products
of the library on features that lie ready, of width K·I, as the expansion makes them. Forward is F·Wᵀ; the gradient of
the input must pass through dY·W, and that of the coefficients is dYᵀ·F. A function per channel group has no product
and is bound by memory: forward reads x and writes y, backward reads x and dy and writes dx, so its limit is a copy of
as many bytes.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kallm_bench.kan import KANLinear
from kallm_bench.kan.bases import SQUASHES, make_basis
from kallm_bench.kan.bases.base import read_arguments
from kallm_bench.kan.bases.bspline import BSpline
from kallm_bench.kan.bases.rbf import GaussianRBF
from kallm_bench.kan.layers import GroupFunction
from kallm_bench.kan.ops import group_function, kan_linear, runs_on
from kallm_bench.kan.reference import expand

INPUT_SETS = 4
"""Inputs that calls take in turn, so that none is found in the cache where the call before has left it."""


SPARSE_ROWS = 2048
"""Rows that the sparse product takes at once: embedding_bag's backward counts its partial sums in 32 bits."""


class NotPossibleError(Exception):
    """A contender that cannot compete on a problem, and why. It becomes a row of the table, never an error."""


@dataclass(frozen=True)
class Setup:
    """A problem with its numbers drawn: the layer at its random start, inputs ~ N(0, 1), the gradient of its output.

    Args:
        basis: the problem's basis, by name.
        layer: of which all values are in the dtype of the inputs.
        inputs: INPUT_SETS of (M, I), each requiring gradients.
        dy: (M, O).
    """

    basis: str
    layer: KANLinear | GroupFunction
    inputs: tuple[Tensor, ...]
    dy: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, I, O."""
        return len(self.dy), self.inputs[0].shape[1], self.dy.shape[1]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Args:
        forward: the output for the inputs of this number, as in training, with what its backward needs.
        both: the output, then the gradients of the input and of each of `learned`.
        learned: its parameters.
        ours: whether it computes what the problem says, so that float64 can tell whether it is right.
        layer: whether it is a layer, of which it can be asked what it saves.
    """

    forward: Callable[[int], Tensor]
    both: Callable[[int], tuple[Tensor, ...]]
    learned: tuple[Tensor, ...] = ()
    ours: bool = False
    layer: bool = True


def draw(
    basis: str, tokens: int, in_features: int, out_features: int | None, device: torch.device, dtype: torch.dtype
) -> Setup:
    """The numbers of a problem, the same each time. No `out_features`: a function per channel group."""
    generator = torch.Generator(device).manual_seed(0)
    layer = GroupFunction(in_features, basis) if out_features is None else KANLinear(in_features, out_features, basis)
    if isinstance(layer, KANLinear):
        layer.reset_parameters(torch.Generator().manual_seed(0))
    elif layer.coefficients is not None:
        nn.init.normal_(layer.coefficients, generator=torch.Generator().manual_seed(0))

    def normal(width: int) -> Tensor:
        return torch.randn(tokens, width, generator=generator, device=device).to(dtype)

    inputs = tuple(normal(in_features).requires_grad_() for _ in range(INPUT_SETS))
    return Setup(basis, layer.to(device, dtype), inputs, normal(out_features or in_features))


def apply(layer: KANLinear | GroupFunction, x: Tensor, backend: str) -> Tensor:
    """What a problem's layer computes, by a backend of ours."""
    if isinstance(layer, KANLinear):
        return kan_linear(x, layer.coefficients, layer.basis, layer.bias, backend=backend)
    return group_function(x, layer.basis, layer.coefficients, backend=backend)


def true_layer(setup: Setup) -> Contender:
    """The reference in float64 on the same values, as close to the truth as can be had."""
    wide = copy.deepcopy(setup.layer).double()
    x = setup.inputs[0].detach().double().requires_grad_()
    return _differentiated(lambda x: apply(wide, x, "reference"), wide, (x,), setup.dy.double())


def _ours(backend: str, compiled: bool = False) -> Callable[[Setup], Contender]:
    def make(setup: Setup) -> Contender:
        def call(x: Tensor) -> Tensor:
            return apply(setup.layer, x, backend)

        chosen = torch.compile(call, dynamic=False) if compiled else call
        return _differentiated(chosen, setup.layer, setup.inputs, setup.dy, ours=True)

    return make


plain_layer = _ours("reference")
"""Plain PyTorch in the problem's dtype: what a kernel may be twice as wrong as."""


def _sparse(setup: Setup) -> Contender:
    """Of a local family the few functions that are not zero, each with its row of the coefficients.

    In float32 inside, whatever the problem's dtype: embedding_bag has no gradient for its weights in bfloat16.
    """
    layer, basis = setup.layer, setup.layer.basis
    if not isinstance(layer, KANLinear) or not isinstance(basis, BSpline | GaussianRBF):
        raise NotPossibleError("every function of this family counts everywhere")
    local = importlib.import_module("kallm_bench.kan.kernels.local")
    if not runs_on(setup.dy.device):
        raise NotPossibleError("kernels need a GPU")
    order = basis.order if isinstance(basis, BSpline) else 0
    normalised = basis.squash == "norm"
    coefficients, bias = layer.coefficients, layer.bias

    def call(x: Tensor) -> Tensor:
        x, squash = (SQUASHES["norm"](x), "none") if normalised else (x, basis.squash)
        table = coefficients.permute(1, 2, 0).flatten(0, 1).float()
        parts = []
        for rows in torch.split(x.float(), SPARSE_ROWS):
            near, first = local.local_values(rows, basis.name, basis.size - order, order, squash)
            parts.append(local.sparse_edge_product(near, first, table))
        y: Tensor = torch.cat(parts).to(x.dtype)
        return y if bias is None else y + bias

    return _differentiated(call, layer, setup.inputs, setup.dy, ours=True)


def _linear(setup: Setup) -> Contender:
    _, wide_in, wide_out = setup.shape
    layer = nn.Linear(wide_in, wide_out, device=setup.dy.device, dtype=setup.dy.dtype)
    return _differentiated(layer, layer, setup.inputs, setup.dy)


def _gelu(setup: Setup) -> Contender:
    return _differentiated(F.gelu, None, setup.inputs, setup.dy)


def _products(setup: Setup) -> Contender:
    layer, dy = setup.layer, setup.dy
    assert isinstance(layer, KANLinear)
    weights = layer.coefficients.detach().flatten(1)  # (O, K·I)
    functions = layer.coefficients.shape[1]
    with torch.no_grad():
        features = [expand(x, layer.basis, functions).contiguous() for x in setup.inputs]  # each (M, K·I)

    def forward(number: int) -> Tensor:
        return features[number % INPUT_SETS] @ weights.T

    def both(number: int) -> tuple[Tensor, ...]:
        return forward(number), dy @ weights, dy.T @ features[number % INPUT_SETS]

    return Contender(forward, both, layer=False)


def _copies(setup: Setup) -> Contender:
    sources = [x.detach() for x in setup.inputs]
    there = torch.empty_like(setup.dy)
    half_more = sources[0].new_empty(2, sources[0].numel() * 3 // 2)  # read x and dy, write dx: a copy of 1.5 x

    def forward(number: int) -> Tensor:
        return there.copy_(sources[number % INPUT_SETS])

    def both(number: int) -> tuple[Tensor, ...]:
        return forward(number), half_more[0].copy_(half_more[1])

    return Contender(forward, both, layer=False)


# --- packages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A package from PyPI with a KAN layer of B-splines.

    Args:
        module: where its `KANLayer` is.
        version: the one this was written against.
    """

    module: str
    version: str

    def layer(self, name: str) -> Any:
        """Its class of layers. NotPossibleError where it, or what it needs, is not installed."""
        try:
            return importlib.import_module(self.module).KANLayer
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == self.module.partition(".")[0]:
                raise NotPossibleError(f"not installed: pip install --no-deps {name}=={self.version}") from error
            raise NotPossibleError(f"it needs {error.name}, which is not installed") from error


PACKAGES = {
    "inkan": Package("inkan", "0.5.2"),
    "flashkan": Package("flashkan", "0.2.0"),
    "pykan": Package("kan.KANLayer", "0.2.8"),
}

PYKAN_VALUES = {"cuda": 2**28, "cpu": 2**25}
"""Most values M·I·O that pykan is asked for, by device: it holds some ten float32 tensors of that many."""


def _compiled_package(name: str) -> Callable[[Setup], Contender]:
    """inkan and flashkan: drop-in layers, at their best compiled as a whole, in the problem's dtype."""

    def make(setup: Setup) -> Contender:
        _, wide_in, wide_out = setup.shape
        grid = _grid(setup.basis)
        layer = PACKAGES[name].layer(name)(wide_in, wide_out, grid_size=grid).to(setup.dy.device, setup.dy.dtype)
        return _differentiated(torch.compile(layer, dynamic=False), layer, setup.inputs, setup.dy)

    return make


def _pykan(setup: Setup) -> Contender:
    """pykan's layer gives four results, of which the first is the output, and every edge's value on the way."""
    tokens, wide_in, wide_out = setup.shape
    grid = _grid(setup.basis)
    if tokens * wide_in * wide_out > PYKAN_VALUES[setup.dy.device.type]:
        raise NotPossibleError(
            f"it holds the value of every edge for every token, {tokens:,} x {wide_in} x {wide_out} several times over;"
            " fewer tokens are needed"
        )
    layer = PACKAGES["pykan"].layer("pykan")(in_dim=wide_in, out_dim=wide_out, num=grid, device=setup.dy.device)
    inputs = tuple(x.detach().float().requires_grad_() for x in setup.inputs)
    return _differentiated(lambda x: layer(x)[0], layer, inputs, setup.dy.float())


def _grid(basis: str) -> int:
    """The intervals of the problem's own splines, so that a package's are as many; 5, their default, elsewhere."""
    family, _, text = basis.partition(":")
    if family != "bspline":
        return 5
    if read_arguments(family, text).get("order", 3) != 3:
        raise NotPossibleError("its splines are cubic alone")
    return int(getattr(make_basis(basis), "grid"))  # noqa: B009 - of BSpline, whatever it defaults to


# --- the table --------------------------------------------------------------------------------------------------------

LAYERS: Mapping[str, Callable[[Setup], Contender]] = {
    "kallm": _ours("auto"),
    "reference": plain_layer,
    "compiled": _ours("reference", compiled=True),
    "sparse": _sparse,
    "linear": _linear,
    "limit": _products,
    "inkan": _compiled_package("inkan"),
    "flashkan": _compiled_package("flashkan"),
    "pykan": _pykan,
}
"""Contenders for a layer with a function on every edge."""

ACTIVATIONS: Mapping[str, Callable[[Setup], Contender]] = {
    "kallm": _ours("auto"),
    "reference": plain_layer,
    "compiled": _ours("reference", compiled=True),
    "gelu": _gelu,
    "limit": _copies,
}
"""Contenders for a function per channel group."""


def _differentiated(
    call: Callable[[Tensor], Tensor],
    module: nn.Module | None,
    inputs: Sequence[Tensor],
    dy: Tensor,
    ours: bool = False,
) -> Contender:
    """The contender that calls `call` and differentiates it by its input and what `module` learns."""
    learned = tuple(each for each in module.parameters() if each.requires_grad) if module else ()

    def forward(number: int) -> Tensor:
        return call(inputs[number % len(inputs)])

    def both(number: int) -> tuple[Tensor, ...]:
        x = inputs[number % len(inputs)]
        y = call(x)
        return (y, *torch.autograd.grad(y, [x, *learned], dy))

    return Contender(forward, both, learned, ours)
