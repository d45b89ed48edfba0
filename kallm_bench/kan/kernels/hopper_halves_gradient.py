"""The coefficient gradient for Hopper in which the warps that multiply expand for themselves, into registers, in Gluon.

It is the product of the features, transposed, and dy. In `hopper_kernels.coefficient_gradient` dy is the operand that
is transposed, and features reach the tensor cores through shared memory. Here the product is made the other way round,

    dc[o, n, i] = Σ_m P_n(squash(x[m, i])) dy[m, o]    as    (inputs, rows) · (rows, outputs),

so that features come first, and first operands may come from registers. As in `hopper_halves`, two groups of four warps
expand the next rows while the tensor cores work on these, and one more warp orders all copies:

    copy engine -> [x] -> registers, transposed -> features -> tensor cores -> sums of each degree -> memory
                                           copy engine -> [dy] -^

A group's sums are of 64 inputs. Either the two have different inputs and share dy; or they have the same inputs and
different rows, a ring each, and add their sums through shared memory in the end, which halves what is left to add in
memory: a tile then has half as many sums, and as many processors need half as many parts.

Only `hopper` imports this, and only to launch; see `hopper_kernels`, also for what a barrier's phase is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.language import debug_barrier as meet

from kallm_bench.kan.kernels.hopper_halves import _ended, _features
from kallm_bench.kan.kernels.hopper_kernels import _barriers, _fetch, _next, _previous, _sums


@gluon.jit
def _place(I, O, BI: gl.constexpr, BO: gl.constexpr):
    """Of this program: its part of the rows, its tile's first input and first output."""
    tiles_o = gl.cdiv(O, BO)
    tiles = gl.cdiv(I, BI) * tiles_o
    tile = gl.program_id(0) % tiles
    return gl.program_id(0) // tiles, tile // tiles_o * BI, tile % tiles_o * BO


@gluon.jit
def _load(x_matrix, matrices, xs, dys, x_full, dy_full, empties, steps, I, O, SPAN):
    """What the warp that orders copies does: for each step x and dy, ring by ring."""
    RINGS: gl.constexpr = len(dy_full)
    WIDTHS: gl.constexpr = len(dys) // RINGS
    STAGES: gl.constexpr = xs[0].shape[0]
    BM: gl.constexpr = xs[0].shape[1]
    WIDE: gl.constexpr = dys[0].shape[2]
    BO: gl.constexpr = WIDE if WIDTHS == 1 else WIDE + dys[1].shape[2]
    part, i, out = _place(I, O, 128 // RINGS, BO)
    slot = 0
    phase = 1
    for step in range(steps):
        for ring in gl.static_range(RINGS):
            row = part * SPAN + (step * RINGS + ring) * BM
            for group in gl.static_range(ring, 2, RINGS):  # those that read this ring
                mbarrier.wait(empties[group].index(slot), phase)
                _fetch(x_matrix, row, i + (group - ring) * 64, xs[group], x_full[group], slot, True)
            here = dy_full[ring].index(slot)
            mbarrier.expect(here, BM * BO * 2)
            for n in gl.static_range(WIDTHS):
                place = dys[ring * WIDTHS + n].index(slot)
                tma.async_copy_global_to_shared(matrices[n], [row, out + n * WIDE], here, place)
        slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _as_they_are(features):
    """The features, in a way that the compiler does not see through.

    Were those before a loop made in the same way as those in it, it would move what they share, the rounding and the
    arithmetic before it, to the loop's beginning: out from under the products.
    """
    same = ()
    for n in gl.static_range(len(features)):
        same = same + (gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [features[n]], features[n].dtype, True, 2),)
    return same


