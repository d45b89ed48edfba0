"""The kernels of layers with a function on every edge against the bases: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kallm_bench.errors import DeviceError, SpecError
from kallm_bench.kan import BASES, GroupFunction, KANLinear, kan_linear, make_basis, ops
from kallm_bench.kan.kernels import layer, library, passes, plans
from kallm_bench.kan.kernels.device import runs_on
from kallm_bench.kan.ops import group_function
from kallm_bench.profiling import tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FAMILIES = sorted(name for name in BASES if ops._family(make_basis(name)))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = [torch.float32, torch.bfloat16] if DEVICE.type == "cpu" else DTYPES  # the interpreter takes its time
SHAPES = [(1, 1, 1), (3, 17, 5), (70, 80, 136), (37, 48, 24)]  # rows, in, out
REPEATS = 10 if DEVICE.type == "cuda" else 2
ANYWHERE = (plans.Library, plans.Tile, plans.LocalTile)  # the others' kernels are for a Hopper GPU alone
LOCAL = ["rbf:centers=2", "bspline:grid=2"]
"""Functions that local plans expand: an even and an odd number of them."""
NAMED = [
    (operation, name)
    for operation, named in plans.PLANS.items()
    for name, plan in named.items()
    if DEVICE.type == "cuda" or isinstance(plan, ANYWHERE)
]

pytestmark = [
    pytest.mark.skipif(not runs_on(DEVICE), reason="neither a CUDA device nor TRITON_INTERPRET=1"),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What nothing wrote is not a number, so that a kernel which forgets a place, or reads one, is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(name: str, shape: tuple[int, int, int], dtype: torch.dtype, degree: int | None = None) -> list[Any]:
    """A basis, x, coefficients, bias and dy, in a dtype."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    basis = make_basis(name, degree=degree)
    sizes = ((rows, inputs), (outputs, basis.size - basis.constant, inputs), (outputs,), (rows, outputs))
    x, c, bias, dy = (torch.randn(size, generator=generator).to(dtype).to(DEVICE) for size in sizes)
    return [basis, x, c / inputs**0.5, bias, dy]


def output_and_gradients(
    backend: str, dtype: torch.dtype, basis: Any, x: Any, c: Any, bias: Any, dy: Any
) -> dict[str, torch.Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, c, bias)]
    y = kan_linear(leaves[0], leaves[1], basis, leaves[2], backend=backend)
    gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {key: value.detach().double() for key, value in zip(("y", "dx", "dc", "db"), (y, *gradients), strict=True)}


def assert_as_accurate(inputs: list[Any], dtype: torch.dtype) -> None:
    """A kernel may be twice as wrong as plain PyTorch in the same dtype, against float64."""
    truth = output_and_gradients("reference", torch.float64, *inputs)
    reference = output_and_gradients("reference", dtype, *inputs)
    kernel = output_and_gradients("triton", dtype, *inputs)
    for what, true in truth.items():
        rounding = 4 * torch.finfo(dtype).eps * true.abs().max()
        allowed = 2 * (reference[what] - true).abs().max() + rounding
        error = (kernel[what] - true).abs().max()
        assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_is_as_accurate_as_the_reference(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_as_accurate(make_inputs(name, shape, dtype), dtype)


@pytest.mark.parametrize(("operation", "plan"), NAMED, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (64, 64, 128), (136, 80, 200), (200, 24, 16)], ids=str)
@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
def test_every_plan_is_as_accurate_as_the_reference(
    operation: str, plan: str, shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "choose", lambda wanted, *rest: plans.PLANS[wanted][chosen[wanted]])
    chosen = dict.fromkeys(plans.OPERATIONS, "library-16") | {operation: plan}
    if not plan.startswith("library") and DEVICE.type == "cuda" and dtype == torch.float32:
        return  # none fused for it there
    if isinstance(plans.PLANS[operation][plan], plans.Local):
        for name in LOCAL if shape[0] == 136 else LOCAL[:1]:
            assert_as_accurate(make_inputs(name, shape, dtype), dtype)
        return
    degree = next(degree for degree in (2, 1) if plans.can(plans.PLANS[operation][plan], degree, plans.KINDS))
    assert_as_accurate(make_inputs("cheby2", shape, dtype, degree), dtype)


