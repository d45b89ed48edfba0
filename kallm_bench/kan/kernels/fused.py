"""A polynomial layer's three products, with the expansion made inside them, tile by tile, and never written to memory.

The tensor cores take one operand from registers: a tile of x is loaded, squashed and expanded there, and goes straight
into the product. The input gradient needs no expansion before its end: one accumulator for each degree, and the slopes
applied once to what has been added up. Tiles come through tensor descriptors, by the copy engine that Hopper has for
them, which fills what lies beyond an edge with zeros: beyond the last channel coefficients are 0, whatever P_n(0) is,
and beyond the last row dy is 0. So no kernel here has a mask.

Shape letters: M rows (tokens), I inputs, O outputs, D degrees; B before one of them is a tile's size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kallm_bench.kan.kernels import passes
from kallm_bench.kan.kernels.device import INTERPRETED, product
from kallm_bench.kan.kernels.families import Family
from kallm_bench.kan.kernels.plans import Tile
from kallm_bench.kan.kernels.recurrence import following, squashed, through_slopes


@triton.jit
def _tile(tiles_m, tiles_n):
    """Which tile this program makes: eight rows of tiles together, so that both operands are met again in the cache."""
    program = tl.program_id(0)
    first = program // (8 * tiles_n) * 8
    height = min(tiles_m - first, 8)
    return first + program % (8 * tiles_n) % height, program % (8 * tiles_n) // height


@triton.jit
def _settled(accumulators):
    """The same accumulators, but not before their products are done.

    Left alone, the compiler lets a product run on while the next tile is expanded into the registers that it still
    reads; ptxas sees that, and puts a wait after every single instruction (its note C7513). One wait a product is far
    cheaper.
    """
    settled = ()
    for n in tl.static_range(len(accumulators)):
        if INTERPRETED:
            settled = settled + (accumulators[n],)
        else:
            settled = settled + (
                tl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=f,f", [accumulators[n]], dtype=tl.float32, is_pure=True, pack=1
                ),
            )
    return settled


@triton.jit
def _forward(x, wide, narrow, y_wide, y_narrow, bias_ptr, M, I, O, FIRST: tl.constexpr, R: tl.constexpr,
            SQUASH: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
            WIDE: tl.constexpr, WIDES: tl.constexpr, NARROW: tl.constexpr, STAGES: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """y (M, O). A tile has WIDES · WIDE + NARROW outputs, so that 384 or 192, no powers of two, leave nothing over."""
    PARTS: tl.constexpr = WIDES + (NARROW > 0)
    tile_m, tile_o = _tile(tl.cdiv(M, BM), tl.cdiv(O, WIDES * WIDE + NARROW))
    row = tile_m * BM
    out = tile_o * (WIDES * WIDE + NARROW)
    totals = ()
    for p in tl.static_range(PARTS):
        totals = totals + (tl.zeros((BM, WIDE if p < WIDES else NARROW), tl.float32),)
    for i in tl.range(0, I, BI, num_stages=STAGES):
        t = squashed(x.load([row, i]).to(tl.float32), SQUASH, BITS)  # (BM, BI)
        before = tl.zeros_like(t)
        value = before + FIRST
        for n in tl.static_range(len(R)):
            after = following(t, value, before, n, R)
            before = value
            value = after
            added = ()
            for p in tl.static_range(PARTS):
                if p < WIDES:
                    c = wide.load([out + p * WIDE, n, i]).reshape(WIDE, BI)
                else:
                    c = narrow.load([out + p * WIDE, n, i]).reshape(NARROW, BI)
                added = added + (product(value.to(c.dtype), c.T, totals[p], PRECISION),)
            totals = added
        totals = _settled(totals)
    for p in tl.static_range(PARTS):
        total = totals[p]  # (BM, WIDE) or (BM, NARROW)
        outs = out + p * WIDE + tl.arange(0, WIDE if p < WIDES else NARROW)
        if BIAS:
            total += tl.load(bias_ptr + outs, mask=outs < O, other=0.0).to(tl.float32)[None, :]
        if p < WIDES:
            y_wide.store([row, out + p * WIDE], total.to(y_wide.dtype))
        else:
            y_narrow.store([row, out + p * WIDE], total.to(y_narrow.dtype))


@triton.jit
def _input_gradient(x, c, dy, dx, M, I, O, FIRST: tl.constexpr, R: tl.constexpr, SQUASH: tl.constexpr,
                   BITS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, STAGES: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """dx (M, I) from dy (M, O)."""
    tile_m, tile_i = _tile(tl.cdiv(M, BM), tl.cdiv(I, BI))
    row = tile_m * BM
    i = tile_i * BI
    gradients = ()  # of P_1, P_2, ..
    for _ in tl.static_range(len(R)):
        gradients = gradients + (tl.zeros((BM, BI), tl.float32),)
    for o in tl.range(0, O, BO, num_stages=STAGES):
        slopes = dy.load([row, o])  # (BM, BO)
        added = ()
        for n in tl.static_range(len(R)):
            added = added + (product(slopes, c.load([o, n, i]).reshape(BO, BI), gradients[n], PRECISION),)
        gradients = added
    t = squashed(x.load([row, i]).to(tl.float32), SQUASH, BITS)
    dx.store([row, i], through_slopes(t, tl.zeros_like(t), gradients, FIRST, R, SQUASH).to(dx.dtype))


@triton.jit
def _coefficient_gradient(x, dy, parts, M, I, O, ROWS, FIRST: tl.constexpr, R: tl.constexpr, SQUASH: tl.constexpr,
                         BITS: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
                         STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """parts (S, O, D, I): the gradient's share of each S-th of the rows, ROWS long, for `passes.add_parts` to add."""
    tiles_o = tl.cdiv(O, BO)
    tiles = tl.cdiv(I, BI) * tiles_o
    part = tl.program_id(0) // tiles
    i = tl.program_id(0) % tiles // tiles_o * BI
    out = tl.program_id(0) % tiles % tiles_o * BO
    totals = ()
    for _ in tl.static_range(len(R)):
        totals = totals + (tl.zeros((BI, BO), tl.float32),)
    for row in tl.range(part * ROWS, min(part * ROWS + ROWS, M), BM, num_stages=STAGES):
        t = squashed(x.load([row, i]).T.to(tl.float32), SQUASH, BITS)  # (BI, BM)
        slopes = dy.load([row, out])  # (BM, BO)
        before = tl.zeros_like(t)
        value = before + FIRST
        added = ()
        for n in tl.static_range(len(R)):
            after = following(t, value, before, n, R)
            before = value
            value = after
            added = added + (product(value.to(slopes.dtype), slopes, totals[n], PRECISION),)
        totals = _settled(added)
    for n in tl.static_range(len(R)):
        parts.store([part, out, n, i], totals[n].T.reshape(1, BO, 1, BI).to(parts.dtype))


