"""The three products of a layer of B-splines or Gaussians for Hopper, one function at a time, in Gluon.

As in `hopper_halves` two groups of four warps expand into registers what the tensor cores multiply by next, and one
more warp orders all copies. There a step expands all functions of its inputs; of a grid's 8 to 50 the registers would
not hold that. Here a step is of one function, which is one formula of x and its number, see `bells`:

    forward               steps go through the functions of 32 or 64 inputs, whose places on the grid stay in registers
    coefficient gradient  a group has one function of 64 inputs, and its steps go through the rows
    input gradient        steps go through the outputs, for one function after another; then that function's slope
                          weights the sum, and another sum adds it up. dy stays in shared memory for all functions

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

from kallm_bench.kan.kernels.bells import slope_at, through_squash, value_at
from kallm_bench.kan.kernels.hopper_halves import _ended
from kallm_bench.kan.kernels.hopper_halves_gradient import _as_they_are, _write
from kallm_bench.kan.kernels.hopper_kernels import _barriers, _fetch, _next, _previous, _sums, _write_in_pieces
from kallm_bench.kan.kernels.recurrence import squashed


@gluon.jit
def _places(x, layout: gl.constexpr, STEPS: gl.constexpr, ZERO: gl.constexpr, SQUASH: gl.constexpr,
            BITS: gl.constexpr):  # fmt: skip
    """Where squash(x) lies on the grid, as the number of the function that has its centre there; in float32."""
    return squashed(x.load(layout).to(gl.float32), SQUASH, BITS) * STEPS + ZERO


@gluon.jit
def _features(distances, ORDER: gl.constexpr, dtype: gl.constexpr):
    """One function's values, made where they stand; see `_as_they_are`."""
    return _as_they_are((value_at(distances, ORDER).to(dtype),))[0]


# --- forward ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _load(x_matrix, matrices, x, rings, x_full, x_empties, c_full, c_empties, I, K, stop, tiles_o):
    """What the warp that orders copies does: x of some inputs, and then their coefficients, function by function."""
    BM: gl.constexpr = x.shape[1]
    BI: gl.constexpr = x.shape[2]
    WIDE: gl.constexpr = rings[0].shape[1]
    BO: gl.constexpr = WIDE if len(rings) == 1 else WIDE + rings[1].shape[1]
    slot = 0
    phase = 1
    x_slot = 0
    x_phase = 1
    for tile in range(gl.program_id(0), stop, gl.num_programs(0)):
        for i in range(0, I, BI):
            for group in gl.static_range(2):
                mbarrier.wait(x_empties[group].index(x_slot), x_phase)
            _fetch(x_matrix, tile // tiles_o * BM, i, x, x_full, x_slot, True)
            x_slot, x_phase = _next(x_slot, x_phase, x.shape[0])
            for k in range(K):
                for group in gl.static_range(2):
                    mbarrier.wait(c_empties[group].index(slot), phase)
                here = c_full.index(slot)
                mbarrier.expect(here, BO * BI * 2)
                for part in gl.static_range(len(rings)):
                    matrix = matrices[part]  # (O, K, I), and its tile has one function
                    place = rings[part].index(slot)._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)
                    tma.async_copy_global_to_shared(matrix, [tile % tiles_o * BO + part * WIDE, k, i], here, place)
                slot, phase = _next(slot, phase, rings[0].shape[0])


@gluon.jit
def _begun(features, rings, slot, sums):
    """The products of one step, on their way."""
    begun = ()
    for part in gl.static_range(len(rings)):
        c = rings[part].index(slot).permute((1, 0))  # (BI, WIDE) or (BI, NARROW)
        begun = begun + (warpgroup_mma(features, c, sums[part], is_async=True),)
    return begun