@pytest.mark.parametrize("name", ["cheby2", "jacobi", "charlier"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("way", ["library-16", "tile", *(["hopper"] if DEVICE.type == "cuda" else [])])
def test_every_degree(name: str, degree: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {
        "library-16": dict.fromkeys(plans.OPERATIONS, "library-16"),
        "tile": dict(zip(plans.OPERATIONS, ("tile-64x128-narrow", "tile-64x32", "tile-32x32"), strict=True)),
        "hopper": dict(zip(plans.OPERATIONS, ("warps-128x384x32", "pipe-64-long", "warps-64x128x64"), strict=True)),
    }[way]
    if way == "hopper":
        degree = min(degree, 4)
    monkeypatch.setattr(layer, "choose", lambda wanted, *rest: plans.PLANS[wanted][named[wanted]])
    assert_as_accurate(make_inputs(name, (70, 72, 40), torch.bfloat16, degree), torch.bfloat16)


def test_a_chunk_ends_where_its_buffer_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of rows, and of channels, the last ones ragged, and none smaller than a product is worth."""
    small = plans.Library(70_000)
    monkeypatch.setattr(layer, "choose", lambda *all_of_it: small)
    rows = [chunk for chunk, _ in library.chunks(torch.empty(1200, 300), torch.float32, 2, small)]
    assert rows == [slice(0, 512), slice(512, 1024), slice(1024, 1200)]
    channels = list(library.channel_chunks(1200, 24, 300, 2, torch.float32, small))
    assert channels == [slice(0, 128), slice(128, 256), slice(256, 300)]
    assert_as_accurate(make_inputs("cheby2", (1200, 300, 24), torch.float32), torch.float32)


def test_passes_over_few_channels_waste_no_tile_on_more() -> None:
    assert passes._tile(5) == {"BM": 128, "BI": 8}
    assert passes._tile(576) == {"BM": 16, "BI": 64}
    small = plans.Library(400_000)
    channels = list(library.channel_chunks(200, 24, 28, 53, torch.float32, small))
    assert channels[0] == slice(0, 8)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (130, 70), (1000, 33)], ids=str)
def test_sums_of_columns_by_few_parts(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PARTS", 3)
    dy = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float32)
    assert torch.equal(layer.column_sums(dy), dy.sum(0))  # whole numbers: no rounding, and so no order


@pytest.mark.parametrize("name", ["cheby2", "bspline", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["library-16", "fused"])
def test_any_strides(name: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x transposed, of every other channel, one channel for all, one row for all; a bias of every other number."""
    fused = {plans.Tile: "tile-64x128", plans.LocalTile: "local-64x128x64"}

    def choose(operation: str, problem: plans.Problem, device: torch.device, kinds: tuple[type, ...]) -> plans.Plan:
        name = next((fused[kind] for kind in kinds if kind in fused), "library-16")
        return plans.PLANS["forward"]["library-16" if way == "library-16" else name]

    monkeypatch.setattr(layer, "choose", choose)
    basis, x, c, bias, _ = make_inputs(name, (24, 24, 16), dtype)
    strided = [x.T, x.repeat(1, 2)[:, ::2], x[:, :1].expand(24, 24), x[:1].expand(24, 24), x[None].transpose(1, 2)]
    bias = bias.repeat_interleave(2)[::2]
    for each in strided:
        plain = kan_linear(each.contiguous(), c, basis, bias.contiguous(), backend="triton")
        assert torch.equal(kan_linear(each, c, basis, bias, backend="triton"), plain)


@pytest.mark.parametrize("name", ["cheby2", "lucas", "bspline", "rbf"])
@pytest.mark.parametrize("constant", ["bias", "edge"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,), (2, 0)], ids=str)
def test_layers_of_every_kind(name: str, constant: str, linear: bool, batch: tuple[int, ...]) -> None:
    layer = KANLinear(24, 16, name, constant=constant, linear=linear).to(DEVICE)
    x = torch.randn(*batch, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    both = [
        kan_linear(x, layer.coefficients, layer.basis, layer.bias, layer.linear, backend)
        for backend in ("reference", "triton")
    ]
    assert both[0].shape == both[1].shape == (*batch, 16)
    torch.testing.assert_close(both[1], both[0])
    parameters = list(layer.parameters())
    for of_kernel, of_reference in zip(*(torch.autograd.grad(y.sum(), parameters) for y in both), strict=True):
        torch.testing.assert_close(of_kernel, of_reference)


@pytest.mark.parametrize("name", ["rational", "rational-abs:groups=4", "bspline:grid=20", "rbf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_of_groups(name: str, dtype: torch.dtype) -> None:
    function = GroupFunction(32, name).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    for parameter in function.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator).to(DEVICE) / 4
    x = torch.randn(3, 50, 32, generator=generator).to(DEVICE, dtype).requires_grad_()
    wide = copy.deepcopy(function).double()
    parameters = [*function.parameters()]

    def results(backend: str, function: GroupFunction, x: torch.Tensor) -> list[torch.Tensor]:
        y = group_function(x, function.basis, function.coefficients, backend)
        gradients = torch.autograd.grad(y, [x, *function.parameters()], torch.ones_like(y))
        return [tensor.detach().double() for tensor in (y, *gradients)]

    truth = results("reference", wide, x.detach().double().requires_grad_())
    for true, reference, kernel in zip(
        truth, results("reference", function, x), results("triton", function, x), strict=True
    ):
        rounding = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert (kernel - true).abs().max() <= 2 * (reference - true).abs().max() + rounding
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(function(x).sum(), parameters))


def test_only_the_input_and_the_coefficients_are_saved() -> None:
    for name in ("cheby2:degree=2", "cheby2:degree=8", "bspline:grid=20", "rbf"):
        basis, x, c, bias, _ = make_inputs(name, (64, 64, 128), torch.bfloat16)
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kan_linear(x.requires_grad_(), c.requires_grad_(), basis, bias.requires_grad_(), backend="triton")
        assert {tensor.data_ptr() for tensor in saved} == {x.data_ptr(), c.data_ptr()}


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    basis, x, c, bias, dy = make_inputs("cheby2", (8, 16, 8), torch.float32)
    called = []
    for name in ("input_gradient", "coefficient_gradient", "column_sums"):
        real = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *a, n=name, f=real: (called.append(n), f(*a))[1])
    for leaf, wanted in ((x, "input_gradient"), (c, "coefficient_gradient"), (bias, "column_sums")):
        called.clear()
        y = kan_linear(*(t.detach() for t in (x, c)), basis, bias.detach(), backend="triton")
        assert not y.requires_grad
        arguments = [tensor.detach().requires_grad_(tensor is leaf) for tensor in (x, c, bias)]
        y = kan_linear(arguments[0], arguments[1], basis, arguments[2], backend="triton")
        torch.autograd.grad(y, [tensor for tensor in arguments if tensor.requires_grad], dy)
        assert called == [wanted]


def test_gradients_are_the_same_bits_each_time() -> None:
    every = plans.PLANS["coefficient_gradient"]
    for plan in (name for operation, name in NAMED if operation == "coefficient_gradient"):
        local = isinstance(every[plan], plans.Local)
        if not local and not plans.can(every[plan], 2, plans.KINDS):
            continue
        basis, x, _, _, dy = make_inputs("cheby2", (5000 if DEVICE.type == "cuda" else 200, 72, 40), torch.bfloat16)
        steps = [number for n in range(2) for number in basis.step(n)]
        family = ("rbf", [3.0], "none") if local else ("polynomial", [1.0, *steps], "tanh")
        runs = [layer.coefficient_gradient(dy, x, *family, plan) for _ in range(REPEATS)]
        assert all(torch.equal(run, runs[0]) for run in runs), plan
        assert all(torch.equal(layer.column_sums(dy), layer.column_sums(dy)) for _ in range(REPEATS))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(autocast: torch.dtype) -> None:
    basis, x, c, bias, _ = make_inputs("cheby2", (16, 24, 8), torch.float32)
    with torch.autocast(DEVICE.type, autocast):
        y = kan_linear(x, c.requires_grad_(), basis, bias.requires_grad_(), backend="triton")
        reference = kan_linear(x, c, basis, bias, backend="reference")
    assert y.dtype == reference.dtype == autocast
    torch.testing.assert_close(y, reference, rtol=0, atol=8 * torch.finfo(autocast).eps * y.detach().abs().max().item())
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(y.float().sum(), [c, bias]))


def test_operators_keep_their_promises() -> None:
    basis, x, c, bias, dy = make_inputs("cheby2", (4, 16, 8), torch.float32)
    family = ("polynomial", [1.0, *(number for n in range(2) for number in basis.step(n))], "tanh")
    leaves = [tensor.requires_grad_() for tensor in (x, c, bias)]
    torch.library.opcheck(torch.ops.kallm.edge_functions, (*leaves, *family))
    torch.library.opcheck(torch.ops.kallm.edge_functions, (x, c, None, *family))
    plain = [tensor.detach() for tensor in (dy, x, c)]
    torch.library.opcheck(torch.ops.kallm.edge_functions_input_gradient, (*plain, *family))
    torch.library.opcheck(torch.ops.kallm.edge_functions_coefficient_gradient, (*plain[:2], *family))
    torch.library.opcheck(torch.ops.kallm.column_sums, (plain[0],))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(autocast: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    basis, x, c, bias, dy = make_inputs("cheby2", (4, 16, 8), torch.float32)

    def layer(x: torch.Tensor, c: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return kan_linear(x, c, basis, bias, backend="triton")

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = [tensor.requires_grad_() for tensor in (x, c, bias)]
    for y, expected in zip(
        *([f(*leaves), *torch.autograd.grad(f(*leaves).float(), leaves, dy)] for f in (compiled, layer)), strict=True
    ):
        assert torch.equal(y, expected)


def test_a_backend_that_cannot_be_is_refused() -> None:
    basis, x, c, bias, _ = make_inputs("cheby2", (4, 16, 8), torch.float32)
    with pytest.raises(SpecError, match=r"no backend 'tritn'. Did you mean 'triton'\?"):
        kan_linear(x, c, basis, bias, backend="tritn")
    with pytest.raises(SpecError, match="for float64 take backend 'auto'"):
        kan_linear(x.double(), c.double(), basis, backend="triton")
    with pytest.raises(SpecError, match="no kernel for basis 'fourier'"):
        kan_linear(x, torch.zeros(8, 8, 16), make_basis("fourier"), backend="triton")
    with pytest.raises(SpecError, match="no plan for the forward 'tile'"):
        layer.edge_functions(x, c, bias, "polynomial", [1.0] + [2.0, 0.0, 0.0] * 2, "tanh", "tile")
    with pytest.raises(SpecError, match="plan 'tile-128x256' cannot be for these tensors and 3 functions"):
        layer.edge_functions(
            x, torch.zeros(8, 3, 16).to(x), bias, "polynomial", [1.0] + [2.0, 0.0, 0.0] * 3, "tanh", "tile-128x256"
        )
    with pytest.raises(SpecError, match="plan 'local-64x128x64' cannot be for these tensors and 6 functions"):
        layer.edge_functions(x, torch.zeros(8, 6, 16).to(x), bias, "bspline", [5.0, 1.0], "tanh", "local-64x128x64")


def test_the_nearest_measured_size_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path))
    sizes = {"tile-64x384": plans.Problem(16384, 576, 384, 2), "library-32": plans.Problem(16384, 4096, 4096, 2)}
    try:
        for plan, problem in sizes.items():
            plans.remember("A GPU", "forward", problem, "tile-128x128", {"tile-128x128": 2e-6})
            plans.remember("A GPU", "forward", problem, plan, {plan: 1e-6})
        assert plans._chosen("forward", plans.Problem(8192, 512, 512, 2), "A GPU", ANYWHERE) == "tile-64x384"
        assert plans._chosen("forward", plans.Problem(16384, 8192, 2048, 3), "A GPU", ANYWHERE) == "library-32"
        assert plans._chosen("forward", plans.Problem(8192, 512, 512, 2), "A GPU", (plans.Library,)) == "library-32"
        others = plans.Problem(8192, 512, 512, 2, "of a kind that nobody has measured")
        assert plans._chosen("forward", others, "A GPU", ANYWHERE) == "tile-64x384"
        splines = plans.Problem(8192, 512, 512, 2, "bspline")
        far = plans.Problem(1024, 4096, 64, 50, "bspline")
        plans.remember("A GPU", "forward", far, "local-64x128x64", {"local-64x128x64": 1e-6, "library-16": 2e-6})
        assert plans._chosen("forward", splines, "A GPU", plans.LOCAL_KINDS) == "local-64x128x64"
        of_others = plans._chosen("forward", plans.Problem(8192, 512, 512, 2), "another", (plans.Library,))
        assert of_others.startswith("library")  # what the library was fastest with on some other GPU
        assert len([entry for entry in plans.measured() if entry["gpu"] == "A GPU"]) == 3
    finally:
        plans.measured.cache_clear()
        plans._chosen.cache_clear()


def test_what_was_measured_names_plans_there_are() -> None:
    entries = json.loads(plans.SHIPPED.read_text())
    assert len(plans._read(plans.SHIPPED)) == len(entries) > 0
    for entry in entries:
        times = {name: time for name, time in entry["microseconds"].items() if name != tuning.LIMIT}
        assert set(times) <= set(plans.PLANS[entry["operation"]])
        assert times[entry["plan"]] <= min(times.values()) * (1 + tuning.CLOSE) + 0.1, entry  # they are rounded


@pytest.mark.parametrize("text", ["{broken", "[1]", '[{"gpu": "A", "operation": "forward"}]', '{"a": 1}'])
def test_damaged_measurements_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text(text)
    with pytest.raises(DeviceError, match=r"plans.json is damaged .*; delete it"):
        plans._read(tmp_path / "plans.json")


def test_on_a_cpu_the_reference_is_the_default() -> None:
    layer, x = KANLinear(16, 8, "cheby2"), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), kan_linear(x, layer.coefficients, layer.basis, layer.bias, backend="reference"))


def test_all_families_are_there() -> None:
    assert {"cheby1", "legendre", "hermite", "jacobi", "hahn", "bspline", "rbf"} <= set(FAMILIES)
    assert len(FAMILIES) >= 15
