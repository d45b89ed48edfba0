"""The kernels in which warps divide the work, on a Hopper GPU; and anywhere, that each of their plans fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact, poisoned
from test_kernel_layer import make_inputs, output_and_gradients
from torch import Tensor

from kallm_bench.kan import ops
from kallm_bench.kan.kernels import hopper, layer
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.hopper_plans import (
    HALVED,
    HALVED_GRADIENTS,
    LOCAL_HALVED,
    LOCAL_HALVED_GRADIENTS,
    LOCAL_PIPED,
    SPECIALISED,
    Halved,
    HalvedGradient,
    LocalHalved,
    LocalHalvedGradient,
    LocalPiped,
    Specialised,
)

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
SHARED_MEMORY = 232_448  # bytes that a program may have on Hopper
BARRIERS = 2048  # bytes, at most, and what Triton hands to the other warps
SHAPES = [(136, 80, 200), (1000, 200, 136), (128, 64, 128), (300, 136, 520)]  # rows, in, out
REPEATS = 10
PLANS: dict[str, dict[str, Specialised | Halved | HalvedGradient]] = {
    "forward": {**SPECIALISED["forward"], **HALVED},
    "coefficient_gradient": {**SPECIALISED["coefficient_gradient"], **HALVED_GRADIENTS},
}
EACH = [(operation, name) for operation, plans in PLANS.items() for name in plans]
NAMED = [(*each, degree) for each in EACH for degree in range(1, PLANS[each[0]][each[1]].degrees + 1)]
LOCAL: dict[str, dict[str, LocalHalved | LocalHalvedGradient | LocalPiped]] = {
    "forward": {**LOCAL_HALVED},
    "input_gradient": {**LOCAL_PIPED},
    "coefficient_gradient": {**LOCAL_HALVED_GRADIENTS},
}
LOCAL_NAMED = [(operation, name) for operation, plans in LOCAL.items() for name in plans]


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    skipped = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU, whose tensor cores these kernels use")
    marked: Callable[..., None] = pytest.mark.gpu(skipped(test))
    return marked


def run(operation: str, plan: Any, basis: Any, x: Tensor, c: Tensor, bias: Tensor | None, dy: Tensor) -> Tensor:
    """y, dx or dc, in memory that was not cleared."""
    found = ops._family(basis)
    assert found
    family = Family(found[0], tuple(found[1]), basis.squash)
    with poisoned():
        like = {"forward": dy, "input_gradient": x, "coefficient_gradient": c}[operation]
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if operation == "forward":
            hopper.forward(x, c, bias, out, family, plan)
        elif operation == "input_gradient":
            hopper.input_gradient(x, c, dy, out, family, plan)
        else:
            hopper.coefficient_gradient(x, dy, out, family, plan)
        torch.cuda.synchronize()
    return out


def run_local(operation: str, plan: str, basis: Any, x: Tensor, c: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    """As `run`, with the norm that Gaussians need before."""
    found = ops._family(basis)
    assert found
    with poisoned():
        if operation == "forward":
            out: Tensor = layer.edge_functions(x, c, bias, *found, basis.squash, plan)
        elif operation == "input_gradient":
            out = layer.input_gradient(dy, x, c, *found, basis.squash, plan)
        else:
            out = layer.coefficient_gradient(dy, x, *found, basis.squash, plan)
        torch.cuda.synchronize()
    return out


def assert_as_accurate(operation: str, out: Tensor, inputs: list[Any], dtype: torch.dtype) -> None:
    what = {"forward": "y", "input_gradient": "dx", "coefficient_gradient": "dc"}[operation]
    truth, reference = (
        {what: output_and_gradients("reference", kind, *inputs)[what]} for kind in (torch.float64, dtype)
    )
    assert_as_exact(truth, reference, {what: out}, dtype)


@on_hopper
@pytest.mark.parametrize("processors", [3, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operation", "name", "degree"), NAMED, ids=str)
def test_every_plan_is_as_accurate_as_the_reference_and_the_same_bits_each_time(
    operation: str,
    name: str,
    degree: int,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With 3 processors persistent programs make several tiles, and rows are not parted; with 132 they are."""
    monkeypatch.setattr(hopper, "_processors", lambda device: processors)
    inputs = make_inputs("cheby2", shape, dtype, degree)
    outs = [run(operation, PLANS[operation][name], *inputs) for _ in range(REPEATS)]
    assert_as_accurate(operation, outs[0], inputs, dtype)
    assert all(torch.equal(out, outs[0]) for out in outs)