@gluon.jit
def _multiply(bias_ptr, y_matrix, x, rings, y_buffers, x_full, x_empties, c_full, c_empties, I, O, K, stop, tiles_o,
              GROUP: gl.constexpr, ORDER: gl.constexpr, STEPS: gl.constexpr, ZERO: gl.constexpr, SQUASH: gl.constexpr,
              BITS: gl.constexpr, BIAS: gl.constexpr):  # fmt: skip
    """What group 0 or 1 does: all outputs of its half of a tile's rows."""
    STAGES: gl.constexpr = rings[0].shape[0]
    ROWS: gl.constexpr = x.shape[1] // 2
    BI: gl.constexpr = x.shape[2]
    WIDE: gl.constexpr = rings[0].shape[1]
    BO: gl.constexpr = WIDE if len(rings) == 1 else WIDE + rings[1].shape[1]
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16]), 2)
    mbarrier.wait(x_full.index(0), 0)
    places = _places(x.index(0).slice(GROUP * ROWS, ROWS), layout, STEPS, ZERO, SQUASH, BITS)
    meet()
    mbarrier.arrive(x_empties[GROUP].index(0), count=1)
    features = _features(places, ORDER, x.dtype)
    mbarrier.wait(c_full.index(0), 0)
    slot = 0
    phase = 0
    x_slot, x_phase = _next(0, 0, x.shape[0])
    for tile in range(gl.program_id(0), stop, gl.num_programs(0)):
        out = tile % tiles_o * BO
        sums = ()
        for part in gl.static_range(len(rings)):
            sums = sums + (_sums(bias_ptr, out + part * WIDE, O, BIAS, ROWS, rings[part].shape[1], 4),)
        for i in range(0, I, BI):
            for k in range(1, K):  # the function after the one that is multiplied by
                begun = _begun(features, rings, slot, sums)
                meet()  # all warps have ended the step before; a tile's last one was given back at once
                mbarrier.arrive(c_empties[GROUP].index(_previous(slot, STAGES)), count=1, pred=(i > 0) | (k > 1))
                slot, phase = _next(slot, phase, STAGES)
                ahead = _features(places - k, ORDER, x.dtype)
                mbarrier.wait(c_full.index(slot), phase)  # here for the reason that `hopper_halves` gives
                sums = _ended(begun, (features,))
                features = ahead
            begun = _begun(features, rings, slot, sums)  # of the last function, while the next inputs are read
            more = (i + BI < I) | (tile + gl.num_programs(0) < stop)
            mbarrier.wait(x_full.index(x_slot), x_phase, pred=more)  # else it expands what nobody multiplies by
            places = _places(x.index(x_slot).slice(GROUP * ROWS, ROWS), layout, STEPS, ZERO, SQUASH, BITS)
            ahead = _features(places, ORDER, x.dtype)
            meet()
            mbarrier.arrive(x_empties[GROUP].index(x_slot), count=1, pred=more)
            mbarrier.arrive(c_empties[GROUP].index(_previous(slot, STAGES)), count=1)
            x_slot, x_phase = _next(x_slot, x_phase, x.shape[0])
            slot, phase = _next(slot, phase, STAGES)
            mbarrier.wait(c_full.index(slot), phase, pred=more)
            sums = _ended(begun, (features,))
            features = ahead
        meet()
        mbarrier.arrive(c_empties[GROUP].index(_previous(slot, STAGES)), count=1)
        _write_in_pieces(sums, (y_matrix, y_matrix), y_buffers, (tile // tiles_o * 2 + GROUP) * ROWS, out)
    tma.store_wait(0)


@gluon.jit
def forward(x_matrix, wide, narrow, y_matrix, bias_ptr, M, I, O, K, ORDER: gl.constexpr, STEPS: gl.constexpr,
            ZERO: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr, BIAS: gl.constexpr, WIDTHS: gl.constexpr,
            STAGES: gl.constexpr, PIECES: gl.constexpr):  # fmt: skip
    """y (M, O), in tiles as high as x_matrix's and WIDTHS wide: one accumulator, or two side by side. K is at least 2.

    There is room for two tiles of x, for the coefficients of STAGES steps, and in each group for PIECES of y, tiles of
    y_matrix: half the rows and some columns.
    """
    BM: gl.constexpr = x_matrix.block_type.shape[0]
    BI: gl.constexpr = x_matrix.block_type.shape[1]
    BO: gl.constexpr = WIDTHS[0] if len(WIDTHS) == 1 else WIDTHS[0] + WIDTHS[1]
    dtype: gl.constexpr = x_matrix.dtype
    tiles_o = gl.cdiv(O, BO)
    stop = gl.cdiv(M, BM) * tiles_o
    x = gl.allocate_shared_memory(dtype, [2, BM, BI], x_matrix.layout)
    rings = ()
    for part in gl.static_range(len(WIDTHS)):
        rings = rings + (gl.allocate_shared_memory(dtype, [STAGES, WIDTHS[part], BI], x_matrix.layout),)
    y_shape: gl.constexpr = [PIECES, BM // 2, y_matrix.block_type.shape[1]]
    y_first = gl.allocate_shared_memory(dtype, y_shape, y_matrix.layout)
    y_second = gl.allocate_shared_memory(dtype, y_shape, y_matrix.layout)
    x_full = _barriers(2)
    x_empties = (_barriers(2), _barriers(2))
    c_full = _barriers(STAGES)
    c_empties = (_barriers(STAGES), _barriers(STAGES))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (bias_ptr, y_matrix, x, rings, y_first, x_full, x_empties, c_full, c_empties, I, O, K, stop,
                         tiles_o, 0, ORDER, STEPS, ZERO, SQUASH, BITS, BIAS)),
            (_multiply, (bias_ptr, y_matrix, x, rings, y_second, x_full, x_empties, c_full, c_empties, I, O, K, stop,
                         tiles_o, 1, ORDER, STEPS, ZERO, SQUASH, BITS, BIAS)),
            (_load, (x_matrix, (wide, narrow), x, rings, x_full, x_empties, c_full, c_empties, I, K, stop, tiles_o)),
        ],
        [4, 1],
        [240, 24],  # and 240 are left for the first group
    )  # fmt: skip


