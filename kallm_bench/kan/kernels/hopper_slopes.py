"""The input gradient for Hopper: one product whose columns are all degrees of a tile's inputs, in Gluon.

G_n = dy · c_n is wanted for n = 1 .. D before anything else can happen, so a tile is BM rows by D·BI columns of one
product, and its end turns D numbers into one. `fused.input_gradient` multiplies for each degree by itself; an
instruction of 64 columns then reads as many bytes of dy as of coefficients from shared memory, which is what it waits
for. Here the blocks of 64 columns of all degrees lie side by side in shared memory, as one matrix, and up to four of
them share an instruction, so that dy is read once for all.

A program makes one tile after another. Its ring of stages, each a tile of dy and its coefficients, is always full: as
soon as all warps have ended a product, the slot it read is ordered anew, at a tile's end for the next tile.

Only `hopper` imports this, and only to launch; see `hopper_kernels`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import debug_barrier as meet

from kallm_bench.kan.kernels.recurrence import squashed, through_slopes

BI: gl.constexpr = gl.constexpr(64)
"""Inputs in a piece of a tile, and columns in a block: 128 bytes, as far as shared memory is swizzled."""


@gluon.jit
def _order_run(c_matrix, c, here, slot, o, column, D: gl.constexpr, BLOCKS: gl.constexpr, FROM: gl.constexpr, wanted):
    """Orders the blocks that share one product, side by side; a block is of one degree and 64 inputs."""
    for block in gl.static_range(BLOCKS):
        place = c.index(slot * BLOCKS + block)._reinterpret(c_matrix.dtype, [c.shape[1], 1, BI], c_matrix.layout)
        at = [o, (FROM + block) % D, column + (FROM + block) // D * BI]
        tma.async_copy_global_to_shared(c_matrix, at, here, place, pred=wanted)


@gluon.jit
def _order(dy_matrix, c_matrix, dy, cs, full, slot, tile, o, tiles_i, D: gl.constexpr, PIECES: gl.constexpr,
           RUNS: gl.constexpr, wanted):  # fmt: skip
    """Orders a stage: dy of a tile's rows and outputs o.., and the coefficients of its inputs, block by block."""
    BM: gl.constexpr = dy.shape[1]
    BO: gl.constexpr = dy.shape[2]
    here = full.index(slot)
    mbarrier.expect(here, (BM + PIECES * D * BI) * BO * 2, pred=wanted)
    tma.async_copy_global_to_shared(dy_matrix, [tile // tiles_i * BM, o], here, dy.index(slot), pred=wanted)
    column = tile % tiles_i * (PIECES * BI)
    for run in gl.static_range(len(RUNS)):
        _order_run(c_matrix, cs[run], here, slot, o, column, D, RUNS[run][0], RUNS[run][1], wanted)


@gluon.jit
def _next_stage(tile, o, O, BO: gl.constexpr, wanted):
    """The stage after this one, if this one was wanted: the tile's next outputs, or the program's next tile."""
    o = gl.where(wanted, o + BO, o)
    tile = gl.where(o >= O, tile + gl.num_programs(0), tile)
    return tile, gl.where(o >= O, 0, o)


@gluon.jit
def _blocks(total, layout: gl.constexpr):
    """A sum of several blocks as a tuple of its blocks; every thread keeps what it holds."""
    if total.shape[1] == BI:
        return (gl.convert_layout(total, layout),)
    else:
        first, second = total.reshape([total.shape[0], 2, total.shape[1] // 2]).permute(0, 2, 1).split()
        return _blocks(first, layout) + _blocks(second, layout)


@gluon.jit
def _nothing(BM: gl.constexpr, N: gl.constexpr):
    """Sums that are still 0."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    return gl.zeros([BM, N], gl.float32, layout)


@gluon.jit
def _waited(totals, PENDING: gl.constexpr):
    """The sums, when no more than so many products are still running."""
    done = warpgroup_mma_wait(PENDING, deps=totals)
    if len(totals) == 1:
        done = (done,)
    return done


@gluon.jit
def input_gradient(x_matrix, c_matrix, dy_matrix, dx_matrix, M, I, O, FIRST: gl.constexpr, R: gl.constexpr,
                   SQUASH: gl.constexpr, BITS: gl.constexpr, PIECES: gl.constexpr, RUNS: gl.constexpr,
                   STAGES: gl.constexpr):  # fmt: skip
    """dx (M, I). RUNS: (blocks, number of the first) of each product, the blocks piece by piece, degree by degree."""
    D: gl.constexpr = len(R)
    BM: gl.constexpr = dy_matrix.block_type.shape[0]
    BO: gl.constexpr = dy_matrix.block_type.shape[1]
    dtype: gl.constexpr = dy_matrix.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BI, 16])
    tiles_i = gl.cdiv(I, PIECES * BI)
    tiles = gl.cdiv(M, BM) * tiles_i
    dy = gl.allocate_shared_memory(dtype, [STAGES, BM, BO], dy_matrix.layout)
    cs = ()
    for run in gl.static_range(len(RUNS)):
        cs = cs + (gl.allocate_shared_memory(dtype, [STAGES * RUNS[run][0], BO, BI], flat),)
    x = gl.allocate_shared_memory(dtype, [PIECES, BM, BI], flat)  # and then dx
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
    mbarrier.init(x_full.index(0), count=1)
    fence_async_shared()
    meet()
    wanted_tile = gl.program_id(0)
    wanted_o = 0
    for slot in gl.static_range(STAGES):
        _order(dy_matrix, c_matrix, dy, cs, full, slot, wanted_tile, wanted_o, tiles_i, D, PIECES, RUNS,
               wanted_tile < tiles)  # fmt: skip
        wanted_tile, wanted_o = _next_stage(wanted_tile, wanted_o, O, BO, True)
    slot = 0
    phase = 0
    x_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = tile // tiles_i * BM
        column = tile % tiles_i * (PIECES * BI)
        tma.store_wait(0)  # dx of the tile before has left
        meet()
        mbarrier.expect(x_full.index(0), BM * PIECES * BI * 2)
        for piece in gl.static_range(PIECES):
            tma.async_copy_global_to_shared(x_matrix, [row, column + piece * BI], x_full.index(0), x.index(piece))
        totals = ()
        for run in gl.static_range(len(RUNS)):
            totals = totals + (_nothing(BM, RUNS[run][0] * BI),)
        for o in range(0, O, BO):
            mbarrier.wait(full.index(slot), phase)
            added = ()
            for run in gl.static_range(len(RUNS)):
                c = cs[run]._reinterpret(dtype, [STAGES, BO, RUNS[run][0] * BI], flat).index(slot)
                added = added + (warpgroup_mma(dy.index(slot), c, totals[run], is_async=True),)
            totals = _waited(added, len(RUNS))
            meet()  # all warps have ended the products before these: their slot is free
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            _order(dy_matrix, c_matrix, dy, cs, full, free, wanted_tile, wanted_o, tiles_i, D, PIECES, RUNS,
                   (o > 0) & (wanted_tile < tiles))  # fmt: skip
            wanted_tile, wanted_o = _next_stage(wanted_tile, wanted_o, O, BO, o > 0)
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)
        totals = _waited(totals, 0)
        meet()
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        _order(dy_matrix, c_matrix, dy, cs, full, free, wanted_tile, wanted_o, tiles_i, D, PIECES, RUNS,
               wanted_tile < tiles)  # fmt: skip
        wanted_tile, wanted_o = _next_stage(wanted_tile, wanted_o, O, BO, True)
        mbarrier.wait(x_full.index(0), x_phase)
        x_phase ^= 1
        gradients = ()
        for run in gl.static_range(len(RUNS)):
            gradients = gradients + _blocks(totals[run], layout)
        for piece in gl.static_range(PIECES):
            t = squashed(x.index(piece).load(layout).to(gl.float32), SQUASH, BITS)
            own = ()
            for n in gl.static_range(D):
                own = own + (gradients[piece * D + n],)
            dx = through_slopes(t, gl.zeros_like(t), own, FIRST, R, SQUASH)
            x.index(piece).store(dx.to(dtype))
        fence_async_shared()
        meet()
        for piece in gl.static_range(PIECES):
            tma.async_copy_shared_to_global(dx_matrix, [row, column + piece * BI], x.index(piece))
    tma.store_wait(0)