def forward(x: Tensor, coefficients: Tensor, bias: Tensor | None, y: Tensor, family: Family, tile: Tile) -> None:
    """Writes y (M, O) of x (M, I), coefficients (O, D, I) and bias (O,)."""
    (M, I), O = x.shape, len(coefficients)
    wide, count, narrow = tile.outputs
    grid = (triton.cdiv(M, tile.rows) * triton.cdiv(O, wide * count + narrow),)
    _forward[grid](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(coefficients, wide, 1, tile.inputs),
        _tiles(coefficients, narrow or wide, 1, tile.inputs),
        _tiles(y, tile.rows, wide),
        _tiles(y, tile.rows, narrow or wide),
        bias,
        M,
        I,
        O,
        BIAS=bias is not None,
        WIDE=wide,
        WIDES=count,
        NARROW=narrow,
        **_options(x, family, tile),
    )


def input_gradient(x: Tensor, coefficients: Tensor, dy: Tensor, dx: Tensor, family: Family, tile: Tile) -> None:
    """Writes dx (M, I) of x (M, I), coefficients (O, D, I) and dy (M, O)."""
    (M, I), O = x.shape, len(coefficients)
    _input_gradient[(triton.cdiv(M, tile.rows) * triton.cdiv(I, tile.inputs),)](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(coefficients, tile.outputs[0], 1, tile.inputs),
        _tiles(dy, tile.rows, tile.outputs[0]),
        _tiles(dx, tile.rows, tile.inputs),
        M,
        I,
        O,
        BO=tile.outputs[0],
        **_options(x, family, tile),
    )


def coefficient_gradient(x: Tensor, dy: Tensor, dc: Tensor, family: Family, tile: Tile) -> None:
    """Writes dc (O, D, I) of x (M, I) and dy (M, O)."""
    (M, I), (O, D, _) = x.shape, dc.shape
    tiles = triton.cdiv(I, tile.inputs) * triton.cdiv(O, tile.outputs[0])
    length = triton.cdiv(triton.cdiv(M, _parts(tiles, x.device)), tile.rows) * tile.rows
    count = triton.cdiv(M, length)
    parts = dc[None] if count == 1 else torch.empty((count, O, D, I), dtype=torch.float32, device=x.device)
    _coefficient_gradient[(count * tiles,)](
        _tiles(x, tile.rows, tile.inputs),
        _tiles(dy, tile.rows, tile.outputs[0]),
        _tiles(parts, 1, tile.outputs[0], 1, tile.inputs),
        M,
        I,
        O,
        length,
        BO=tile.outputs[0],
        **_options(x, family, tile),
    )
    if count > 1:
        passes.add_parts(parts, dc)


def reachable(*tensors: Tensor) -> bool:
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


def _tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _options(x: Tensor, family: Family, tile: Tile) -> dict[str, Any]:
    return {
        "FIRST": family.first,
        "R": family.steps,
        "SQUASH": family.squash,
        "BITS": passes.bits_of(x.dtype),
        "BM": tile.rows,
        "BI": tile.inputs,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",  # of float32 operands alone
        "num_warps": tile.warps,
    }


def _parts(tiles: int, device: torch.device) -> int:
    """Into how many parts the rows go, so that two programs for every processor have work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, 2 * processors // tiles)