# --- coefficient gradient ---------------------------------------------------------------------------------------------


@gluon.jit
def _corner(I, O, K, BO: gl.constexpr):
    """Of this program: its part of the rows, its tile's first input, first output and first function of two."""
    tiles_o = gl.cdiv(O, BO)
    pairs = gl.cdiv(K, 2)
    tiles = gl.cdiv(I, 64) * tiles_o * pairs
    tile = gl.program_id(0) % tiles  # neighbours read the same x and dy
    return gl.program_id(0) // tiles, tile // pairs // tiles_o * 64, tile // pairs % tiles_o * BO, tile % pairs * 2


@gluon.jit
def _load_rows(x_matrix, matrices, x, dys, full, empties, steps, I, O, K, SPAN):
    """What the warp that orders copies does: for each step x and dy."""
    STAGES: gl.constexpr = x.shape[0]
    BM: gl.constexpr = x.shape[1]
    WIDE: gl.constexpr = dys[0].shape[2]
    BO: gl.constexpr = WIDE if len(dys) == 1 else WIDE + dys[1].shape[2]
    part, i, out, _ = _corner(I, O, K, BO)
    slot = 0
    phase = 1
    for step in range(steps):
        for group in gl.static_range(2):
            mbarrier.wait(empties[group].index(slot), phase)
        row = part * SPAN + step * BM
        here = full.index(slot)
        mbarrier.expect(here, BM * (64 + BO) * 2)
        tma.async_copy_global_to_shared(x_matrix, [row, i], here, x.index(slot))
        for n in gl.static_range(len(dys)):
            tma.async_copy_global_to_shared(matrices[n], [row, out + n * WIDE], here, dys[n].index(slot))
        slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _function_of(x, k, layout: gl.constexpr, ORDER: gl.constexpr, STEPS: gl.constexpr, ZERO: gl.constexpr,
                 SQUASH: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    return _features(_places(x.permute((1, 0)), layout, STEPS, ZERO, SQUASH, BITS) - k, ORDER, x.dtype)  # (64, BM)


@gluon.jit
def _multiply_rows(parts_ptr, x, dys, full, empties, steps, I, O, K, GROUP: gl.constexpr, ORDER: gl.constexpr,
                   STEPS: gl.constexpr, ZERO: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """What group 0 or 1 does: the first or the second of the program's functions."""
    STAGES: gl.constexpr = x.shape[0]
    WIDE: gl.constexpr = dys[0].shape[2]
    BO: gl.constexpr = WIDE if len(dys) == 1 else WIDE + dys[1].shape[2]
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16]), 2)
    _, _, _, k = _corner(I, O, K, BO)
    k += GROUP
    sums = ()
    for n in gl.static_range(len(dys)):
        sums = sums + (_sums(parts_ptr, 0, 0, False, 64, dys[n].shape[2], 4),)
    mbarrier.wait(full.index(0), 0)
    features = _function_of(x.index(0), k, layout, ORDER, STEPS, ZERO, SQUASH, BITS)
    mbarrier.wait(full.index(0), 0)
    slot = 0
    phase = 0
    for step in range(steps):
        begun = ()
        for n in gl.static_range(len(dys)):
            begun = begun + (warpgroup_mma(features, dys[n].index(slot), sums[n], is_async=True),)
        meet()  # all warps have ended the step before
        mbarrier.arrive(empties[GROUP].index(_previous(slot, STAGES)), count=1, pred=step > 0)
        slot, phase = _next(slot, phase, STAGES)
        more = step + 1 < steps
        mbarrier.wait(full.index(slot), phase, pred=more)  # else it expands what nobody multiplies by
        ahead = _function_of(x.index(slot), k, layout, ORDER, STEPS, ZERO, SQUASH, BITS)
        mbarrier.wait(full.index(slot), phase, pred=more)  # passed already; here for the reason `hopper_halves` gives
        sums = _ended(begun, (features,))
        features = ahead
    part, i, out, _ = _corner(I, O, K, BO)  # here, where registers are free again
    corner = parts_ptr + ((part.to(gl.int64) * O + out) * K + k) * I + i  # 64-bit: O · K · I may pass 2³¹
    for n in gl.static_range(len(dys)):  # of an odd number of functions, the last has no second one beside it
        _write(sums[n], corner + n * WIDE * K * I, gl.where(k < K, I - i, 0), O - out - n * WIDE, K, I)


