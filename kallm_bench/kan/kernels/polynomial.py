"""A layer of three-term polynomials as three operators that PyTorch knows: forward, input and coefficient gradient.

Backward saves the input and the coefficients alone; the expansion, D times as large as the input, is made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kallm_bench.errors import SpecError
from kallm_bench.kan.kernels import fused, passes
from kallm_bench.kan.kernels.device import INTERPRETED
from kallm_bench.kan.kernels.plans import Library, Plan, Problem, Tile, can, choose, find_plan


@torch.library.custom_op("kallm::polynomial", mutates_args=())
def polynomial(
    x: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    recurrence: list[float],
    first: float,
    squash: str,
    plan: str = "",
) -> Tensor:
    """y_o = bias_o + Σ_n Σ_i c[o,n,i] P_{n+1}(squash(x_i)), P_0 = first, P_{n+1} = (A_n t + B_n) P_n - C_n P_{n-1}.

    Args:
        x: (..., I) in float32, float16 or bfloat16.
        coefficients: (O, D, I) in the dtype of the products; their sums are float32.
        bias: (O,) or None.
        recurrence: A_0, B_0, C_0, A_1, .., C_{D-1}.
        squash: "none", "tanh" or "sigmoid".
        plan: a name of PLANS["forward"]; "" for the one that was measured to be fastest.

    Returns:
        (..., O), in the coefficients' dtype.
    """
    rows, steps = x.reshape(-1, x.shape[-1]), _steps(recurrence)
    O, _, I = coefficients.shape
    y = torch.empty((len(rows), O), dtype=coefficients.dtype, device=x.device)
    way = _plan("forward", plan, rows, O, len(steps), (rows, coefficients, y))
    if isinstance(way, Tile) and len(rows):
        wide, count, narrow = way.outputs
        grid = (triton.cdiv(len(rows), way.rows) * triton.cdiv(O, wide * count + narrow),)
        fused.forward[grid](
            _tiles(rows, way.rows, way.inputs), _tiles(coefficients, wide, 1, way.inputs),
            _tiles(coefficients, narrow or wide, 1, way.inputs), _tiles(y, way.rows, wide),
            _tiles(y, way.rows, narrow or wide), bias, len(rows), I, O, FIRST=first, R=steps, SQUASH=squash,
            BIAS=bias is not None, BM=way.rows, BI=way.inputs, WIDE=wide, WIDES=count, NARROW=narrow,
            **_options(way, x.dtype),
        )  # fmt: skip
    elif isinstance(way, Library):
        weights = coefficients.flatten(1).T  # (D·I, O)
        for chunk, features in _chunks(rows, coefficients.dtype, len(steps), way):
            passes.expand(rows[chunk], features, first, steps, squash)
            if bias is None:
                torch.mm(features, weights, out=y[chunk])
            else:
                torch.addmm(bias, features, weights, out=y[chunk])
    return y.reshape(*x.shape[:-1], O)


@torch.library.custom_op("kallm::polynomial_input_gradient", mutates_args=())
def input_gradient(
    dy: Tensor,
    x: Tensor,
    coefficients: Tensor,
    recurrence: list[float],
    first: float,
    squash: str,
    plan: str = "",
) -> Tensor:
    """dL/dx (..., I), in x's dtype, from dy (..., O); otherwise as `polynomial`."""
    rows, slopes, steps = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous(), _steps(recurrence)
    O, _, I = coefficients.shape
    dx = torch.empty((len(rows), I), dtype=x.dtype, device=x.device)
    way = _plan("input_gradient", plan, rows, O, len(steps), (rows, coefficients, slopes, dx))
    if isinstance(way, Tile) and len(rows):
        grid = (triton.cdiv(len(rows), way.rows) * triton.cdiv(I, way.inputs),)
        fused.input_gradient[grid](
            _tiles(rows, way.rows, way.inputs), _tiles(coefficients, way.outputs[0], 1, way.inputs),
            _tiles(slopes, way.rows, way.outputs[0]), _tiles(dx, way.rows, way.inputs), len(rows), I, O,
            FIRST=first, R=steps, SQUASH=squash, BM=way.rows, BI=way.inputs, BO=way.outputs[0],
            **_options(way, x.dtype),
        )  # fmt: skip
    elif isinstance(way, Library):
        weights = coefficients.flatten(1)  # (O, D·I)
        for chunk, gradients in _chunks(rows, coefficients.dtype, len(steps), way):
            torch.mm(slopes[chunk], weights, out=gradients)
            passes.combine(rows[chunk], gradients, dx[chunk], first, steps, squash)
    return dx.reshape(x.shape)