@on_hopper
@pytest.mark.parametrize("processors", [3, 132])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bspline", "bspline:grid=1,order=2", "rbf:centers=2"])
@pytest.mark.parametrize(("operation", "plan"), LOCAL_NAMED)
def test_local_functions_are_as_accurate_as_the_reference_and_the_same_bits_each_time(
    operation: str,
    plan: str,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 520 outputs dy does not stay in shared memory all at once."""
    monkeypatch.setattr(hopper, "_processors", lambda device: processors)
    inputs = make_inputs(name, shape, dtype)
    outs = [run_local(operation, plan, *inputs) for _ in range(REPEATS)]
    assert_as_accurate(operation, outs[0], inputs, dtype)
    assert all(torch.equal(out, outs[0]) for out in outs)


@on_hopper
@pytest.mark.parametrize("family", ["charlier", "laguerre", "lucas"])  # with a sigmoid; with B; with P_0 = 2
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("operation", "name"), EACH)
def test_every_family(operation: str, name: str, dtype: torch.dtype, family: str) -> None:
    plan = PLANS[operation][name]
    inputs = make_inputs(family, (300, 72, 40), dtype, min(3, plan.degrees))
    assert_as_accurate(operation, run(operation, plan, *inputs), inputs, dtype)


@on_hopper
@pytest.mark.parametrize(("operation", "name"), [*EACH, *LOCAL_NAMED])
def test_what_lies_around_is_not_read(operation: str, name: str) -> None:
    """x, dy and the coefficients as parts of larger tensors, full of NaN elsewhere; and no bias."""
    dtype, plan = torch.bfloat16, {**LOCAL[operation], **PLANS.get(operation, {})}[name]
    if isinstance(plan, LocalHalved | LocalHalvedGradient | LocalPiped):
        basis, x, c, bias, dy = make_inputs("bspline", (136, 80, 200), dtype)
    else:
        basis, x, c, bias, dy = make_inputs("cheby2", (136, 80, 200), dtype, min(2, plan.degrees))

    def within(tensor: Tensor, *more: int) -> Tensor:
        """The same values, at the end of the first dimension and at the start of the last."""
        around = torch.full([size + by for size, by in zip(tensor.shape, more, strict=True)], torch.nan)
        part = around.to(tensor)[8:, ..., : tensor.shape[-1]]
        part = part[:, 1:] if tensor.ndim == 3 else part
        return part.copy_(tensor)

    apart = run(operation, plan, basis, within(x, 8, 8), within(c, 8, 1, 16), None, within(dy, 8, 24))
    assert_as_accurate(operation, apart, [basis, x, c, torch.zeros_like(bias), dy], dtype)


@pytest.mark.parametrize(("operation", "name", "degree"), NAMED, ids=str)
def test_every_plan_fits(operation: str, name: str, degree: int) -> None:
    plan = PLANS[operation][name]
    if isinstance(plan, Halved):
        assert_halves_fit(plan, degree)
        return
    if isinstance(plan, HalvedGradient):
        assert_gradient_halves_fit(plan, degree)
        return
    features, ring = plan.rings[degree - 1]
    tile, wide = plan.rows * plan.inputs, sum(plan.outputs)
    if operation == "forward":
        elements = (plan.x_tiles + features) * tile + ring * wide * plan.inputs
        elements += 2 * plan.rows * hopper.PIECE * plan.persistent
        assert features > degree  # something is expanded while the last step is multiplied
        assert plan.persistent or ring * plan.inputs >= plan.rows  # y goes through the coefficients' ring
        assert plan.outputs[0] % hopper.PIECE == 0
        sums = plan.rows * wide
    else:
        elements = (plan.x_tiles + features * degree) * tile + ring * plan.rows * wide
        assert features > 1
        sums = wide * degree * plan.inputs
    assert 2 * elements + BARRIERS <= SHARED_MEMORY
    assert plan.rows % plan.at_once == plan.at_once % (plan.expanders * 256 // plan.inputs) == 0
    registers = 65_536 // (32 * (8 + plan.expanders)) // 8 * 8  # of each thread, before any are given away
    multiplying = ((8 + plan.expanders) * registers - plan.expanders * plan.registers) // 8
    assert sums // 256 + 24 <= multiplying // 8 * 8


@pytest.mark.parametrize(("operation", "name"), LOCAL_NAMED)
def test_every_local_plan_fits(operation: str, name: str) -> None:
    plan = LOCAL[operation][name]
    if isinstance(plan, LocalHalved):
        width, values = sum(plan.outputs), plan.rows * plan.inputs // 256  # a thread's, of a step
        elements = (2 * plan.rows + plan.stages * width) * plan.inputs + plan.pieces * plan.rows * hopper.SMALL_PIECE
        registers = plan.rows * width // 256 + values + 2 * values // 2  # sums, places on the grid, features twice
        assert plan.rows % 128 == 0
        assert all(outputs % hopper.SMALL_PIECE == 0 for outputs in plan.outputs)
    elif isinstance(plan, LocalHalvedGradient):
        width, values = sum(plan.outputs), plan.rows * 64 // 128
        elements = plan.stages * plan.rows * (64 + width)
        registers = width // 2 + 2 * values // 2
    else:
        inputs = plan.pieces * 64
        elements = 128 * inputs + plan.blocks * 128 * 64 + plan.stages * 64 * inputs + 128 * hopper.SMALL_PIECE
        registers = 3 * inputs // 2  # a function's sums, those of all, and places on the grid
    assert 2 * elements + BARRIERS <= SHARED_MEMORY
    assert registers + 8 <= 240
    assert plan.stages > 2  # of which the products read one, and the expansion another


def assert_halves_fit(plan: Halved, degree: int) -> None:
    (stages, pieces), width = plan.rings[degree - 1], sum(plan.outputs)
    elements = stages * (plan.rows + degree * width) * plan.inputs + pieces * plan.rows * hopper.SMALL_PIECE
    assert 2 * elements + BARRIERS <= SHARED_MEMORY
    assert stages > 2  # of which the products read one, and the expansion another
    assert plan.rows % 128 == 0  # of four warps, each with multiples of 16 rows, in either half
    assert all(outputs % hopper.SMALL_PIECE == 0 for outputs in plan.outputs)
    features = plan.rows * plan.inputs * degree // 512  # registers of a thread, twice: multiplied by, and expanded
    assert plan.rows * width // 256 + 2 * features + 8 <= 240


def assert_gradient_halves_fit(plan: HalvedGradient, degree: int) -> None:
    (rows, stages), width, rings = plan.rings[degree - 1], sum(plan.outputs), 128 // plan.inputs
    assert plan.inputs in (64, 128)
    assert 2 * stages * rings * rows * (plan.inputs + width) + BARRIERS <= SHARED_MEMORY
    assert stages > 2  # of which the products read one, and the expansion another
    assert rings == 1 or stages * rows >= (degree + 1) // 2 * 128  # half of a group's sums go through its ring
    features = rows * 64 * degree // 256  # registers of a thread, twice: multiplied by, and expanded
    assert width * degree // 2 + 2 * features + 8 <= 240


def test_gluon_is_not_imported_before_a_kernel_is_launched() -> None:
    program = "import sys, kallm_bench.kan.kernels.hopper; sys.exit('triton.experimental.gluon' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