@gluon.jit
def coefficient_gradient(x_matrix, wide, narrow, parts_ptr, M, I, O, K, SPAN, ORDER: gl.constexpr,
                         STEPS: gl.constexpr, ZERO: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr,
                         WIDTHS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """parts (S, O, K, I): the gradient's share of each S-th of the rows, SPAN long, for `passes.add_parts` to add.

    A tile is of 64 inputs, two functions, one for each group, and WIDTHS outputs: one accumulator, or two side by side.
    A step has the rows of x_matrix's tiles, and there is room for STAGES of them. SPAN is a multiple of those rows.
    """
    BM: gl.constexpr = x_matrix.block_type.shape[0]
    BO: gl.constexpr = WIDTHS[0] if len(WIDTHS) == 1 else WIDTHS[0] + WIDTHS[1]
    dtype: gl.constexpr = x_matrix.dtype
    matrices = (wide, narrow)
    part, _, _, _ = _corner(I, O, K, BO)
    steps = gl.cdiv(gl.minimum(SPAN, M - part * SPAN), BM)
    x = gl.allocate_shared_memory(dtype, [STAGES, BM, 64], x_matrix.layout)
    dys = ()
    for n in gl.static_range(len(WIDTHS)):
        dys = dys + (gl.allocate_shared_memory(dtype, [STAGES, BM, WIDTHS[n]], matrices[n].layout),)
    full = _barriers(STAGES)
    empties = (_barriers(STAGES), _barriers(STAGES))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_rows, (parts_ptr, x, dys, full, empties, steps, I, O, K, 0, ORDER, STEPS, ZERO, SQUASH, BITS)),
            (_multiply_rows, (parts_ptr, x, dys, full, empties, steps, I, O, K, 1, ORDER, STEPS, ZERO, SQUASH, BITS)),
            (_load_rows, (x_matrix, matrices, x, dys, full, empties, steps, I, O, K, SPAN)),
        ],
        [4, 1],
        [240, 24],  # and 240 are left for the first group
    )  # fmt: skip