@torch.library.custom_op("kallm::polynomial_coefficient_gradient", mutates_args=())
def coefficient_gradient(
    dy: Tensor, x: Tensor, recurrence: list[float], first: float, squash: str, plan: str = ""
) -> Tensor:
    """dL/dc (O, D, I), in dy's dtype, from dy (..., O) and x (..., I); the same bits each time."""
    rows, slopes, steps = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]).contiguous(), _steps(recurrence)
    (M, I), O, D = rows.shape, dy.shape[-1], len(steps)
    dc = torch.empty((O, D, I), dtype=dy.dtype, device=x.device)
    if M == 0:
        return dc.zero_()
    way = _plan("coefficient_gradient", plan, rows, O, D, (rows, slopes, dc))
    if isinstance(way, Tile):
        tiles = triton.cdiv(I, way.inputs) * triton.cdiv(O, way.outputs[0])
        length = triton.cdiv(triton.cdiv(M, _parts(tiles, x.device)), way.rows) * way.rows
        count = triton.cdiv(M, length)
        parts = dc[None] if count == 1 else torch.empty((count, O, D, I), dtype=torch.float32, device=x.device)
        fused.coefficient_gradient[(count * tiles,)](
            _tiles(rows, way.rows, way.inputs), _tiles(slopes, way.rows, way.outputs[0]),
            _tiles(parts, 1, way.outputs[0], 1, way.inputs), M, I, O, length, FIRST=first, R=steps, SQUASH=squash,
            BM=way.rows, BI=way.inputs, BO=way.outputs[0], **_options(way, x.dtype),
        )  # fmt: skip
        if count > 1:
            passes.add_parts(parts, dc)
    else:
        for channels in _channels(M, O, I, D, dy.dtype, way):
            features = torch.empty((M, D * len(channels)), dtype=dy.dtype, device=x.device)
            passes.expand(rows[:, channels.start : channels.stop], features, first, steps, squash)
            if len(channels) == I:
                torch.mm(slopes.T, features, out=dc.view(O, D * I))
            else:
                dc[:, :, channels.start : channels.stop] = (slopes.T @ features).view(O, D, len(channels))
    return dc


@polynomial.register_fake
def _(x: Tensor, coefficients: Tensor, *others: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(coefficients)), dtype=coefficients.dtype)


@input_gradient.register_fake
def _(dy: Tensor, x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@coefficient_gradient.register_fake
def _(dy: Tensor, x: Tensor, recurrence: list[float], *others: Any) -> Tensor:
    return dy.new_empty((dy.shape[-1], len(recurrence) // 3, x.shape[-1]))


@torch.library.custom_op("kallm::column_sums", mutates_args=())
def column_sums(dy: Tensor) -> Tensor:
    """(O,) the sums of dy (..., O) over all but its last dimension: a bias's gradient, the same bits each time."""
    return passes.column_sums(dy.reshape(-1, dy.shape[-1]).contiguous())


@column_sums.register_fake
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, bias, *ctx.family, _ = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, coefficients)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, coefficients = ctx.saved_tensors
    dx = input_gradient(dy, x, coefficients, *ctx.family) if ctx.needs_input_grad[0] else None
    dc = coefficient_gradient(dy, x, *ctx.family) if ctx.needs_input_grad[1] else None
    db = column_sums(dy) if ctx.needs_input_grad[2] else None
    return dx, dc, db, None, None, None, None


polynomial.register_autograd(_backward, setup_context=_save)


def fusible(*tensors: Tensor) -> bool:
    """Whether the copy engine can reach all of these: 16-byte rows and starts, one dtype, and a GPU that has it."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device)[0] != 9 or dtype == torch.float32:
            return False
    elif not INTERPRETED.value:
        return False
    return all(
        tensor.dtype == dtype
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def _plan(operation: str, name: str, rows: Tensor, outputs: int, degrees: int, tensors: tuple[Tensor, ...]) -> Plan:
    """The plan that is named, or the one chosen. SpecError for one that cannot be."""
    reachable = fusible(*tensors)
    if not name:
        return choose(operation, Problem(len(rows), rows.shape[1], outputs, degrees), rows.device, reachable)
    plan = find_plan(operation, name)
    if not can(plan, degrees, reachable):
        raise SpecError(f"plan '{name}' cannot be for these tensors and {degrees} degrees")
    return plan


def _steps(recurrence: list[float]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(recurrence[at : at + 3]) for at in range(0, len(recurrence), 3))


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _options(way: Tile, dtype: torch.dtype) -> dict[str, Any]:
    exact = dtype == torch.float32
    return {
        "BITS": passes.bits_of(dtype),
        "STAGES": way.stages,
        "PRECISION": "ieee" if exact else "tf32",  # of float32 operands alone
        "num_warps": way.warps,
    }


def _parts(tiles: int, device: torch.device) -> int:
    """Into how many parts the rows go, so that two programs for every processor have work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, 2 * processors // tiles)


def _chunks(rows: Tensor, dtype: torch.dtype, degrees: int, way: Library) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows whose features fill the buffer, each with the part of it that it needs."""
    width = degrees * rows.shape[1]
    length = max(1, min(len(rows), way.buffer_bytes // (width * dtype.itemsize) // 128 * 128 or 128))
    buffer = torch.empty((length, width), dtype=dtype, device=rows.device)
    for start in range(0, len(rows), length):
        stop = min(start + length, len(rows))
        yield slice(start, stop), buffer[: stop - start]


def _channels(M: int, O: int, I: int, D: int, dtype: torch.dtype, way: Library) -> Iterator[range]:
    """Runs of channels, each a power of two long, whose features and gradient fill the buffer."""
    most = way.buffer_bytes // ((M + O) * D * dtype.itemsize)
    length = I if most >= I else max(1, 2 ** (most.bit_length() - 1) if most else 1)
    for start in range(0, I, length):
        yield range(start, min(start + length, I))