@gluon.jit
def _swap(sums, dys, handed, GROUP: gl.constexpr, D: gl.constexpr):
    """All the sums, and those of this group's degrees whole, with what the other has of them.

    The second degree, the fourth, .. are of group 1. A group sends through its own ring of dy, which it needs no more.
    """
    WIDTHS: gl.constexpr = len(sums) // D
    MOST: gl.constexpr = (D + 1) // 2  # degrees that a group hands over
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    buffers = ()
    for ring in gl.static_range(2 * WIDTHS):
        gl.static_assert(dys[ring].shape[0] * dys[ring].shape[1] >= MOST * 128, "a group's sums go through its ring")
        buffers = buffers + (dys[ring]._reinterpret(gl.float32, [MOST, 64, dys[ring].shape[2]], layout),)
    meet()  # all warps are done with the ring
    for n in gl.static_range(D):
        if n % 2 != GROUP:
            for part in gl.static_range(WIDTHS):
                buffers[GROUP * WIDTHS + part].index(n // 2).store(sums[n * WIDTHS + part])
    meet()
    mbarrier.arrive(handed[GROUP].index(0), count=1)
    mbarrier.wait(handed[1 - GROUP].index(0), 0)
    whole = ()
    for n in gl.static_range(D):
        for part in gl.static_range(WIDTHS):
            mine = sums[n * WIDTHS + part]
            if n % 2 == GROUP:
                mine += buffers[(1 - GROUP) * WIDTHS + part].index(n // 2).load(mine.type.layout)
            whole = whole + (mine,)
    return whole


@gluon.jit
def _write(sums, corner, inputs, outputs, D, I):
    """Writes the sums (64, WIDE or NARROW) of one degree to a corner of (O, D, I), as far as there are so many.

    Eight threads hold neighbouring inputs: 32 bytes, as much as memory moves at once.
    """
    layout: gl.constexpr = sums.type.layout
    ins = gl.arange(0, sums.shape[0], gl.SliceLayout(1, layout))
    outs = gl.arange(0, sums.shape[1], gl.SliceLayout(0, layout))
    inside = (ins < inputs)[:, None] & (outs < outputs)[None, :]
    gl.store(corner + (ins[:, None] + (outs * (D * I))[None, :]), sums.to(corner.dtype.element_ty), mask=inside)


@gluon.jit
def _multiply(parts_ptr, xs, dys, x_full, dy_full, empties, handed, steps, I, O, GROUP: gl.constexpr,
              FIRST: gl.constexpr, R: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr):  # fmt: skip
    """What group 0 or 1 does."""
    D: gl.constexpr = len(R)
    RINGS: gl.constexpr = len(dy_full)
    RING: gl.constexpr = GROUP % RINGS
    WIDTHS: gl.constexpr = len(dys) // RINGS
    STAGES: gl.constexpr = xs[0].shape[0]
    WIDE: gl.constexpr = dys[0].shape[2]
    BO: gl.constexpr = WIDE if WIDTHS == 1 else WIDE + dys[1].shape[2]
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16]), 2)
    sums = ()
    for _ in gl.static_range(D):
        for part in gl.static_range(WIDTHS):
            sums = sums + (_sums(parts_ptr, 0, 0, False, 64, dys[part].shape[2], 4),)
    mbarrier.wait(x_full[GROUP].index(0), 0)
    features = _features(xs[GROUP].index(0).permute((1, 0)), layout, FIRST, R, SQUASH, BITS)  # (64, BM) each
    features = _as_they_are(features)
    mbarrier.wait(dy_full[RING].index(0), 0)
    slot = 0
    phase = 0
    for step in range(steps):
        begun = ()
        for n in gl.static_range(D):
            for part in gl.static_range(WIDTHS):
                dy = dys[RING * WIDTHS + part].index(slot)
                begun = begun + (warpgroup_mma(features[n], dy, sums[n * WIDTHS + part], is_async=True),)
        meet()  # all warps have ended the step before
        mbarrier.arrive(empties[GROUP].index(_previous(slot, STAGES)), count=1, pred=step > 0)
        slot, phase = _next(slot, phase, STAGES)
        more = step + 1 < steps
        mbarrier.wait(x_full[GROUP].index(slot), phase, pred=more)  # else it expands what nobody multiplies by
        ahead = _features(xs[GROUP].index(slot).permute((1, 0)), layout, FIRST, R, SQUASH, BITS)
        mbarrier.wait(dy_full[RING].index(slot), phase, pred=more)  # here for the reason that `hopper_halves` gives
        sums = _ended(begun, features)
        features = ahead
    if RINGS == 2:
        sums = _swap(sums, dys, handed, GROUP, D)
    part, i, out = _place(I, O, 128 // RINGS, BO)  # here, where registers are free again
    i += (GROUP - RING) * 64
    corner = parts_ptr + (part.to(gl.int64) * O + out) * D * I + i  # 64-bit: O · D · I may pass 2³¹
    for n in gl.static_range(RING, D, RINGS):
        for m in gl.static_range(WIDTHS):
            _write(sums[n * WIDTHS + m], corner + (m * WIDE * D + n) * I, I - i, O - out - m * WIDE, D, I)


@gluon.jit
def coefficient_gradient(x_matrix, wide, narrow, parts_ptr, M, I, O, SPAN, FIRST: gl.constexpr, R: gl.constexpr,
                         SQUASH: gl.constexpr, BITS: gl.constexpr, WIDTHS: gl.constexpr, RINGS: gl.constexpr,
                         STAGES: gl.constexpr):  # fmt: skip
    """parts (S, O, D, I): the gradient's share of each S-th of the rows, SPAN long, for `passes.add_parts` to add.

    A tile has WIDTHS outputs, one accumulator a degree or two side by side. With one of the RINGS of dy it has 128
    inputs, and a step the rows of x_matrix's tiles; with two it has 64, and a step twice those rows, which the groups
    share. There is room for so many STAGES of a step. SPAN is a multiple of its rows.
    """
    BM: gl.constexpr = x_matrix.block_type.shape[0]
    BO: gl.constexpr = WIDTHS[0] if len(WIDTHS) == 1 else WIDTHS[0] + WIDTHS[1]
    dtype: gl.constexpr = x_matrix.dtype
    matrices = (wide, narrow)
    part, _, _ = _place(I, O, 128 // RINGS, BO)
    steps = gl.cdiv(gl.minimum(SPAN, M - part * SPAN), RINGS * BM)
    xs = ()
    for _ in gl.static_range(2):
        xs = xs + (gl.allocate_shared_memory(dtype, [STAGES, BM, 64], x_matrix.layout),)
    dys = ()
    dy_full = ()
    for _ in gl.static_range(RINGS):
        for n in gl.static_range(len(WIDTHS)):
            dys = dys + (gl.allocate_shared_memory(dtype, [STAGES, BM, WIDTHS[n]], matrices[n].layout),)
        dy_full = dy_full + (_barriers(STAGES),)
    x_full = (_barriers(STAGES), _barriers(STAGES))
    empties = (_barriers(STAGES), _barriers(STAGES))
    handed = (_barriers(1), _barriers(1))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (parts_ptr, xs, dys, x_full, dy_full, empties, handed, steps, I, O, 0, FIRST, R, SQUASH,
                         BITS)),
            (_multiply, (parts_ptr, xs, dys, x_full, dy_full, empties, handed, steps, I, O, 1, FIRST, R, SQUASH,
                         BITS)),
            (_load, (x_matrix, matrices, xs, dys, x_full, dy_full, empties, steps, I, O, SPAN)),
        ],
        [4, 1],
        [240, 24],  # and 240 are left for the first group
    )  # fmt: skip
