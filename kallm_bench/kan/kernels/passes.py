"""Passes over memory, for layers so large that a library's matrix products beat ours: they make what those need.

Both handle a tile of rows and channels at once and touch every byte once, so their time is bytes over bandwidth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kallm_bench.kan.kernels import local
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.recurrence import following, squashed, through_slopes

TILE, CHANNELS = 1024, 64
"""Values in a tile of either pass, and its most channels: widths of models are multiples of 64, hardly ever of 256."""

PARTS = 256
"""Partial sums of a column, at most: what is left to one program."""


@triton.jit
def _expand(x_ptr, features_ptr, M, I, stride_x, stride_features, width, FIRST: tl.constexpr, R: tl.constexpr,
            SQUASH: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # 64-bit: rows · stride may pass 2³¹
    channels = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows[:, None] < M) & (channels[None, :] < I)
    x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=inside, other=0.0)  # (BM, BI)
    t = squashed(x.to(tl.float32), SQUASH, BITS)
    before = tl.zeros_like(t)
    value = before + FIRST
    place = features_ptr + rows[:, None] * stride_features + channels[None, :]
    for n in tl.static_range(len(R)):
        after = following(t, value, before, n, R)
        before = value
        value = after
        tl.store(place + n * width, value.to(features_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine(x_ptr, gradients_ptr, dx_ptr, M, I, stride_x, stride_gradients, width, stride_dx, FIRST: tl.constexpr,
             R: tl.constexpr, SQUASH: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr,
             BI: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows[:, None] < M) & (channels[None, :] < I)
    x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=inside, other=0.0)  # (BM, BI)
    t = squashed(x.to(tl.float32), SQUASH, BITS)
    place = gradients_ptr + rows[:, None] * stride_gradients + channels[None, :]
    gradients = ()
    for n in tl.static_range(len(R)):
        gradients = gradients + (tl.load(place + n * width, mask=inside, other=0.0).to(tl.float32),)
    dx = through_slopes(t, tl.zeros_like(t), gradients, FIRST, R, SQUASH)
    tl.store(dx_ptr + rows[:, None] * stride_dx + channels[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _expand_local(x_ptr, features_ptr, M, I, stride_x, stride_features, width, D, KIND: tl.constexpr,
                  SIZE: tl.constexpr, ORDER: tl.constexpr, NEAR: tl.constexpr, SQUASH: tl.constexpr, BM: tl.constexpr,
                  BI: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows[:, None] < M) & (channels[None, :] < I)
    x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=inside, other=0.0)  # (BM, BI)
    t, _ = local.squashed(x.to(tl.float32), SQUASH)
    first, values, _ = local.near_functions(t, KIND, SIZE, ORDER, NEAR)
    place = features_ptr + rows[:, None] * stride_features + channels[None, :]
    for d in range(D):
        value = tl.zeros_like(t)
        for j in tl.static_range(NEAR):
            value = tl.where(first + j == d, values[j], value)
        tl.store(place + d * width, value.to(features_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _combine_local(x_ptr, gradients_ptr, dx_ptr, M, I, stride_x, stride_gradients, width, stride_dx,
                   KIND: tl.constexpr, SIZE: tl.constexpr, ORDER: tl.constexpr, NEAR: tl.constexpr,
                   SQUASH: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channels = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = (rows[:, None] < M) & (channels[None, :] < I)
    x = tl.load(x_ptr + rows[:, None] * stride_x + channels[None, :], mask=inside, other=0.0)  # (BM, BI)
    t, squash_slope = local.squashed(x.to(tl.float32), SQUASH)
    first, _, slopes = local.near_functions(t, KIND, SIZE, ORDER, NEAR)
    place = gradients_ptr + rows[:, None] * stride_gradients + first.to(tl.int64) * width + channels[None, :]
    total = tl.zeros_like(t)
    for j in tl.static_range(NEAR):  # of all the gradients, only those that x can move
        total += tl.load(place + j * width, mask=inside, other=0.0).to(tl.float32) * slopes[j]
    dx = (total * squash_slope).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + rows[:, None] * stride_dx + channels[None, :], dx, mask=inside)


@triton.jit
def _add_parts(parts_ptr, out_ptr, N, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * N.to(tl.int64) + at, mask=at < N, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < N)


@triton.jit
def _column_sums(dy_ptr, sums_ptr, M, O, stride_dy, ROWS, BM: tl.constexpr, BO: tl.constexpr):
    outs = tl.program_id(1) * BO + tl.arange(0, BO)
    first = tl.program_id(0).to(tl.int64) * ROWS
    total = tl.zeros((BM, BO), tl.float32)
    for m in range(0, ROWS, BM):
        rows = first + m + tl.arange(0, BM)
        inside = (rows[:, None] < M) & (outs[None, :] < O)
        total += tl.load(dy_ptr + rows[:, None] * stride_dy + outs[None, :], mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + tl.program_id(0) * O + outs, sums, mask=outs < O)


def expand(x: Tensor, features: Tensor, family: Family) -> None:
    """Writes the D functions of squash(x), x (M, I), into features (M, D·I), function by function."""
    (M, I), D = x.shape, family.functions
    sizes = (x, features, M, I, x.stride(0), features.stride(0), I)
    if family.kind == "polynomial":
        _expand[_tiles(M, I)](*sizes, **_options(x, family))
    else:
        _expand_local[_tiles(M, I)](*sizes, D, **_local_options(x, family))


def combine(x: Tensor, gradients: Tensor, dx: Tensor, family: Family) -> None:
    """Writes dL/dx (M, I) from the gradients of the features (M, D·I)."""
    M, I = x.shape
    sizes = (x, gradients, dx, M, I, x.stride(0), gradients.stride(0), I, dx.stride(0))
    if family.kind == "polynomial":
        _combine[_tiles(M, I)](*sizes, **_options(x, family))
    else:
        _combine_local[_tiles(M, I)](*sizes, **_local_options(x, family))


def _options(x: Tensor, family: Family) -> dict[str, Any]:
    return {
        "FIRST": family.first,
        "R": family.steps,
        "SQUASH": family.squash,
        "BITS": bits_of(x.dtype),
        **_tile(x.shape[1]),
    }


def _local_options(x: Tensor, family: Family) -> dict[str, Any]:
    size, order = map(int, (*family.numbers, 0)[:2])
    return {**local.compiled_with(family.kind, size, order, family.squash), **_tile(x.shape[1])}


def add_parts(parts: Tensor, out: Tensor) -> None:
    """Writes the sum of parts (S, ...) in float32, always in the same order, into out (...)."""
    size, block = out.numel(), 1024
    _add_parts[(triton.cdiv(size, block),)](parts, out, size, PARTS=len(parts), BLOCK=block)


def column_sums(dy: Tensor) -> Tensor:
    """(O,) the sums of dy (M, O) over its rows, in float32 and in dy's dtype, in two stages and without atomics."""
    (M, O), out = dy.shape, dy.new_empty(dy.shape[1])
    if not M:
        return out.zero_()
    rows = 32 * max(4, triton.cdiv(M, 32 * PARTS))
    parts = torch.empty((triton.cdiv(M, rows), O), dtype=torch.float32, device=dy.device)
    _column_sums[(len(parts), triton.cdiv(O, 64))](dy, parts, M, O, dy.stride(0), rows, BM=32, BO=64)
    _column_sums[(1, triton.cdiv(O, 32))](parts, out, len(parts), O, O, len(parts), BM=64, BO=32)
    return out


def bits_of(dtype: torch.dtype) -> int:
    """A dtype's significant bits."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def _tile(channels: int) -> dict[str, int]:
    """A tile's rows and channels: no wider than there are channels, of which a chunk may have but a few."""
    wide = min(CHANNELS, triton.next_power_of_2(channels))
    return {"BM": TILE // wide, "BI": wide}


def _tiles(rows: int, channels: int) -> tuple[int, int]:
    tile = _tile(channels)
    return triton.cdiv(rows, tile["BM"]), triton.cdiv(channels, tile["BI"])
