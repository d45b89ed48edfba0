"""The forward and the coefficient gradient for Hopper, where some warps multiply while others expand, in Gluon.

In `fused` every warp expands a tile and then multiplies by it, and the tensor cores rest while it expands. Here eight
warps do nothing but multiply, and four or eight others do nothing but expand:

    copy engine -> [x] -> expanding warps -> [features] -> multiplying warps -> accumulators -> copy engine
                                       copy engine -> [coefficients, or dy] -^

What stands in brackets is a ring of tiles in shared memory. A ring has a barrier `full` for each slot, on which readers
wait: the copy engine passes it when its bytes are there, expanding warps when they have stored. Only the features need
another, `empty`. Elsewhere those who read a slot are those who order the next copy into it, when all of them are done.
A barrier's phase is one bit, which flips with each lap of the ring; one that nobody has passed counts as passed in
phase 1, so who fills an empty ring begins with phase 1 and waits for nothing.

Registers decide who does what. A thread of 12 warps has at most 168 when the kernel starts (65,536 / 384, in eights).
Then the expanding warps give some back, down to 40 or 56, and the multiplying ones take them, up to 232 or 224: 192 are
for 128 x 384 sums. A third kind of warps, for loading alone, would be four more: with 16 all start at 128, and ptxas no
longer takes products of 256 columns (its note C7602). So the multiplying warps order the copies of their second
operand, and the expanding warps those of x.

Shape letters as in `fused`. XS, FS and CS are the slots of the rings of x, of features, and of coefficients or dy.
Only `hopper` imports this, and only to launch: Gluon is an experimental part of Triton, and the interpreter has none.
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
from triton.language import debug_barrier as meet  # all warps of a kind; what Gluon itself calls it changed with 3.7

from kallm_bench.kan.kernels.recurrence import following, squashed


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot of a ring after this one, and its phase."""
    slot += 1
    phase = gl.where(slot == SLOTS, phase ^ 1, phase)
    return gl.where(slot == SLOTS, 0, slot), phase


@gluon.jit
def _previous(slot, SLOTS: gl.constexpr):
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


@gluon.jit
def _barriers(SLOTS: gl.constexpr):
    """A barrier for each slot of a ring; one arrival passes it."""
    barriers = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=1)
    return barriers


@gluon.jit
def _fetch(matrix, row, column, ring, full, slot, wanted):
    """Orders a tile of a matrix into a slot; zeros for what lies beyond its edges."""
    BYTES: gl.constexpr = matrix.block_type.nbytes
    mbarrier.expect(full.index(slot), BYTES, pred=wanted)
    tma.async_copy_global_to_shared(matrix, [row, column], full.index(slot), ring.index(slot), pred=wanted)


@gluon.jit
def _expand_rows(x, places, FIRST: gl.constexpr, R: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr,
                 EXPANDERS: gl.constexpr):  # fmt: skip
    """Writes P_1, P_2, .. of squash(x) into `places`, a tuple of tiles as large as x; a thread loads 16 bytes."""
    BI: gl.constexpr = x.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BI, BI // 8], [EXPANDERS, 1], [1, 0])
    t = squashed(x.load(layout).to(gl.float32), SQUASH, BITS)
    before = gl.zeros_like(t)
    value = before + FIRST
    for n in gl.static_range(len(R)):
        after = following(t, value, before, n, R)
        before = value
        value = after
        places[n].store(value.to(x.dtype))


@gluon.jit
def _next_x(tile, i, I, BI: gl.constexpr):
    """The tile of outputs and the inputs whose x is wanted after these."""
    i += BI
    tile = gl.where(i >= I, tile + gl.num_programs(0), tile)
    return tile, gl.where(i >= I, 0, i)


