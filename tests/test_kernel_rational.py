"""The rational kernel against kan.bases.rational."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact, poisoned
from torch import Tensor

from kallm_bench.kan.bases import make_basis
from kallm_bench.kan.bases import rational as bases_rational
from kallm_bench.kan.kernels import rational as module
from kallm_bench.kan.kernels.rational import rational
from kallm_bench.kan.kernels.tiles import Launch, block_size, chunk_size

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = {"rational": False, "rational-abs": True}

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rational function starts from is not used here, and its fit takes a second each."""
    monkeypatch.setattr(bases_rational, "fitted", lambda family, activation, p, q: ((0.0,) * (p + 1), (0.0,) * q, 0.0))


def make_inputs(
    p: int, q: int, groups: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, numerator, denominator and dy; some of x are 0, where |u| and |x| have no slope."""
    random = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(2))
    x.view(-1)[1::5] = 0
    numerator, denominator = (torch.randn(groups, n, generator=random).to(DEVICE) for n in (p + 1, q))
    return x, numerator, denominator, dy


def reference(family: str) -> Function:
    def function(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        p, q = numerator.shape[1] - 1, denominator.shape[1]
        basis = make_basis(family, numerator=p, denominator=q, groups=len(numerator)).bound(x.shape[-1])
        learned = {"numerator": numerator, "denominator": denominator}
        return torch.func.functional_call(basis, learned, (x,)).squeeze(-2)

    return function


def kernel(family: str) -> Function:
    return lambda x, numerator, denominator: rational(x, numerator, denominator, FAMILIES[family])


def output_and_gradients(
    function: Function, x: Tensor, numerator: Tensor, denominator: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (x, numerator, denominator)]
    y = function(*inputs)
    gradients = torch.autograd.grad(y, inputs, dy)
    return dict(zip(("y", "dx", "d_numerator", "d_denominator"), (y.detach(), *gradients), strict=True))


def assert_kernel_is_as_exact(family: str, inputs: tuple[Tensor, ...]) -> None:
    truth = output_and_gradients(reference(family), *(tensor.double() for tensor in inputs))
    plain = output_and_gradients(reference(family), *inputs)
    with poisoned():
        fused = output_and_gradients(kernel(family), *inputs)
    assert {key: value.dtype for key, value in fused.items()} == {key: value.dtype for key, value in plain.items()}
    assert_as_exact(truth, plain, fused, inputs[0].dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("p", "q", "groups", "shape"),
    [
        (5, 4, 1, (1,)),
        (5, 4, 3, (7, 3, 15)),  # chunks of 1 channel
        (5, 4, 2, (16, 64)),
        (3, 7, 3, (37, 72)),  # a block not full
        (8, 8, 8, (5, 40)),
        (2, 1, 1, (3, 1, 2, 88)),
        (1, 1, 24, (270, 24)),  # sums of many terms, and enough sums that the luck of one does not decide
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_as_accurate_as_the_reference(family, p, q, groups, shape, dtype):
    assert_kernel_is_as_exact(family, make_inputs(p, q, groups, shape, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_walk_over_many_tiles(family, monkeypatch):
    """As they do in tensors too large for tests: here the tiles are small and the programs few."""
    monkeypatch.setattr(module, "FORWARD", Launch(chunks=8, warps=1))
    monkeypatch.setattr(module, "BACKWARD", Launch(chunks=8, warps=1, programs=5))
    assert_kernel_is_as_exact(family, make_inputs(5, 4, 2, (21, 40), torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_a_half_type(family):
    x, numerator, denominator, dy = make_inputs(5, 4, 2, (9, 32), torch.bfloat16)
    assert_kernel_is_as_exact(family, (x, numerator.bfloat16(), denominator.bfloat16(), dy))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_denominator_has_no_slope_it_gets_none(family):
    x, numerator, denominator, dy = make_inputs(5, 4, 2, (6, 16), torch.float32)
    inputs = (x, numerator, torch.zeros_like(denominator), dy)
    assert_kernel_is_as_exact(family, inputs)
    assert not output_and_gradients(kernel(family), *inputs)["d_denominator"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_strides(family):
    x, numerator, denominator, dy = make_inputs(5, 4, 3, (24, 10), torch.float32)
    columns = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (numerator, denominator)]
    assert_kernel_is_as_exact(family, (x.T, *columns, dy.T))
    assert_kernel_is_as_exact(family, (x.T, numerator, denominator, dy[0, :1].expand(10, 24)))


def test_no_rows():
    found = output_and_gradients(kernel("rational"), *make_inputs(5, 4, 3, (2, 0, 12), torch.float32))
    assert found["y"].shape == found["dx"].shape == (2, 0, 12)
    assert not found["d_numerator"].any()
    assert not found["d_denominator"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bits_every_time(family):
    inputs = make_inputs(5, 4, 2, (23, 16), torch.float32)
    first = output_and_gradients(kernel(family), *inputs)
    for _ in range(9):
        again = output_and_gradients(kernel(family), *inputs)
        assert all(torch.equal(again[what], first[what]) for what in first)


def test_poison_poisons():
    like = torch.zeros(3, device=DEVICE)
    with poisoned():
        fresh = [torch.empty(3, device=DEVICE), torch.empty_like(like), like.new_empty(3, dtype=torch.float16)]
    assert all(memory.isnan().all() for memory in fresh)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_operator_keeps_its_promises_to_torch(family):
    x, numerator, denominator, dy = make_inputs(3, 2, 2, (4, 8), torch.float32)
    learned = [tensor.requires_grad_() for tensor in (x, numerator, denominator)]
    torch.library.opcheck(torch.ops.kallm.rational.default, (*learned, FAMILIES[family]))
    fixed = [tensor.detach() for tensor in learned]
    torch.library.opcheck(torch.ops.kallm.rational_backward.default, (dy, *fixed, FAMILIES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_into_one_graph(family):
    inputs = make_inputs(5, 4, 2, (4, 16), torch.float32)
    compiled = torch.compile(kernel(family), fullgraph=True, backend="aot_eager")
    eager, graph = output_and_gradients(kernel(family), *inputs), output_and_gradients(compiled, *inputs)
    assert all(torch.equal(graph[what], eager[what]) for what in eager)


def test_keeps_only_its_inputs_for_the_backward_pass():
    x, numerator, denominator, _ = make_inputs(5, 4, 2, (4, 16), torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in (x, numerator, denominator)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        kernel("rational")(*inputs)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in inputs]


def test_autocast_leaves_the_dtype_of_x():
    x, numerator, denominator, _ = make_inputs(5, 4, 2, (4, 16), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert kernel("rational")(x, numerator, denominator).dtype == torch.float32
        assert kernel("rational")(x.bfloat16(), numerator, denominator).dtype == torch.bfloat16


def test_tiles_waste_little():
    assert [chunk_size(channels, 2) for channels in (192, 72, 36, 15)] == [8, 8, 4, 1]
    assert chunk_size(192, 4) == 4
    assert [block_size(chunks, 32) for chunks in (192, 72, 30, 9, 1)] == [32, 16, 32, 2, 1]
