"""B-splines and Gaussians that touch only the few functions that differ from zero where x lies.

Of the K functions of a grid a cubic spline needs 4 at any x, and a Gaussian 8: the others are 0, or too small to count.
So the work does not grow with the grid. What is left of the basis is then a value for each of those few functions, by
de Boor's triangle or by exp, and the number of the first.

The formulas, the domains and what happens outside them are those of kan.bases.bspline and kan.bases.rbf.

Source: de Boor 1972, "On calculating with B-splines", J. Approx. Theory 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kallm_bench.kan.kernels.device import INTERPRETED, product
from kallm_bench.kan.kernels.tiles import Launch, cut, place

NEAREST = 8
"""Gaussians kept. Those left out have their centres at least 4 widths from x, so together they stay below 1.2e-7:
exp(-16) where x is on a centre, else less. Of 7 the next could be but 3.5 widths away, where exp(-12.25) is 5e-6.
"""


VALUES = Launch(chunks=128, warps=4)
GROUP = Launch(chunks=256, warps=4)
GROUP_BACKWARD = Launch(chunks=16, warps=1, programs=16 * 132)  # one warp: several would each repeat the small products


def local_values(x: Tensor, kind: str, size: int, order: int = 0, squash: str = "none") -> tuple[Tensor, Tensor]:
    """The functions that differ from zero at x, and which they are.

    Args:
        x: (..., I), of float32, bfloat16 or float16.
        kind: "bspline" or "rbf".
        size: intervals of a B-spline's grid on [-1, 1], or centres from -2 to 2.
        order: degree of a B-spline's pieces, 1 to 5; 0 for "rbf".
        squash: "none", "tanh" or "sigmoid", applied to x first.

    Returns:
        values (..., J, I), in the dtype of x, of the functions number first, first + 1 .. first + J - 1, where J is
        order + 1, or NEAREST Gaussians, or all of them where there are fewer; and first (..., I), int32.
    """
    found: tuple[Tensor, Tensor] = torch.ops.kallm.local_values(x, kind, size, order, squash)
    return found


def group_local(x: Tensor, coefficients: Tensor, kind: str, order: int = 0, squash: str = "none") -> Tensor:
    """A function for each group of channels: f_g(x) = Σ_k c[g,k] B_k(squash(x)), over the local functions alone.

    Args:
        x: (..., I), of float32, bfloat16 or float16; groups are channels side by side.
        coefficients: (G, K); G divides I. A B-spline's grid has K - order intervals, "rbf" K centres.
        kind, order, squash: as in `local_values`.

    Returns:
        (..., I), in the dtype of x.
    """
    y: Tensor = torch.ops.kallm.group_local(x, coefficients, kind, order, squash)
    return y


def sparse_edge_product(values: Tensor, first: Tensor, table: Tensor) -> Tensor:
    """y_o = Σ_i Σ_j values[j,i] · c[o, first_i + j, i]: a layer with a function on every edge, from `local_values`.

    Reads J·I rows of the table for each row of x, however large the grid.

    Args:
        values: (..., J, I).
        first: (..., I).
        table: (K·I, O), c with the outputs last: `coefficients.permute(1, 2, 0).flatten(0, 1)`.

    Returns:
        (..., O), in the dtype of values.
    """
    near, features = values.shape[-2:]
    function = first.unsqueeze(-2) + torch.arange(near, device=first.device, dtype=first.dtype)[:, None]
    number = function * features + torch.arange(features, device=first.device, dtype=first.dtype)  # (..., J, I)
    bags = F.embedding_bag(
        number.reshape(-1, near * features),
        table.to(values.dtype),
        mode="sum",
        per_sample_weights=values.reshape(-1, near * features),
    )
    return bags.reshape(*first.shape[:-1], -1)


@torch.library.custom_op("kallm::local_values", mutates_args=())
def _local_values(x: Tensor, kind: str, size: int, order: int, squash: str) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    values, first = _compact_like(x, kind, size, order)
    if x.numel():
        tiles = cut(x, 1, VALUES)
        arguments = tiles.arguments | compiled_with(kind, size, order, squash)
        with torch.cuda.device_of(x):
            _values_kernel[(tiles.across * tiles.down,)](x, values, first, **arguments)
    return values, first


@torch.library.custom_op("kallm::local_values_backward", mutates_args=())
def _local_values_backward(dvalues: Tensor, x: Tensor, kind: str, size: int, order: int, squash: str) -> Tensor:
    x, dvalues = x.contiguous(), dvalues.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        tiles = cut(x, 1, VALUES)
        arguments = tiles.arguments | compiled_with(kind, size, order, squash)
        with torch.cuda.device_of(x):
            _slopes_kernel[(tiles.across * tiles.down,)](x, dvalues, dx, **arguments)
    return dx


@torch.library.custom_op("kallm::group_local", mutates_args=())
def _group_local(x: Tensor, coefficients: Tensor, kind: str, order: int, squash: str) -> Tensor:
    x, (groups, functions) = x.contiguous(), coefficients.shape
    y = torch.empty_like(x)
    if x.numel():
        tiles = cut(x, groups, GROUP)
        arguments = tiles.arguments | compiled_with(kind, functions - order, order, squash)
        with torch.cuda.device_of(x):
            _group_kernel[(tiles.across * tiles.down,)](
                x, coefficients.contiguous(), y, GROUP=arguments["CHUNKS"] // groups, **arguments
            )
    return y


@torch.library.custom_op("kallm::group_local_backward", mutates_args=())
def _group_local_backward(
    dy: Tensor, x: Tensor, coefficients: Tensor, kind: str, order: int, squash: str
) -> tuple[Tensor, Tensor]:
    x, dy, (groups, functions) = x.contiguous(), dy.contiguous(), coefficients.shape
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(coefficients)
    tiles = cut(x, groups, GROUP_BACKWARD, within_group=True)
    arguments = tiles.arguments | compiled_with(kind, functions - order, order, squash)
    near = arguments["NEAR"]
    programs = min(tiles.across * tiles.down, triton.cdiv(GROUP_BACKWARD.programs, groups))
    partial = x.new_zeros(programs, groups, near, functions, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _group_backward_kernel[(groups, programs)](
            x,
            dy,
            coefficients.contiguous(),
            dx,
            partial,
            GROUP=arguments["CHUNKS"] // groups,
            LOW=8 if functions - near < 128 else 16,
            **arguments,
        )
    return dx, partial.sum(dim=(0, 2)).to(coefficients.dtype)


@_local_values.register_fake
def _(x: Tensor, kind: str, size: int, order: int, squash: str) -> tuple[Tensor, Tensor]:
    return _compact_like(x, kind, size, order)


@_local_values_backward.register_fake
def _(dvalues: Tensor, x: Tensor, kind: str, size: int, order: int, squash: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_group_local.register_fake
def _(x: Tensor, coefficients: Tensor, kind: str, order: int, squash: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_group_local_backward.register_fake
def _(dy: Tensor, x: Tensor, coefficients: Tensor, kind: str, order: int, squash: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(coefficients, memory_format=torch.contiguous_format),
    )


def _keep_x(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.settings = inputs
    ctx.save_for_backward(x)


def _differentiate_values(ctx: Any, dvalues: Tensor, _: None) -> tuple[Any, ...]:
    dx = torch.ops.kallm.local_values_backward(dvalues, *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, None


def _keep_both(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, coefficients, *ctx.settings = inputs
    ctx.save_for_backward(x, coefficients)


def _differentiate_group(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    dx, dc = torch.ops.kallm.group_local_backward(dy, *ctx.saved_tensors, *ctx.settings)
    return dx, dc, None, None, None


_local_values.register_autograd(_differentiate_values, setup_context=_keep_x)
_group_local.register_autograd(_differentiate_group, setup_context=_keep_both)


def _near(kind: str, size: int, order: int) -> int:
    return order + 1 if kind == "bspline" else min(NEAREST, size)


def _compact_like(x: Tensor, kind: str, size: int, order: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty(*x.shape[:-1], _near(kind, size, order), x.shape[-1])
    return values, x.new_empty(x.shape, dtype=torch.int32)


def compiled_with(kind: str, size: int, order: int, squash: str) -> dict[str, Any]:
    """What a kernel is compiled with for a family."""
    return {"KIND": kind, "SIZE": size, "ORDER": order, "NEAR": _near(kind, size, order), "SQUASH": squash}


@triton.jit
def squashed(x, SQUASH: tl.constexpr):
    """squash(x) and its derivative. From exp(-|x|), which cannot overflow, and without the digits that 1 - t² loses."""
    if SQUASH == "tanh":
        e = tl.exp(-2.0 * tl.abs(x))
        scale = 1.0 / (1.0 + e)
        size = (1.0 - e) * scale
        return tl.where(x < 0, -size, size), 4.0 * e * scale * scale
    elif SQUASH == "sigmoid":
        e = tl.exp(-tl.abs(x))
        scale = 1.0 / (1.0 + e)
        return tl.where(x < 0, e * scale, scale), e * scale * scale
    else:
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _fused(x, SCALE: tl.constexpr, shift):
    """x·SCALE + shift, rounded once: also in the interpreter, whose own fma rounds twice."""
    if INTERPRETED:
        return (x.to(tl.float64) * SCALE + shift.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, tl.full(x.shape, SCALE, tl.float32), shift)


@triton.jit
def near_functions(x, KIND: tl.constexpr, SIZE: tl.constexpr, ORDER: tl.constexpr, NEAR: tl.constexpr):
    """The number of the first function that counts at squashed x, NEAR values from it on, and their derivatives.

    Where x lies from the first one on, x·s + (c - first), is rounded once: as exact as x is, however fine the grid.
    """
    if KIND == "bspline":
        HALF: tl.constexpr = SIZE / 2
        interval = tl.floor((x + 1.0) * HALF)
        interval = tl.minimum(tl.maximum(interval, 0.0), SIZE - 1.0)
        u = _fused(x, HALF, HALF - interval)  # in [0, 1] for x in [-1, 1]
        lower = ()
        values = (tl.full(x.shape, 1.0, tl.float32),)
        FACTORIAL: tl.constexpr = (1, 1, 2, 6, 24, 120)  # the triangle divides by 1, 2 .. ORDER; here once at its end
        for degree in tl.static_range(1, ORDER + 1):
            lower = values
            values = ((1.0 - u) * lower[0],)
            for m in tl.static_range(1, degree):
                values = values + ((m + 1.0 - u) * lower[m] + (u + (degree - m)) * lower[m - 1],)
            values = values + (u * lower[degree - 1],)
        scaled = ()
        for j in tl.static_range(NEAR):
            scaled = scaled + (values[j] * (1.0 / FACTORIAL[ORDER]),)
        STEEP: tl.constexpr = HALF / FACTORIAL[ORDER - 1]
        slopes = (-STEEP * lower[0],)
        for j in tl.static_range(1, ORDER):
            slopes = slopes + (STEEP * (lower[j - 1] - lower[j]),)
        slopes = slopes + (STEEP * lower[ORDER - 1],)
        return interval.to(tl.int32), scaled, slopes
    else:
        SCALE: tl.constexpr = (SIZE - 1) / 4  # centres to a unit of x
        MIDDLE: tl.constexpr = (SIZE - 1) / 2
        first = tl.floor(x * SCALE + MIDDLE) - (NEAR // 2 - 1.0)
        first = tl.minimum(tl.maximum(first, 0.0), SIZE - NEAR + 0.0)
        z = _fused(x, SCALE, MIDDLE - first)
        values = ()
        slopes = ()
        for j in tl.static_range(NEAR):
            distance = z - j
            value = tl.exp(-distance * distance)
            values = values + (value,)
            slopes = slopes + (-2.0 * SCALE * distance * value,)
        return first.to(tl.int32), values, slopes


@triton.jit
def _values_kernel(
    x_pointer,  # (M, I)
    values_pointer,  # (M, NEAR, I)
    first_pointer,  # (M, I), int32
    M,
    CHUNKS,  # to a row of x
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    NEAR: tl.constexpr,
    SQUASH: tl.constexpr,
):
    across = tl.cdiv(CHUNKS, BLOCK)
    first_chunk = tl.program_id(0) % across * BLOCK
    first_row = tl.program_id(0) // across * ROWS
    row, chunk, lane, mask = place(first_row, first_chunk, M, CHUNKS, ROWS, BLOCK, CHUNK)
    offset = (row * CHUNKS + chunk) * CHUNK + lane  # [ROWS·BLOCK·CHUNK], as all below
    x, _ = squashed(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32), SQUASH)
    first, values, _ = near_functions(x, KIND, SIZE, ORDER, NEAR)
    tl.store(first_pointer + offset, first, mask=mask)
    offset = (row * NEAR * CHUNKS + chunk) * CHUNK + lane
    for j in tl.static_range(NEAR):
        value = values[j].to(values_pointer.dtype.element_ty)
        tl.store(values_pointer + offset + j * CHUNKS * CHUNK, value, mask=mask)


@triton.jit
def _slopes_kernel(
    x_pointer,  # (M, I), like dx
    dvalues_pointer,  # (M, NEAR, I)
    dx_pointer,
    M,
    CHUNKS,  # to a row of x
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    NEAR: tl.constexpr,
    SQUASH: tl.constexpr,
):
    across = tl.cdiv(CHUNKS, BLOCK)
    first_chunk = tl.program_id(0) % across * BLOCK
    first_row = tl.program_id(0) // across * ROWS
    row, chunk, lane, mask = place(first_row, first_chunk, M, CHUNKS, ROWS, BLOCK, CHUNK)
    offset = (row * CHUNKS + chunk) * CHUNK + lane  # [ROWS·BLOCK·CHUNK], as all below
    x, squash_slope = squashed(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32), SQUASH)
    _, _, slopes = near_functions(x, KIND, SIZE, ORDER, NEAR)
    many = (row * NEAR * CHUNKS + chunk) * CHUNK + lane
    slope = tl.zeros_like(x)
    for j in tl.static_range(NEAR):
        dvalue = tl.load(dvalues_pointer + many + j * CHUNKS * CHUNK, mask=mask, other=0.0).to(tl.float32)
        slope += dvalue * slopes[j]
    tl.store(dx_pointer + offset, (slope * squash_slope).to(dx_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _group_kernel(
    x_pointer,  # (M, I), like y
    coefficients,  # (G, SIZE + ORDER)
    y_pointer,
    M,
    CHUNKS,  # to a row
    GROUP,  # chunks to a group
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    NEAR: tl.constexpr,
    SQUASH: tl.constexpr,
):
    across = tl.cdiv(CHUNKS, BLOCK)
    first_chunk = tl.program_id(0) % across * BLOCK
    first_row = tl.program_id(0) // across * ROWS
    row, chunk, lane, mask = place(first_row, first_chunk, M, CHUNKS, ROWS, BLOCK, CHUNK)
    offset = (row * CHUNKS + chunk) * CHUNK + lane  # [ROWS·BLOCK·CHUNK], as all below
    x, _ = squashed(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32), SQUASH)
    first, values, _ = near_functions(x, KIND, SIZE, ORDER, NEAR)
    near = coefficients + chunk // GROUP * (SIZE + ORDER) + first
    y = tl.zeros_like(x)
    for j in tl.static_range(NEAR):
        y += tl.load(near + j, mask=mask, other=0.0).to(tl.float32) * values[j]
    tl.store(y_pointer + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x, ROUND: tl.constexpr):
    """x in bfloat16 if ROUND. The interpreter cannot multiply that, so there the rounded numbers are float32."""
    if ROUND:
        x = x.to(tl.bfloat16)
        if INTERPRETED:
            x = x.to(tl.float32)
    return x


@triton.jit
def _group_backward_kernel(
    x_pointer,  # (M, I), like dy and dx
    dy_pointer,
    coefficients,  # (G, SIZE + ORDER)
    dx_pointer,
    partial,  # (programs, G, NEAR, SIZE + ORDER), float32, zeros
    M,
    CHUNKS,  # to a row
    GROUP,  # chunks to a group
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    ORDER: tl.constexpr,
    NEAR: tl.constexpr,
    SQUASH: tl.constexpr,
    LOW: tl.constexpr,
):
    """dx, and the sums that dc needs: S[j, f] = Σ dy·v_j over the elements of a group with first = f.

    Millions of elements add to a few hundred sums, each to those it picks itself. This asks for atomics, whose order,
    and with it the last digits, changes from run to run. Here it is a matrix product on tensor cores instead: with
    first = high·LOW + low, S_j[high, low] = Σ_n [high_n = high] · [low_n = low]·dy_n·v_j,n is one of a [16, N] by an
    [N, LOW] matrix. Splitting `first` in two leaves each element 16 + NEAR·LOW entries to write, not one for every
    function of the grid, so the time is the same for all grids up to 128, and again from there to 256.

    Both matrices are written with N along the rows, as a thread holds its elements; the other way round each thread
    would have to compute the splines anew for every column.

    Where x is bfloat16 the weights are rounded to it, as dy was itself, and added up in float32. For other types each
    is split into two TF32 numbers, which hold 22 of its 24 bits. The ones are exact in either.
    """
    N: tl.constexpr = ROWS * BLOCK * CHUNK
    FUNCTIONS: tl.constexpr = SIZE + ORDER
    ROUND: tl.constexpr = x_pointer.dtype.element_ty == tl.bfloat16
    group = tl.program_id(0)
    coefficients += group * FUNCTIONS
    across = tl.cdiv(GROUP, BLOCK)
    highs = tl.arange(0, 16)
    lows = tl.arange(0, LOW)
    sums = (tl.zeros([16, LOW], tl.float32),) * NEAR
    for tile in range(tl.program_id(1), tl.cdiv(M, ROWS) * across, tl.num_programs(1)):
        first_chunk = group * GROUP + tile % across * BLOCK
        row, chunk, lane, mask = place(tile // across * ROWS, first_chunk, M, (group + 1) * GROUP, ROWS, BLOCK, CHUNK)
        offset = (row * CHUNKS + chunk) * CHUNK + lane  # [N]
        x, squash_slope = squashed(tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32), SQUASH)
        dy = tl.load(dy_pointer + offset, mask=mask, other=0.0).to(tl.float32)  # 0 outside: nothing there counts
        first, values, slopes = near_functions(x, KIND, SIZE, ORDER, NEAR)

        slope = tl.zeros_like(x)  # [N]
        for j in tl.static_range(NEAR):
            slope += tl.load(coefficients + first + j).to(tl.float32) * slopes[j]
        dx = dy * slope * squash_slope
        tl.store(dx_pointer + offset, dx.to(dx_pointer.dtype.element_ty), mask=mask)

        cell = tl.reshape(first, [1, N])
        high = _rounded(tl.where(cell // LOW == highs[:, None], 1.0, 0.0), ROUND)  # [16, N]
        low = _rounded(tl.where(cell % LOW == lows[:, None], 1.0, 0.0), ROUND)  # [LOW, N]
        new_sums = ()
        for j in tl.static_range(NEAR):
            weights = low * _rounded(tl.reshape(dy * values[j], [1, N]), ROUND)  # [LOW, N]
            new_sums = new_sums + (product(high, tl.trans(weights), sums[j], "tf32x3"),)
        sums = new_sums

    cell = highs[:, None] * LOW + lows[None, :]
    partial += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + group) * NEAR * FUNCTIONS
    for j in tl.static_range(NEAR):  # S[j, f] belongs to function f + j
        tl.store(partial + j * FUNCTIONS + j + cell, sums[j], mask=cell <= FUNCTIONS - NEAR)