@gluon.jit
def _forward_expand(x_matrix, x, features, x_full, f_full, f_empty, I, stop, tiles_o, FIRST: gl.constexpr,
                    R: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr, BM: gl.constexpr, BI: gl.constexpr,
                    XS: gl.constexpr, FS: gl.constexpr, ROWS: gl.constexpr, EXPANDERS: gl.constexpr):  # fmt: skip
    """What the expanding warps of `forward` do, ROWS of a tile at once."""
    wanted_tile = gl.program_id(0)
    wanted_i = 0
    for slot in gl.static_range(XS):
        _fetch(x_matrix, wanted_tile // tiles_o * BM, wanted_i, x, x_full, slot, wanted_tile < stop)
        wanted_tile, wanted_i = _next_x(wanted_tile, wanted_i, I, BI)
    x_slot = 0
    x_phase = 0
    f_slot = 0
    f_phase = 1
    for _ in range(gl.program_id(0), stop, gl.num_programs(0)):
        for _ in range(0, I, BI):
            mbarrier.wait(x_full.index(x_slot), x_phase)
            slots = ()
            for _ in gl.static_range(len(R)):
                mbarrier.wait(f_empty.index(f_slot), f_phase)
                slots = slots + (f_slot,)
                f_slot, f_phase = _next(f_slot, f_phase, FS)
            for row in gl.static_range(0, BM, ROWS):
                places = ()
                for n in gl.static_range(len(R)):
                    places = places + (features.index(slots[n]).slice(row, ROWS),)
                _expand_rows(x.index(x_slot).slice(row, ROWS), places, FIRST, R, SQUASH, BITS, EXPANDERS)
            fence_async_shared()  # tensor cores and copy engine see what threads stored only after this
            meet()
            for n in gl.static_range(len(R)):
                mbarrier.arrive(f_full.index(slots[n]), count=1)
            _fetch(x_matrix, wanted_tile // tiles_o * BM, wanted_i, x, x_full, x_slot, wanted_tile < stop)
            wanted_tile, wanted_i = _next_x(wanted_tile, wanted_i, I, BI)
            x_slot, x_phase = _next(x_slot, x_phase, XS)


@gluon.jit
def _fetch_coefficients(matrices, rings, full, slot, tile, i, AHEAD: gl.constexpr, free, I, stop, tiles_o,
                        D: gl.constexpr, BI: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    """Orders coefficients for the product that comes AHEAD products after that of (tile, inputs i.., degree 1), if any.

    A persistent program may order those of its next tile, but never of the one after that: see `hopper.forward`.
    """
    WIDE: gl.constexpr = rings[0].shape[1]
    NARROW: gl.constexpr = rings[1].shape[1]
    BYTES: gl.constexpr = matrices[0].block_type.nbytes + matrices[1].block_type.nbytes
    i += AHEAD // D * BI
    if PERSISTENT:
        tile = gl.where(i >= I, tile + gl.num_programs(0), tile)
        i = gl.where(i >= I, i - gl.cdiv(I, BI) * BI, i)
        wanted = free & (tile < stop)
    else:
        wanted = free & (i < I)
    mbarrier.expect(full.index(slot), BYTES, pred=wanted)
    for part in gl.static_range(2):
        matrix = matrices[part]  # (O, D, I), and its tile has one degree; a slot is (BO, BI)
        place = rings[part].index(slot)._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)
        out = tile % tiles_o * (WIDE + NARROW) + part * WIDE
        tma.async_copy_global_to_shared(matrix, [out, AHEAD % D, i], full.index(slot), place, pred=wanted)


@gluon.jit
def _sums(bias_ptr, out, O, BIAS: gl.constexpr, BM: gl.constexpr, BO: gl.constexpr, WARPS: gl.constexpr = 8):
    """(BM, BO) what a tile's sums begin with: the bias, or zeros. A warp holds all columns of 16 rows."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BO, 16])
    sums = gl.zeros([BM, BO], gl.float32, layout)
    if BIAS:
        outs = out + gl.arange(0, BO, gl.SliceLayout(0, layout))
        sums += gl.load(bias_ptr + outs, mask=outs < O, other=0.0).to(gl.float32)[None, :]
    return sums


@gluon.jit
def _pieces(sums, WIDTH: gl.constexpr):
    """A tile as a tuple of tiles of WIDTH columns. Halved again and again, as threads hold them: no values move."""
    if sums.shape[1] <= WIDTH:
        return (sums,)
    else:
        left, right = sums.reshape([sums.shape[0], 2, sums.shape[1] // 2]).permute(0, 2, 1).split()
        return _pieces(left, WIDTH) + _pieces(right, WIDTH)


@gluon.jit
def _write_in_pieces(sums, matrices, buffers, row, out):
    """Orders a tile of y to be written, piece by piece, through the buffers in turn; returns before it is."""
    tma.store_wait(0)  # the tile before, whose last piece may have left through the first buffer; done long ago
    BUFFERS: gl.constexpr = buffers.shape[0]
    PIECES: gl.constexpr = sums[0].shape[1] // matrices[0].block_shape[1]  # of the first part
    for part in gl.static_range(len(sums)):
        matrix = matrices[part]  # its tiles are pieces
        pieces = _pieces(sums[part], matrix.block_shape[1])
        for n in gl.static_range(len(pieces)):
            buffer = buffers.index((part * PIECES + n) % BUFFERS)
            buffer = buffer._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout)
            tma.store_wait(BUFFERS - 1)  # whatever was in this buffer is written
            meet()
            buffer.store(pieces[n].to(matrix.dtype))
            fence_async_shared()
            meet()
            place = [row, out + part * sums[0].shape[1] + n * matrix.block_shape[1]]
            tma.async_copy_shared_to_global(matrix, place, buffer)


@gluon.jit
def _write(sums, matrices, rings, row, out):
    """Orders a tile of y to be written, through the rings of coefficients, which nobody needs any more."""
    buffers = ()
    for part in gl.static_range(2):
        matrix = matrices[part]
        buffers = buffers + (rings[part]._reinterpret(matrix.dtype, matrix.block_shape, matrix.layout),)
        buffers[part].store(sums[part].to(matrix.dtype))
    fence_async_shared()
    meet()
    for part in gl.static_range(2):
        tma.async_copy_shared_to_global(matrices[part], [row, out + part * sums[0].shape[1]], buffers[part])


@gluon.jit
def _forward_multiply(bias_ptr, matrices, y_matrices, features, rings, y_buffers, f_full, f_empty, c_full, I, O, stop,
                      tiles_o, D: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BI: gl.constexpr,
                      FS: gl.constexpr, CS: gl.constexpr, PERSISTENT: gl.constexpr):  # fmt: skip
    """What the multiplying warps of `forward` do."""
    WIDE: gl.constexpr = rings[0].shape[1]
    NARROW: gl.constexpr = rings[1].shape[1]
    first = gl.program_id(0)
    for slot in gl.static_range(CS):
        _fetch_coefficients(
            matrices, rings, c_full, slot, first, 0, slot, True, I, stop, tiles_o, D, BI, PERSISTENT
        )  # fmt: skip
    f_slot = 0
    f_phase = 0
    c_slot = 0
    c_phase = 0
    for tile in range(first, stop, gl.num_programs(0)):
        row = tile // tiles_o * BM
        out = tile % tiles_o * (WIDE + NARROW)
        sums = (_sums(bias_ptr, out, O, BIAS, BM, WIDE), _sums(bias_ptr, out + WIDE, O, BIAS, BM, NARROW))
        for i in range(0, I, BI):
            for n in gl.static_range(D):
                mbarrier.wait(f_full.index(f_slot), f_phase)
                mbarrier.wait(c_full.index(c_slot), c_phase)
                begun = ()
                for part in gl.static_range(2):
                    c = rings[part].index(c_slot).permute((1, 0))  # (BI, WIDE) or (BI, NARROW)
                    begun = begun + (warpgroup_mma(features.index(f_slot), c, sums[part], is_async=True),)
                sums = warpgroup_mma_wait(2, deps=begun)  # these two run on; the two before them are done ..
                meet()  # .. in every warp: their slots are free
                free = True if n > 0 else i > 0  # a tile's first product finds those before it freed already
                mbarrier.arrive(f_empty.index(_previous(f_slot, FS)), count=1, pred=free)
                _fetch_coefficients(
                    matrices, rings, c_full, _previous(c_slot, CS), tile, i, n - 1 + CS, free, I, stop, tiles_o, D, BI,
                    PERSISTENT,
                )  # fmt: skip
                f_slot, f_phase = _next(f_slot, f_phase, FS)
                c_slot, c_phase = _next(c_slot, c_phase, CS)
        sums = warpgroup_mma_wait(0, deps=sums)
        meet()
        mbarrier.arrive(f_empty.index(_previous(f_slot, FS)), count=1)
        if PERSISTENT:
            _fetch_coefficients(
                matrices, rings, c_full, _previous(c_slot, CS), tile + gl.num_programs(0), 0, CS - 1, True, I, stop,
                tiles_o, D, BI, PERSISTENT,
            )  # fmt: skip
            _write_in_pieces(sums, y_matrices, y_buffers, row, out)
        else:
            _write(sums, y_matrices, rings, row, out)
    tma.store_wait(0)


@gluon.jit
def forward(x_matrix, wide, narrow, y_wide, y_narrow, bias_ptr, M, I, O, FIRST: gl.constexpr, R: gl.constexpr,
            SQUASH: gl.constexpr, BITS: gl.constexpr, BIAS: gl.constexpr, BM: gl.constexpr, BI: gl.constexpr,
            WIDE: gl.constexpr, NARROW: gl.constexpr, XS: gl.constexpr, FS: gl.constexpr, CS: gl.constexpr,
            ROWS: gl.constexpr, EXPANDERS: gl.constexpr, REGISTERS: gl.constexpr,
            PERSISTENT: gl.constexpr):  # fmt: skip
    """y (M, O), in tiles of BM rows and WIDE + NARROW outputs, with one product a degree and BI inputs.

    The descriptors of y have the whole width of their part, or if PERSISTENT that of a piece.
    """
    D: gl.constexpr = len(R)
    gl.static_assert(FS >= D, "the expanding warps fill a slot for every degree before they pass any on")
    gl.static_assert(PERSISTENT or CS * BI >= BM, "a tile of y goes through the ring of coefficients")
    gl.static_assert(BM % ROWS == 0 and ROWS % (EXPANDERS * 256 // BI) == 0, "every thread expands 8 inputs of a row")
    dtype: gl.constexpr = x_matrix.dtype
    layout: gl.constexpr = x_matrix.layout
    tiles_o = gl.cdiv(O, WIDE + NARROW)
    stop = gl.cdiv(M, BM) * tiles_o if PERSISTENT else gl.program_id(0) + 1
    x = gl.allocate_shared_memory(dtype, [XS, BM, BI], layout)
    features = gl.allocate_shared_memory(dtype, [FS, BM, BI], layout)
    rings = (
        gl.allocate_shared_memory(dtype, [CS, WIDE, BI], layout),
        gl.allocate_shared_memory(dtype, [CS, NARROW, BI], layout),
    )
    if PERSISTENT:
        y_buffers = gl.allocate_shared_memory(dtype, [2, BM, y_wide.block_shape[1]], y_wide.layout)
    else:
        y_buffers = features  # not used
    x_full = _barriers(XS)
    f_full = _barriers(FS)
    f_empty = _barriers(FS)
    c_full = _barriers(CS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_forward_multiply, (bias_ptr, (wide, narrow), (y_wide, y_narrow), features, rings, y_buffers, f_full,
                                 f_empty, c_full, I, O, stop, tiles_o, D, BIAS, BM, BI, FS, CS, PERSISTENT)),
            (_forward_expand, (x_matrix, x, features, x_full, f_full, f_empty, I, stop, tiles_o, FIRST, R, SQUASH, BITS,
                               BM, BI, XS, FS, ROWS, EXPANDERS)),
        ],
        [EXPANDERS],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _gradient_expand(x_matrix, x, features, x_full, f_full, f_empty, begin, end, i, FIRST: gl.constexpr,
                     R: gl.constexpr, SQUASH: gl.constexpr, BITS: gl.constexpr, BM: gl.constexpr, BI: gl.constexpr,
                     GROUP: gl.constexpr, XS: gl.constexpr, FS: gl.constexpr, ROWS: gl.constexpr,
                     EXPANDERS: gl.constexpr):  # fmt: skip
    """What the expanding warps of `coefficient_gradient` do. All degrees of a tile of x share a slot and a barrier."""
    for slot in gl.static_range(XS):
        _fetch(x_matrix, begin + slot * BM, i, x, x_full, slot, begin + slot * BM < end)
    x_slot = 0
    x_phase = 0
    f_slot = 0
    f_phase = 1
    for row in range(begin, end, BM):
        mbarrier.wait(x_full.index(x_slot), x_phase)
        mbarrier.wait(f_empty.index(f_slot), f_phase)
        for part in gl.static_range(0, BM, ROWS):
            places = ()
            for n in gl.static_range(len(R)):
                group = features[n // GROUP].index(f_slot)  # (BM, GROUP · BI)
                places = places + (group.slice(part, ROWS).slice(n % GROUP * BI, BI, dim=1),)
            _expand_rows(x.index(x_slot).slice(part, ROWS), places, FIRST, R, SQUASH, BITS, EXPANDERS)
        fence_async_shared()
        meet()
        mbarrier.arrive(f_full.index(f_slot), count=1)
        _fetch(x_matrix, row + XS * BM, i, x, x_full, x_slot, row + XS * BM < end)
        x_slot, x_phase = _next(x_slot, x_phase, XS)
        f_slot, f_phase = _next(f_slot, f_phase, FS)


@gluon.jit
def _when(running: gl.constexpr, products):
    """The sums of these products, once no more than so many of them run on; a tuple, however many there are."""
    sums = warpgroup_mma_wait(running, deps=products)
    if len(products) == 1:
        sums = (sums,)
    return sums


@gluon.jit
def _gradient_multiply(dy_matrix, parts_ptr, dy, features, dy_full, f_full, f_empty, begin, end, out, i, part, I, O,
                       D: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BO: gl.constexpr, BI: gl.constexpr,
                       FS: gl.constexpr, CS: gl.constexpr):  # fmt: skip
    """What the multiplying warps of `coefficient_gradient` do."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, GROUP * BI, 16])
    for slot in gl.static_range(CS):
        _fetch(dy_matrix, begin + slot * BM, out, dy, dy_full, slot, begin + slot * BM < end)
    sums = ()
    for _ in gl.static_range(D // GROUP):
        sums = sums + (gl.zeros([BO, GROUP * BI], gl.float32, layout),)
    f_slot = 0
    f_phase = 0
    c_slot = 0
    c_phase = 0
    for row in range(begin, end, BM):
        mbarrier.wait(f_full.index(f_slot), f_phase)
        mbarrier.wait(dy_full.index(c_slot), c_phase)
        begun = ()
        for group in gl.static_range(D // GROUP):
            slopes = dy.index(c_slot).permute((1, 0))  # (BO, BM)
            begun = begun + (warpgroup_mma(slopes, features[group].index(f_slot), sums[group], is_async=True),)
        sums = _when(D // GROUP, begun)
        meet()  # every warp is done with the products before these: their slots are free
        mbarrier.arrive(f_empty.index(_previous(f_slot, FS)), count=1, pred=row > begin)
        wanted = row + (CS - 1) * BM
        _fetch(dy_matrix, wanted, out, dy, dy_full, _previous(c_slot, CS), (row > begin) & (wanted < end))
        f_slot, f_phase = _next(f_slot, f_phase, FS)
        c_slot, c_phase = _next(c_slot, c_phase, CS)
    sums = _when(0, sums)
    outs = out + gl.arange(0, BO, gl.SliceLayout(1, layout))
    columns = gl.arange(0, GROUP * BI, gl.SliceLayout(0, layout))
    ins = i + columns % BI
    inside = (outs < O)[:, None] & (ins < I)[None, :]
    rows = part.to(gl.int64) * O * D * I + outs.to(gl.int64) * D * I  # 64-bit: O · D · I may pass 2³¹
    for group in gl.static_range(D // GROUP):
        place = rows[:, None] + ((group * GROUP + columns // BI) * I + ins)[None, :]
        gl.store(parts_ptr + place, sums[group].to(parts_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def coefficient_gradient(x_matrix, dy_matrix, parts_ptr, M, I, O, SPAN, FIRST: gl.constexpr, R: gl.constexpr,
                         SQUASH: gl.constexpr, BITS: gl.constexpr, BM: gl.constexpr, BI: gl.constexpr,
                         BO: gl.constexpr, GROUP: gl.constexpr, XS: gl.constexpr, FS: gl.constexpr, CS: gl.constexpr,
                         ROWS: gl.constexpr, EXPANDERS: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """parts (S, O, D, I): the gradient's share of each S-th of the rows, SPAN long, for `passes.add_parts` to add.

    SPAN is a multiple of BM. GROUP degrees stand side by side and go through one product; it divides D.
    """
    D: gl.constexpr = len(R)
    gl.static_assert(D % GROUP == 0)
    gl.static_assert(FS > 1, "one slot is filled while another is read")
    gl.static_assert(BM % ROWS == 0 and ROWS % (EXPANDERS * 256 // BI) == 0, "every thread expands 8 inputs of a row")
    tiles_o = gl.cdiv(O, BO)
    tiles = gl.cdiv(I, BI) * tiles_o
    part = gl.program_id(0) // tiles
    i = gl.program_id(0) % tiles // tiles_o * BI
    out = gl.program_id(0) % tiles % tiles_o * BO
    begin = part * SPAN
    end = gl.minimum(begin + SPAN, M)
    dtype: gl.constexpr = x_matrix.dtype
    x = gl.allocate_shared_memory(dtype, [XS, BM, BI], x_matrix.layout)
    features = ()
    for _ in gl.static_range(D // GROUP):
        features = features + (gl.allocate_shared_memory(dtype, [FS, BM, GROUP * BI], x_matrix.layout),)
    dy = gl.allocate_shared_memory(dtype, [CS, BM, BO], dy_matrix.layout)
    x_full = _barriers(XS)
    f_full = _barriers(FS)
    f_empty = _barriers(FS)
    dy_full = _barriers(CS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_gradient_multiply, (dy_matrix, parts_ptr, dy, features, dy_full, f_full, f_empty, begin, end, out, i,
                                  part, I, O, D, GROUP, BM, BO, BI, FS, CS)),
            (_gradient_expand, (x_matrix, x, features, x_full, f_full, f_empty, begin, end, i, FIRST, R, SQUASH, BITS,
                                BM, BI, GROUP, XS, FS, ROWS, EXPANDERS)),
        ],
        [EXPANDERS],
        [REGISTERS],
    )  # fmt: skip