# --- input gradient ---------------------------------------------------------------------------------------------------


@gluon.jit
def _load_gradients(x_matrix, c_matrix, dy_matrix, xs, c, dys, x_full, x_empties, c_full, c_empties, dy_full,
                    dy_empties, O, K, row, first, last, PIECES: gl.constexpr):  # fmt: skip
    """What the warp that orders copies does: for each tile of inputs x, dy if it is not there, and coefficients."""
    BLOCKS: gl.constexpr = dys[0].shape[0]
    STAGES: gl.constexpr = c.shape[0] // PIECES
    BI: gl.constexpr = PIECES * 64
    slot = 0
    phase = 1
    x_phase = 1
    dy_phase = 1
    for tile in range(first, last):
        for group in gl.static_range(2):
            mbarrier.wait(x_empties[group].index(0), x_phase)
        x_phase ^= 1
        mbarrier.expect(x_full.index(0), 2 * x_matrix.block_type.nbytes)
        for group in gl.static_range(2):
            tma.async_copy_global_to_shared(x_matrix, [row + group * 64, tile * BI], x_full.index(0),
                                            xs[group].index(0))  # fmt: skip
        for begin in range(0, O, BLOCKS * 64):
            if (tile == first) | (O > BLOCKS * 64):
                for group in gl.static_range(2):
                    mbarrier.wait(dy_empties[group].index(0), dy_phase)
                mbarrier.expect(dy_full.index(0), 2 * BLOCKS * dy_matrix.block_type.nbytes)
                for block in gl.static_range(BLOCKS):  # zeros beyond the last output
                    for group in gl.static_range(2):
                        at = [row + group * 64, begin + block * 64]
                        tma.async_copy_global_to_shared(dy_matrix, at, dy_full.index(0), dys[group].index(block))
                dy_phase ^= 1
            for k in range(K):
                for o in range(begin, gl.minimum(begin + BLOCKS * 64, O), 64):
                    for group in gl.static_range(2):
                        mbarrier.wait(c_empties[group].index(slot), phase)
                    here = c_full.index(slot)
                    mbarrier.expect(here, PIECES * c_matrix.block_type.nbytes)
                    for piece in gl.static_range(PIECES):
                        place = c.index(slot * PIECES + piece)
                        place = place._reinterpret(c_matrix.dtype, c_matrix.block_shape, c_matrix.layout)
                        tma.async_copy_global_to_shared(c_matrix, [o, k, tile * BI + piece * 64], here, place)
                    slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _multiply_gradients(dx_matrix, x, c, dy, buffers, x_full, x_empty, c_full, c_empty, dy_full, dy_empty, O, K, row,
                        first, last, PIECES: gl.constexpr, ORDER: gl.constexpr, STEPS: gl.constexpr,
                        ZERO: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """What either group does: dx of 64 rows, from row on."""
    BLOCKS: gl.constexpr = dy.shape[0]
    STAGES: gl.constexpr = c.shape[0] // PIECES
    BI: gl.constexpr = PIECES * 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BI, 16])
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    weights = c._reinterpret(c.dtype, [STAGES, 64, BI], flat)
    slot = 0
    phase = 0
    x_phase = 0
    dy_phase = 0
    for tile in range(first, last):
        mbarrier.wait(x_full.index(0), x_phase)
        x_phase ^= 1
        places = _places(x.index(0), layout, STEPS, ZERO, SQUASH, BITS)
        meet()
        mbarrier.arrive(x_empty.index(0), count=1)
        total = gl.zeros([64, BI], gl.float32, layout)
        for begin in range(0, O, BLOCKS * 64):
            if (tile == first) | (O > BLOCKS * 64):
                mbarrier.wait(dy_full.index(0), dy_phase)
                dy_phase ^= 1
            blocks = gl.cdiv(gl.minimum(O - begin, BLOCKS * 64), 64)
            for k in range(K):
                gradient = gl.zeros([64, BI], gl.float32, layout)
                for block in range(blocks):
                    mbarrier.wait(c_full.index(slot), phase)
                    gradient = warpgroup_mma(dy.index(block), weights.index(slot), gradient, is_async=True)
                    gradient = warpgroup_mma_wait(1, deps=(gradient,))
                    meet()  # all warps have ended the product before this one
                    mbarrier.arrive(c_empty.index(_previous(slot, STAGES)), count=1, pred=block > 0)
                    slot, phase = _next(slot, phase, STAGES)
                gradient = warpgroup_mma_wait(0, deps=(gradient,))
                meet()
                mbarrier.arrive(c_empty.index(_previous(slot, STAGES)), count=1)
                total += gradient * slope_at(places - k, ORDER, STEPS)
            mbarrier.arrive(dy_empty.index(0), count=1, pred=O > BLOCKS * 64)
        total = through_squash((places - ZERO) * (1 / STEPS), total, SQUASH)
        _write_in_pieces((total,), (dx_matrix,), buffers, row, tile * BI)
    tma.store_wait(0)


