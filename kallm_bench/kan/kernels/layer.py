"""A layer with a function on every edge as three operators that PyTorch knows: forward, input, coefficient gradient.

Backward saves the input and the coefficients alone; the expansion, D times as large as the input, is made again.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kallm_bench.errors import SpecError
from kallm_bench.kan.kernels import fused, fused_local, hopper, library, passes
from kallm_bench.kan.kernels.bells import bell
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.hopper_plans import (
    Halved,
    HalvedGradient,
    LocalHalved,
    LocalHalvedGradient,
    LocalPiped,
    Piped,
    Specialised,
)
from kallm_bench.kan.kernels.plans import (
    Library,
    LocalTile,
    Plan,
    Problem,
    Tile,
    can,
    choose,
    find_plan,
    kinds_for,
)

WAYS: dict[type, ModuleType] = {
    Tile: fused,
    Specialised: hopper,
    Halved: hopper,
    HalvedGradient: hopper,
    Piped: hopper,
    Library: library,
    LocalTile: fused_local,
    LocalHalved: hopper,
    LocalHalvedGradient: hopper,
    LocalPiped: hopper,
}
"""The module that follows each kind of plan. Each has the functions of the operations there are such plans for."""


@torch.library.custom_op("kallm::edge_functions", mutates_args=())
def edge_functions(
    x: Tensor, coefficients: Tensor, bias: Tensor | None, kind: str, numbers: list[float], squash: str, plan: str = ""
) -> Tensor:
    """y_o = bias_o + Σ_d Σ_i c[o,d,i] F_d(squash(x_i)).

    Args:
        x: (..., I) in float32, float16 or bfloat16.
        coefficients: (O, D, I) in the dtype of the products; their sums are float32.
        bias: (O,) or None.
        kind, numbers, squash: see Family; with "norm", each row is brought to mean 0 and variance 1.
        plan: a name of PLANS["forward"]; "" for the one that was measured to be fastest.

    Returns:
        (..., O), in the coefficients' dtype.
    """
    rows, family, _ = _prepared(x, kind, numbers, squash)
    y = torch.empty((len(rows), len(coefficients)), dtype=coefficients.dtype, device=x.device)
    if len(rows):
        way = _plan("forward", plan, family, rows, y.shape[1], (rows, coefficients, y))
        with torch.cuda.device_of(x):
            WAYS[type(way)].forward(rows, coefficients, None if bias is None else bias.contiguous(), y, family, way)
    return y.reshape(*x.shape[:-1], len(coefficients))


@torch.library.custom_op("kallm::edge_functions_input_gradient", mutates_args=())
def input_gradient(
    dy: Tensor, x: Tensor, coefficients: Tensor, kind: str, numbers: list[float], squash: str, plan: str = ""
) -> Tensor:
    """dL/dx (..., I), in x's dtype, from dy (..., O); otherwise as `edge_functions`."""
    rows, family, statistics = _prepared(x, kind, numbers, squash)
    slopes = dy.reshape(-1, dy.shape[-1]).contiguous()
    dx = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        way = _plan("input_gradient", plan, family, rows, dy.shape[-1], (rows, coefficients, slopes, dx))
        with torch.cuda.device_of(x):
            WAYS[type(way)].input_gradient(rows, coefficients, slopes, dx, family, way)
    if statistics:
        dx = torch.ops.aten.native_layer_norm_backward(
            dx, x.reshape(rows.shape), [rows.shape[1]], *statistics, None, None, [True, False, False]
        )[0]
    return dx.reshape(x.shape)


@torch.library.custom_op("kallm::edge_functions_coefficient_gradient", mutates_args=())
def coefficient_gradient(dy: Tensor, x: Tensor, kind: str, numbers: list[float], squash: str, plan: str = "") -> Tensor:
    """dL/dc (O, D, I), in dy's dtype, from dy (..., O) and x (..., I); the same bits each time."""
    rows, family, _ = _prepared(x, kind, numbers, squash)
    slopes = dy.reshape(-1, dy.shape[-1]).contiguous()
    dc = torch.empty((dy.shape[-1], family.functions, x.shape[-1]), dtype=dy.dtype, device=x.device)
    if len(rows) == 0:
        return dc.zero_()
    way = _plan("coefficient_gradient", plan, family, rows, dy.shape[-1], (rows, slopes, dc))
    with torch.cuda.device_of(x):
        WAYS[type(way)].coefficient_gradient(rows, slopes, dc, family, way)
    return dc


@torch.library.custom_op("kallm::column_sums", mutates_args=())
def column_sums(dy: Tensor) -> Tensor:
    """(O,) the sums of dy (..., O) over all but its last dimension: a bias's gradient, the same bits each time."""
    with torch.cuda.device_of(dy):
        return passes.column_sums(dy.reshape(-1, dy.shape[-1]).contiguous())


@edge_functions.register_fake
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(coefficients)), dtype=coefficients.dtype)


@input_gradient.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@coefficient_gradient.register_fake
def _(dy: Tensor, x: Tensor, kind: str, numbers: list[float], squash: str, plan: str = "") -> Tensor:
    return dy.new_empty((dy.shape[-1], Family(kind, tuple(numbers), squash).functions, x.shape[-1]))


@column_sums.register_fake
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, _, *ctx.family, _ = inputs
    ctx.save_for_backward(x, coefficients)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, coefficients = ctx.saved_tensors
    dx = input_gradient(dy, x, coefficients, *ctx.family) if ctx.needs_input_grad[0] else None
    dc = coefficient_gradient(dy, x, *ctx.family) if ctx.needs_input_grad[1] else None
    db = column_sums(dy) if ctx.needs_input_grad[2] else None
    return dx, dc, db, None, None, None, None


edge_functions.register_autograd(_backward, setup_context=_save)


def _prepared(
    x: Tensor, kind: str, numbers: list[float], squash: str
) -> tuple[Tensor, Family, tuple[Tensor, Tensor] | None]:
    """x as rows (M, I), brought to mean 0 and variance 1 by "norm", and then with the statistics that did it."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 or rows.stride(0) < rows.shape[1]:  # transposed, every other channel, or expanded
        rows = rows.contiguous()
    if squash != "norm":
        return rows, Family(kind, tuple(numbers), squash), None
    rows, *statistics = torch.native_layer_norm(rows, [rows.shape[1]], None, None, 1e-5)
    return rows, Family(kind, tuple(numbers), "none"), (statistics[0], statistics[1])


def _plan(operation: str, name: str, family: Family, rows: Tensor, outputs: int, tensors: tuple[Tensor, ...]) -> Plan:
    """The plan that is named, or the one chosen. SpecError for one that cannot be."""
    kinds: tuple[type, ...] = (Library,)
    if fused.reachable(*tensors) and (family.kind == "polynomial" or bell(family)):
        kinds = kinds_for(family.kind)
        if rows.device.type != "cuda":  # the interpreter knows no Gluon
            kinds = tuple(kind for kind in kinds if kind in (Library, Tile, LocalTile))
    if not name:
        problem = Problem(len(rows), rows.shape[1], outputs, family.functions, family.kind)
        return choose(operation, problem, rows.device, kinds)
    plan = find_plan(operation, name)
    if not can(plan, family.functions, kinds):
        raise SpecError(f"plan '{name}' cannot be for these tensors and {family.functions} functions")
    return plan
