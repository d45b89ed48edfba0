"""The forward for Hopper in which the warps that multiply expand for themselves, into registers, in Gluon.

In `hopper_kernels.forward` features go through shared memory: expanding warps write them, and products read them again
for every part of a tile's outputs, on top of the coefficients, until shared memory can give no more. Here two groups of
four warps have half a tile's rows each. A group expands into registers, in the very layout in which the tensor cores
take their first operand, and while they multiply by it, it expands the next inputs into other registers:

    copy engine -> [x] -> registers -> features -> tensor cores -> sums -> copy engine
                                copy engine -> [coefficients] -^

One more warp orders all copies. What stands in brackets is a ring of tiles in shared memory. The copy engine passes a
slot's barrier `full`, each group its own `empty`, and for both of these the ordering warp waits before it fills the
slot again. A program makes one tile after another, and the ring runs on from one into the next.

The tensor cores need not rest while a group waits for its products, moves features, or writes a tile: nothing holds the
two groups in step, and what one leaves idle, the other uses.

Only `hopper` imports this, and only to launch; see `hopper_kernels`, also for what a barrier's phase is.
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

from kallm_bench.kan.kernels.hopper_kernels import _barriers, _fetch, _next, _previous, _sums, _write_in_pieces
from kallm_bench.kan.kernels.recurrence import following, squashed


@gluon.jit
def _load(x_matrix, matrices, x, rings, x_full, c_full, empties, I, stop, tiles_o, D: gl.constexpr):
    """What the warp that orders copies does: for each step x, and its coefficients degree by degree."""
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    BI: gl.constexpr = x.shape[2]
    WIDE: gl.constexpr = rings[0].shape[1]
    BO: gl.constexpr = WIDE if len(rings) == 1 else WIDE + rings[1].shape[1]
    slot = 0
    phase = 1
    for tile in range(gl.program_id(0), stop, gl.num_programs(0)):
        for i in range(0, I, BI):
            for group in gl.static_range(2):
                mbarrier.wait(empties[group].index(slot), phase)
            _fetch(x_matrix, tile // tiles_o * BM, i, x, x_full, slot, True)
            here = c_full.index(slot)
            mbarrier.expect(here, D * BO * BI * 2)
            for n in gl.static_range(D):
                for part in gl.static_range(len(rings)):
                    matrix = matrices[part]  # (O, D, I), and its tile has one degree; a place is (WIDE or NARROW, BI)
                    place = rings[part].index(slot * D + n)
                    place = place._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)
                    tma.async_copy_global_to_shared(matrix, [tile % tiles_o * BO + part * WIDE, n, i], here, place)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _features(x, layout: gl.constexpr, FIRST: gl.constexpr, R: gl.constexpr, SQUASH: gl.constexpr,
              BITS: gl.constexpr):  # fmt: skip
    """P_1, P_2, .. of squash(x), as the tensor cores take them from registers."""
    t = squashed(x.load(layout).to(gl.float32), SQUASH, BITS)
    before = gl.zeros_like(t)
    value = before + FIRST
    features = ()
    for n in gl.static_range(len(R)):
        after = following(t, value, before, n, R)
        before = value
        value = after
        features = features + (value.to(x.dtype),)
    return features


@gluon.jit
def _ended(products, features):
    """The sums of these products, once they have ended: until then they read the features, which must stay in place."""
    sums = ()
    done = warpgroup_mma_wait(0, deps=products + features)
    for part in gl.static_range(len(products)):
        sums = sums + (done[part],)
    return sums


@gluon.jit
def _multiply(bias_ptr, y_matrix, x, rings, y_buffers, x_full, c_full, empties, I, O, stop, tiles_o,
              GROUP: gl.constexpr, FIRST: gl.constexpr, R: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr,
              BIAS: gl.constexpr):  # fmt: skip
    """What group 0 or 1 does: all outputs of its half of a tile's rows."""
    D: gl.constexpr = len(R)
    STAGES: gl.constexpr = x.shape[0]
    ROWS: gl.constexpr = x.shape[1] // 2
    BI: gl.constexpr = x.shape[2]
    WIDE: gl.constexpr = rings[0].shape[1]
    BO: gl.constexpr = WIDE if len(rings) == 1 else WIDE + rings[1].shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16]), 2)
    mbarrier.wait(x_full.index(0), 0)
    features = _features(x.index(0).slice(GROUP * ROWS, ROWS), layout, FIRST, R, SQUASH, BITS)
    mbarrier.wait(c_full.index(0), 0)
    slot = 0
    phase = 0
    for tile in range(gl.program_id(0), stop, gl.num_programs(0)):
        out = tile % tiles_o * BO
        sums = ()
        for part in gl.static_range(len(rings)):
            sums = sums + (_sums(bias_ptr, out + part * WIDE, O, BIAS, ROWS, rings[part].shape[1], 4),)
        for i in range(0, I, BI):
            for n in gl.static_range(D):
                begun = ()
                for part in gl.static_range(len(rings)):
                    c = rings[part].index(slot * D + n).permute((1, 0))  # (BI, WIDE) or (BI, NARROW)
                    begun = begun + (warpgroup_mma(features[n], c, sums[part], is_async=True),)
                sums = begun
            meet()  # all warps have ended the step before; a tile's last one was given back at once
            mbarrier.arrive(empties[GROUP].index(_previous(slot, STAGES)), count=1, pred=i > 0)
            slot, phase = _next(slot, phase, STAGES)
            more = (i + BI < I) | (tile + gl.num_programs(0) < stop)
            mbarrier.wait(x_full.index(slot), phase, pred=more)  # else it expands what nobody multiplies by
            ahead = _features(x.index(slot).slice(GROUP * ROWS, ROWS), layout, FIRST, R, SQUASH, BITS)
            # This wait stands here, and not before the product, because ptxas moves no arithmetic past its loop: it
            # would wait for the products first, and expand after that.
            mbarrier.wait(c_full.index(slot), phase, pred=more)
            sums = _ended(sums, features)
            features = ahead
        meet()
        mbarrier.arrive(empties[GROUP].index(_previous(slot, STAGES)), count=1)
        _write_in_pieces(sums, (y_matrix, y_matrix), y_buffers, (tile // tiles_o * 2 + GROUP) * ROWS, out)
    tma.store_wait(0)


@gluon.jit
def forward(x_matrix, wide, narrow, y_matrix, bias_ptr, M, I, O, FIRST: gl.constexpr, R: gl.constexpr,
            SQUASH: gl.constexpr, BITS: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr, STAGES: gl.constexpr,
            PIECES: gl.constexpr):  # fmt: skip
    """y (M, O), in tiles as high as x_matrix's and WIDTHS wide: one accumulator, or two side by side.

    A tile of y_matrix is a piece: half the rows and some columns. Each group has room for so many PIECES. A step is a
    tile of x and the coefficients of its inputs, and there is room for so many STAGES of them.
    """
    D: gl.constexpr = len(R)
    BM: gl.constexpr = x_matrix.block_type.shape[0]
    BI: gl.constexpr = x_matrix.block_type.shape[1]
    BO: gl.constexpr = WIDTHS[0] if len(WIDTHS) == 1 else WIDTHS[0] + WIDTHS[1]
    dtype: gl.constexpr = x_matrix.dtype
    tiles_o = gl.cdiv(O, BO)
    stop = gl.cdiv(M, BM) * tiles_o
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, BI], x_matrix.layout)
    rings = ()
    for part in gl.static_range(len(WIDTHS)):
        rings = rings + (gl.allocate_shared_memory(dtype, [STAGES * D, WIDTHS[part], BI], x_matrix.layout),)
    y_shape: gl.constexpr = [PIECES, BM // 2, y_matrix.block_type.shape[1]]
    y_first = gl.allocate_shared_memory(dtype, y_shape, y_matrix.layout)
    y_second = gl.allocate_shared_memory(dtype, y_shape, y_matrix.layout)
    x_full = _barriers(STAGES)
    c_full = _barriers(STAGES)
    empties = (_barriers(STAGES), _barriers(STAGES))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (bias_ptr, y_matrix, x, rings, y_first, x_full, c_full, empties, I, O, stop, tiles_o, 0, FIRST,
                         R, SQUASH, BITS, BIAS)),
            (_multiply, (bias_ptr, y_matrix, x, rings, y_second, x_full, c_full, empties, I, O, stop, tiles_o, 1, FIRST,
                         R, SQUASH, BITS, BIAS)),
            (_load, (x_matrix, (wide, narrow), x, rings, x_full, c_full, empties, I, stop, tiles_o, D)),
        ],
        [4, 1],
        [240, 24],  # and 240 are left for the first group
    )  # fmt: skip
