"""The kernels for functions of small support against kan.bases.bspline and rbf, scipy and numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact, poisoned
from scipy.interpolate import BSpline
from torch import Tensor

from kallm_bench.kan.bases import SQUASHES, Basis, make_basis
from kallm_bench.kan.kernels import local as module
from kallm_bench.kan.kernels.local import NEAREST, group_local, local_values, sparse_edge_product
from kallm_bench.kan.kernels.tiles import Launch
from kallm_bench.kan.reference import group_of_squashed

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [  # kind, size, order, squash
    ("bspline", 1, 1, "none"),
    ("bspline", 5, 3, "tanh"),
    ("bspline", 8, 2, "sigmoid"),
    ("bspline", 50, 5, "tanh"),
    ("rbf", 2, 0, "none"),
    ("rbf", 8, 0, "tanh"),
    ("rbf", 50, 0, "none"),
]
SHAPES = [(1, (1,)), (3, (2, 3, 15)), (2, (16, 64)), (3, (11, 72))]  # groups, shape: one element, odd, exact, ragged


def make_basis_of(kind: str, size: int, order: int) -> Basis:
    return make_basis(kind, grid=size, order=order) if kind == "bspline" else make_basis(kind, centers=size)


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rising(groups: int, size: int) -> Tensor:
    """Coefficients (groups, size) of functions that rise, so that neither they nor their slopes cancel to nothing."""
    return normal((groups, size), seed=2) + torch.arange(size, device=DEVICE)


def slabs(values: Tensor, first: Tensor, size: int) -> Tensor:
    """Compact values (..., J, I), each put into its slab of (..., size, I)."""
    number = first.long().unsqueeze(-2) + torch.arange(values.shape[-2], device=DEVICE)[:, None]
    empty = values.new_zeros(*first.shape[:-1], size, first.shape[-1])
    return empty.scatter(-2, number, values)


@pytest.mark.parametrize("grid", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_splines_are_those_of_scipy(grid, order):
    x = torch.cat([torch.linspace(-1, 1, 41), 2 * torch.rand(159, generator=torch.Generator().manual_seed(0)) - 1])
    values, first = local_values(x.to(DEVICE), "bspline", grid, order)
    knots = -1 + 2 / grid * np.arange(-order, grid + order + 1)
    knots[order], knots[-order - 1] = -1, 1  # exactly, for x at the ends
    expected = BSpline.design_matrix(x.double().numpy(), knots, order).toarray().T  # (K, I)
    assert values.shape == (order + 1, 200)
    kinks = grid * 2**-23 if order == 1 else 0  # rounding decides which of two straight pieces x near a knot is on
    assert np.abs(slabs(values, first, grid + order).cpu().numpy() - expected).max() < 1e-6 + kinks


@pytest.mark.parametrize("centers", [2, 5, 8, 9, 20, 50])
def test_gaussians_are_those_of_the_formula(centers):
    """All of them: those too far away to be computed are 0 for all purposes."""
    x = torch.linspace(-6, 6, 401)
    values, first = local_values(x.to(DEVICE), "rbf", centers)
    z = (x.double().numpy() - np.linspace(-2, 2, centers)[:, None]) * (centers - 1) / 4
    assert values.shape == (min(centers, NEAREST), 401)
    assert np.abs(slabs(values, first, centers).cpu().numpy() - np.exp(-(z**2))).max() < 1e-6
    kept = slabs(torch.ones_like(values), first, centers).cpu().numpy()
    assert ((1 - kept) * np.exp(-(z**2))).sum(axis=0).max() < 1.2e-7


def values_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor, dvalues: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    values = function(x)
    (dx,) = torch.autograd.grad(values, x, dvalues)
    return {"values": values.detach(), "dx": dx}


@pytest.mark.parametrize(("kind", "size", "order", "squash"), KINDS)
@pytest.mark.parametrize("shape", [shape for _, shape in SHAPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_as_accurate_as_the_reference(kind, size, order, squash, shape, dtype):
    x, basis = normal(shape, dtype), make_basis_of(kind, size, order)
    with poisoned():
        values, first = local_values(x, kind, size, order, squash)
        dvalues = normal(values.shape, dtype, seed=1)
        kernel = values_and_gradient(lambda x: local_values(x, kind, size, order, squash)[0], x, dvalues)
    assert first.min() >= 0
    assert first.max() + values.shape[-2] <= basis.size
    number = first.long().unsqueeze(-2) + torch.arange(values.shape[-2], device=DEVICE)[:, None]

    def reference(x: Tensor) -> Tensor:
        return basis(SQUASHES[squash](x)).gather(-2, number)

    truth = values_and_gradient(reference, x.double(), dvalues.double())
    assert_as_exact(truth, values_and_gradient(reference, x, dvalues), kernel, dtype)


Group = Callable[[Tensor, Tensor], Tensor]


def plain_group(kind: str, size: int, order: int, squash: str) -> Group:
    basis = make_basis_of(kind, size, order)
    return lambda x, coefficients: group_of_squashed(SQUASHES[squash](x), basis, coefficients)


def kernel_group(kind: str, order: int, squash: str) -> Group:
    return lambda x, coefficients: group_local(x, coefficients, kind, order, squash)


def output_and_gradients(function: Group, x: Tensor, coefficients: Tensor, dy: Tensor) -> dict[str, Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, coefficients)]
    y = function(*inputs)
    dx, dc = torch.autograd.grad(y, inputs, dy)
    return {"y": y.detach(), "dx": dx, "dc": dc}


def assert_group_is_as_exact(kind, size, order, squash, x, coefficients, dy):
    plain = plain_group(kind, size, order, squash)
    truth = output_and_gradients(plain, x.double(), coefficients.double(), dy.double())
    with poisoned():
        kernel = output_and_gradients(kernel_group(kind, order, squash), x, coefficients, dy)
    assert kernel["y"].dtype == kernel["dx"].dtype == x.dtype
    assert kernel["dc"].dtype == coefficients.dtype
    assert_as_exact(truth, output_and_gradients(plain, x, coefficients, dy), kernel, x.dtype)


@pytest.mark.parametrize(("kind", "size", "order", "squash"), KINDS)
@pytest.mark.parametrize(("groups", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_is_as_accurate_as_the_reference(kind, size, order, squash, groups, shape, dtype):
    x, dy = normal(shape, dtype), normal(shape, dtype, seed=1)
    assert_group_is_as_exact(kind, size, order, squash, x, rising(groups, size + order), dy)


@pytest.mark.parametrize(("kind", "size", "order"), [("bspline", 200, 3), ("bspline", 128, 2), ("rbf", 256, 0)])
def test_large_grids(kind, size, order):
    x, dy = normal((9, 40)).clamp(-1, 1), normal((9, 40), seed=1)
    assert_group_is_as_exact(kind, size, order, "none", x, rising(1, size + order), dy)


def test_programs_walk_over_many_tiles(monkeypatch):
    """As they do in tensors too large for tests: here the programs are few."""
    monkeypatch.setattr(module, "GROUP_BACKWARD", Launch(chunks=8, warps=1, programs=4))
    x, dy = normal((9, 144)), normal((9, 144), seed=1)
    assert_group_is_as_exact("bspline", 5, 3, "tanh", x, rising(2, 8), dy)


def test_any_strides():
    x, dy, coefficients = normal((20, 6)).T, normal((20, 6), seed=1).T, normal((8, 2), seed=2).T
    assert_group_is_as_exact("bspline", 5, 3, "tanh", x, coefficients, dy)
    values, first = local_values(x, "bspline", 5, 3)
    same_values, same_first = local_values(x.contiguous(), "bspline", 5, 3)
    assert torch.equal(values, same_values)
    assert torch.equal(first, same_first)


def test_no_rows():
    x = normal((2, 0, 12)).requires_grad_()
    values, first = local_values(x, "bspline", 5, 3)
    assert values.shape == (2, 0, 4, 12)
    assert first.shape == (2, 0, 12)
    assert torch.autograd.grad(values.sum(), x)[0].shape == x.shape
    found = output_and_gradients(kernel_group("bspline", 3, "tanh"), x, normal((3, 8)), x)
    assert found["y"].shape == found["dx"].shape == x.shape
    assert not found["dc"].any()


def test_gradients_are_the_same_bits_every_time():
    inputs = normal((29, 16)), normal((2, 8), seed=1), normal((29, 16), seed=2)
    function = kernel_group("bspline", 3, "tanh")
    first = output_and_gradients(function, *inputs)
    for _ in range(9):
        again = output_and_gradients(function, *inputs)
        assert all(torch.equal(again[what], first[what]) for what in first)


@pytest.mark.parametrize(("kind", "size", "order"), [("bspline", 5, 3), ("rbf", 9, 0)])
def test_the_operators_keep_their_promises_to_torch(kind, size, order):
    x, coefficients, settings = normal((3, 8)), normal((2, size + order)), (kind, size, order, "tanh")
    values, _ = local_values(x, *settings)
    operators = torch.ops.kallm
    torch.library.opcheck(operators.local_values.default, (x.clone().requires_grad_(), *settings))
    torch.library.opcheck(operators.local_values_backward.default, (values, x, *settings))
    learned = [x.clone().requires_grad_(), coefficients.clone().requires_grad_()]
    torch.library.opcheck(operators.group_local.default, (*learned, kind, order, "tanh"))
    torch.library.opcheck(operators.group_local_backward.default, (x, x, coefficients, kind, order, "tanh"))


def test_compile_into_one_graph():
    def both(x: Tensor, coefficients: Tensor) -> Tensor:
        values, _ = local_values(x, "rbf", 9, squash="tanh")
        return group_local(x, coefficients, "bspline", 3, "tanh") + values.sum(dim=-2)

    inputs = normal((3, 8)), normal((2, 8), seed=1), normal((3, 8), seed=2)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    eager, graph = output_and_gradients(both, *inputs), output_and_gradients(compiled, *inputs)
    assert all(torch.equal(graph[what], eager[what]) for what in eager)


def test_keep_only_their_inputs_for_the_backward_pass():
    x, coefficients = normal((3, 8)).requires_grad_(), normal((2, 8), seed=1).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        local_values(x, "bspline", 5, 3)
        group_local(x, coefficients, "bspline", 3)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in (x, x, coefficients)]


@pytest.mark.parametrize("shape", [(6,), (5, 3, 6)], ids=str)
def test_sparse_edge_product_is_the_dense_one(shape):
    x, basis = normal(shape), make_basis("bspline", grid=10, order=3)
    coefficients, dy = normal((7, basis.size, 6), seed=1), normal((*shape[:-1], 7), seed=2)

    def sparse(x: Tensor, coefficients: Tensor) -> Tensor:
        values, first = local_values(x, "bspline", 10, 3, "tanh")
        return sparse_edge_product(values, first, coefficients.permute(1, 2, 0).flatten(0, 1))

    def dense(x: Tensor, coefficients: Tensor) -> Tensor:
        return torch.einsum("...ki,oki->...o", basis(torch.tanh(x)), coefficients)

    truth = output_and_gradients(dense, x.double(), coefficients.double(), dy.double())
    plain, kernel = output_and_gradients(dense, x, coefficients, dy), output_and_gradients(sparse, x, coefficients, dy)
    assert_as_exact(truth, plain, kernel, torch.float32)