@gluon.jit
def input_gradient(x_matrix, c_matrix, dy_matrix, dx_matrix, M, I, O, K, SPLITS, ORDER: gl.constexpr,
                   STEPS: gl.constexpr, ZERO: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr,
                   BLOCKS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """dx (M, I). A program has 128 rows, and one of SPLITS shares of the tiles of inputs, one tile after another.

    A tile is as wide as x_matrix's, a multiple of 64 inputs. dy stays in shared memory as far as BLOCKS blocks of 64
    outputs reach; with more outputs, one part of them is gone through for all functions and then the next. There is
    room for so many STAGES, each the coefficients of 64 outputs.
    """
    BI: gl.constexpr = x_matrix.block_type.shape[1]
    PIECES: gl.constexpr = BI // 64
    dtype: gl.constexpr = x_matrix.dtype
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    row = gl.program_id(0) // SPLITS * 128
    tiles = gl.cdiv(I, BI)
    share = gl.cdiv(tiles, SPLITS)
    first = gl.program_id(0) % SPLITS * share
    last = gl.minimum(first + share, tiles)
    xs = ()
    dys = ()
    buffers = ()
    for _ in gl.static_range(2):
        xs = xs + (gl.allocate_shared_memory(dtype, [1, 64, BI], x_matrix.layout),)
        dys = dys + (gl.allocate_shared_memory(dtype, [BLOCKS, 64, 64], dy_matrix.layout),)
        buffers = buffers + (gl.allocate_shared_memory(dtype, [1, 64, dx_matrix.block_type.shape[1]],
                                                       dx_matrix.layout),)  # fmt: skip
    c = gl.allocate_shared_memory(dtype, [STAGES * PIECES, 64, 64], flat)
    x_full = _barriers(1)
    x_empties = (_barriers(1), _barriers(1))
    dy_full = _barriers(1)
    dy_empties = (_barriers(1), _barriers(1))
    c_full = _barriers(STAGES)
    c_empties = (_barriers(STAGES), _barriers(STAGES))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply_gradients, (dx_matrix, xs[0], c, dys[0], buffers[0], x_full, x_empties[0], c_full, c_empties[0],
                                   dy_full, dy_empties[0], O, K, row, first, last, PIECES, ORDER, STEPS, ZERO, SQUASH,
                                   BITS)),
            (_multiply_gradients, (dx_matrix, xs[1], c, dys[1], buffers[1], x_full, x_empties[1], c_full, c_empties[1],
                                   dy_full, dy_empties[1], O, K, row + 64, first, last, PIECES, ORDER, STEPS, ZERO,
                                   SQUASH, BITS)),
            (_load_gradients, (x_matrix, c_matrix, dy_matrix, xs, c, dys, x_full, x_empties, c_full, c_empties, dy_full,
                               dy_empties, O, K, row, first, last, PIECES)),
        ],
        [4, 1],
        [240, 24],  # and 240 are left for the first group
    )  # fmt: skip
