"""A layer of B-splines or Gaussians: its three products with one function at a time expanded inside them.

`fused` expands all functions of a tile of x at once. A grid has 8 to 50 of them, too many for the registers, but each
is one formula of x and its number, see `bells`: so a step of a product is of one function, and another loop goes
through their numbers. The input gradient is Σ_k (dy · c_k) B_k': a sum is completed for each function, weighted with
that function's slope, and begun again for the next one, so that dL/dB_k, K times as large as x, is never written.

As in `fused`, tiles come through tensor descriptors, and no kernel has a mask; shape letters as there, K functions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kallm_bench.kan.kernels import passes
from kallm_bench.kan.kernels.bells import bell, distance, slope_at, through_squash, value_at
from kallm_bench.kan.kernels.device import product
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.fused import _parts, _settled, _tile, _tiles
from kallm_bench.kan.kernels.plans import LocalTile
from kallm_bench.kan.kernels.recurrence import squashed


@triton.jit
def _forward(x, c, y, bias_ptr, M, I, O, K, ORDER: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
            SQUASH: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
            BO: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """y (M, O). A step is of BI inputs and one function; x is read anew for each, from the cache."""
    tile_m, tile_o = _tile(tl.cdiv(M, BM), tl.cdiv(O, BO))
    row = tile_m * BM
    out = tile_o * BO
    total = tl.zeros((BM, BO), tl.float32)
    for step in tl.range(0, tl.cdiv(I, BI) * K, num_stages=STAGES):
        i = step // K * BI
        k = step % K
        t = squashed(x.load([row, i]).to(tl.float32), SQUASH, BITS)  # (BM, BI)
        weights = c.load([out, k, i]).reshape(BO, BI)
        value = value_at(distance(t, k, STEPS, ZERO), ORDER)
        total = _settled((product(value.to(weights.dtype), weights.T, total, PRECISION),))[0]
    if BIAS:
        outs = out + tl.arange(0, BO)
        total += tl.load(bias_ptr + outs, mask=outs < O, other=0.0).to(tl.float32)[None, :]
    y.store([row, out], total.to(y.dtype))


@triton.jit
def _input_gradient(x, c, dy, dx, M, I, O, K, ORDER: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
                   SQUASH: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
                   STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dx (M, I) from dy (M, O)."""
    tile_m, tile_i = _tile(tl.cdiv(M, BM), tl.cdiv(I, BI))
    row = tile_m * BM
    i = tile_i * BI
    raw = x.load([row, i])  # squashed again for each function: as it is, it takes half the registers
    total = tl.zeros((BM, BI), tl.float32)
    gradient = tl.zeros((BM, BI), tl.float32)  # of one function
    runs = tl.cdiv(O, BO)
    for step in tl.range(0, runs * K, num_stages=STAGES):
        o = step % runs * BO
        k = step // runs
        gradient = product(dy.load([row, o]), c.load([o, k, i]).reshape(BO, BI), gradient, PRECISION)
        if step % runs == runs - 1:
            t = squashed(raw.to(tl.float32), SQUASH, BITS)
            total += gradient * slope_at(distance(t, k, STEPS, ZERO), ORDER, STEPS)
            gradient = tl.zeros((BM, BI), tl.float32)
    t = squashed(raw.to(tl.float32), SQUASH, BITS)
    dx.store([row, i], through_squash(t, total, SQUASH).to(dx.dtype))


@triton.jit
def _coefficient_gradient(x, dy, parts, M, I, O, K, ROWS, ORDER: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
                         SQUASH: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
                         BO: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """parts (S, O, K, I): the gradient's share of each S-th of the rows, ROWS long. A program's tile is of one k."""
    tiles_o = tl.cdiv(O, BO)
    tiles = tl.cdiv(I, BI) * tiles_o * K
    part = tl.program_id(0) // tiles
    k = tl.program_id(0) % K  # neighbours in time read the same x and dy
    out = tl.program_id(0) % tiles // K % tiles_o * BO
    i = tl.program_id(0) % tiles // K // tiles_o * BI
    total = tl.zeros((BI, BO), tl.float32)
    for row in tl.range(part * ROWS, min(part * ROWS + ROWS, M), BM, num_stages=STAGES):
        t = squashed(x.load([row, i]).T.to(tl.float32), SQUASH, BITS)  # (BI, BM)
        slopes = dy.load([row, out])  # (BM, BO)
        value = value_at(distance(t, k, STEPS, ZERO), ORDER)
        total = _settled((product(value.to(slopes.dtype), slopes, total, PRECISION),))[0]
    parts.store([part, out, k, i], total.T.reshape(1, BO, 1, BI).to(parts.dtype))


def forward(x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, tile: LocalTile) -> None:
    """Writes y (M, O) of x (M, I), coefficients (O, K, I) and bias (O,)."""
    (M, I), (O, K, _) = x.shape, coefficients.shape
    _forward[(triton.cdiv(M, tile.rows) * triton.cdiv(O, tile.outputs),)](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(coefficients, tile.outputs, 1, tile.inputs),
        _tiles(y, tile.rows, tile.outputs),
        bias,
        *(M, I, O, K),
        BIAS=bias is not None,
        **_options(x, family, tile),
    )


def input_gradient(x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, tile: LocalTile) -> None:
    """Writes dx (M, I) of x (M, I), coefficients (O, K, I) and dy (M, O)."""
    (M, I), (O, K, _) = x.shape, coefficients.shape
    _input_gradient[(triton.cdiv(M, tile.rows) * triton.cdiv(I, tile.inputs),)](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(coefficients, tile.outputs, 1, tile.inputs),
        _tiles(dy, tile.rows, tile.outputs),
        _tiles(dx, tile.rows, tile.inputs),
        *(M, I, O, K),
        **_options(x, family, tile),
    )


def coefficient_gradient(x: Tensor, dy: Tensor, dc: Tensor, family: Family, tile: LocalTile) -> None:
    """Writes dc (O, K, I) of x (M, I) and dy (M, O); the same bits each time."""
    (M, I), (O, K, _) = x.shape, dc.shape
    tiles = triton.cdiv(I, tile.inputs) * triton.cdiv(O, tile.outputs) * K
    length = triton.cdiv(triton.cdiv(M, _parts(tiles, x.device)), tile.rows) * tile.rows
    count = triton.cdiv(M, length)
    parts = dc[None] if count == 1 else torch.empty((count, O, K, I), dtype=torch.float32, device=x.device)
    _coefficient_gradient[(count * tiles,)](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(dy, tile.rows, tile.outputs),
        _tiles(parts, 1, tile.outputs, 1, tile.inputs),
        *(M, I, O, K),
        length,
        **_options(x, family, tile),
    )
    if count > 1:
        passes.add_parts(parts, dc)


def _options(x: Tensor, family: Family, tile: LocalTile) -> dict[str, Any]:
    shape = bell(family)
    assert shape
    return {
        "ORDER": shape.order,
        "STEPS": shape.steps,
        "ZERO": shape.zero,
        "SQUASH": family.squash,
        "BITS": passes.bits_of(x.dtype),
        "BM": tile.rows,
        "BI": tile.inputs,
        "BO": tile.outputs,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",  # of float32 operands alone
        "num_warps": tile.warps,
    }
