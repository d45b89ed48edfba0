"""Rational activations in one pass over memory, forward and backward, in both definitions of kan.bases.rational.

An element is read once and written once; between the two stand some fifty instructions, and the memory is the limit.
The coefficients' gradients are sums over all rows. Each program adds up its own rows in registers and writes one row of
partial sums; these are then added in a fixed order, so that two runs agree in every bit. Atomic additions would not.

Source: Yang & Wang 2024, "Kolmogorov-Arnold Transformer", arXiv:2409.10594, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kallm_bench.kan.kernels.tiles import Launch, chunk_size, cut, place

FORWARD = Launch(chunks=128, warps=4)  # of memory as it lies, as a copy goes over it
BACKWARD = Launch(chunks=128, warps=4, programs=6 * 132)  # all at once on an H100, where 72 registers leave room for 7


def rational(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    """F_g(x) = P(x) / (1 + |Σ_{i≥1} b_i x^i|), or with `absolute` P(x) / (1 + Σ_{i≥1} |b_i| |x|^i).

    Computed in float32. Where |u| has no slope it is given the slope 0, as by torch.abs.

    Args:
        x: (..., I), of float32, bfloat16 or float16; its groups are channels side by side.
        numerator: (G, p+1), a_0 first; G divides I.
        denominator: (G, q), b_1 first.
        absolute: which definition.

    Returns:
        (..., I), in the dtype of x.
    """
    values: Tensor = torch.ops.kallm.rational(x, numerator, denominator, absolute)
    return values


@torch.library.custom_op("kallm::rational", mutates_args=())
def _rational(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        chunk = chunk_size(x.shape[-1] // len(numerator), x.element_size())
        chunks, end = x.shape[-1] // chunk, x.numel() // chunk
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(end, FORWARD.chunks),)](
                x, numerator.contiguous(), denominator.contiguous(), y, end, chunks, chunks // len(numerator),
                **_of(numerator, denominator, absolute), BLOCK=FORWARD.chunks, CHUNK=chunk, num_warps=FORWARD.warps,
            )  # fmt: skip
    return y


@torch.library.custom_op("kallm::rational_backward", mutates_args=())
def _rational_backward(
    dy: Tensor, x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(numerator), torch.zeros_like(denominator)
    above, below = numerator.shape[1], denominator.shape[1]
    grid, arguments = _spread(x, numerator, denominator, absolute, BACKWARD)
    partial = x.new_empty(grid[1], above + below, arguments["CHUNKS"], dtype=torch.float32)
    with torch.cuda.device_of(x):
        _backward[grid](x, dy, numerator.contiguous(), denominator.contiguous(), dx, partial, **arguments)
    sums = partial.unflatten(2, (len(numerator), -1)).sum(dim=(0, 3)).T  # (G, p+1+q)
    return dx, _like(numerator, sums[:, :above]), _like(denominator, sums[:, above:])


def _spread(
    x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool, launch: Launch
) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of the backward kernel, (tiles across, programs down), and its arguments."""
    tiles = cut(x, len(numerator), launch)
    own = {"GROUP": tiles.arguments["CHUNKS"] // len(numerator), **_of(numerator, denominator, absolute)}
    return (tiles.across, min(tiles.down, triton.cdiv(launch.programs, tiles.across))), tiles.arguments | own


def _of(numerator: Tensor, denominator: Tensor, absolute: bool) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {"P": numerator.shape[1] - 1, "Q": denominator.shape[1], "ABSOLUTE": absolute}


def _like(parameter: Tensor, gradient: Tensor) -> Tensor:
    return gradient.to(parameter.dtype, copy=True, memory_format=torch.contiguous_format)


@_rational.register_fake
def _(x: Tensor, numerator: Tensor, denominator: Tensor, absolute: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_rational_backward.register_fake
def _(dy, x, numerator, denominator, absolute):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(numerator, memory_format=torch.contiguous_format),
        torch.empty_like(denominator, memory_format=torch.contiguous_format),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, numerator, denominator, ctx.absolute = inputs
    ctx.save_for_backward(x, numerator, denominator)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, above, below = torch.ops.kallm.rational_backward(dy, *ctx.saved_tensors, ctx.absolute)
    return dx, above, below, None


_rational.register_autograd(_differentiate, setup_context=_keep)


@triton.jit
def _by_chunk(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    return tl.reshape(tile.to(tl.float32), [ROWS, BLOCK, CHUNK])


@triton.jit
def _coefficients(pointer, group, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    """The N coefficients of each chunk's group, or their absolute values, lowest power first: each [1, BLOCK, 1]."""
    found = ()
    for i in tl.static_range(N):
        c = tl.load(pointer + group * N + i).to(tl.float32)
        found = found + ((tl.abs(c) if ABSOLUTE else c)[None, :, None],)
    return found


@triton.jit
def _polynomial(z, c, N: tl.constexpr):
    """The polynomial with these N coefficients and its derivative, both by Horner's rule."""
    value = tl.zeros_like(z) + c[N - 1]
    slope = tl.zeros_like(z)
    if N > 1:
        slope = value
        value = value * z + c[N - 2]
    for i in tl.static_range(2, N):
        slope = slope * z + value
        value = value * z + c[N - 1 - i]
    return value, slope


@triton.jit
def _signed(value, by):
    """value · sign(by), with sign(0) = 0."""
    return tl.where(by > 0, value, tl.where(by < 0, -value, 0.0))


@triton.jit
def _forward(
    x_pointer,  # (END, CHUNK), like y
    numerator,  # (G, P+1)
    denominator,  # (G, Q)
    y_pointer,
    END,  # chunks in all rows
    CHUNKS: tl.constexpr,  # to a row; known beforehand, since a division by it stands before everything else
    GROUP: tl.constexpr,  # chunks to a group
    P: tl.constexpr,
    Q: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK * CHUNK)
    mask = offset < tl.minimum(END - first, BLOCK).to(tl.int32) * CHUNK
    group = (tl.program_id(0) % CHUNKS * BLOCK + tl.arange(0, BLOCK)) % CHUNKS // GROUP
    a = _coefficients(numerator, group, P + 1, False)
    b = _coefficients(denominator, group, Q, ABSOLUTE)
    x = _by_chunk(tl.load(x_pointer + first * CHUNK + offset, mask=mask, other=0.0), 1, BLOCK, CHUNK)
    z = tl.abs(x) if ABSOLUTE else x
    above, _ = _polynomial(x, a, P + 1)
    divisor, _ = _polynomial(z, b, Q)
    y = tl.reshape(above / (1.0 + tl.abs(z * divisor)), [BLOCK * CHUNK])
    tl.store(y_pointer + first * CHUNK + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    x_pointer,  # (M, I), like dy and dx
    dy_pointer,
    numerator,  # (G, P+1)
    denominator,  # (G, Q)
    dx_pointer,
    partial,  # (programs, P+1+Q, CHUNKS), float32
    M,
    CHUNKS,  # to a row
    GROUP,  # chunks to a group
    P: tl.constexpr,
    Q: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first_chunk = tl.program_id(0) * BLOCK
    chunk = first_chunk + tl.arange(0, BLOCK)
    inside = chunk < CHUNKS
    group = tl.where(inside, chunk // GROUP, 0)
    a = _coefficients(numerator, group, P + 1, False)
    b = _coefficients(denominator, group, Q, ABSOLUTE)
    zero = tl.zeros([ROWS, BLOCK], tl.float32)
    above_sums = (zero,) * (P + 1)
    below_sums = (zero,) * Q
    for tile in range(tl.program_id(1), tl.cdiv(M, ROWS), tl.num_programs(1)):
        row, column, lane, mask = place(tile * ROWS, first_chunk, M, CHUNKS, ROWS, BLOCK, CHUNK)
        offset = (row * CHUNKS + column) * CHUNK + lane  # [N]
        x = _by_chunk(tl.load(x_pointer + offset, mask=mask, other=0.0), ROWS, BLOCK, CHUNK)
        dy = tl.load(dy_pointer + offset, mask=mask, other=0.0)  # 0 outside, and so nothing there counts in a sum
        dy = _by_chunk(dy, ROWS, BLOCK, CHUNK)

        # y = P/(1+|u|) with u = z·B(z), where z is |x| or x
        z = tl.abs(x) if ABSOLUTE else x
        above, above_slope = _polynomial(x, a, P + 1)
        divisor, divisor_slope = _polynomial(z, b, Q)
        u = z * divisor
        scale = 1.0 / (1.0 + tl.abs(u))
        y = above * scale
        t = dy * scale
        bent = y if ABSOLUTE else _signed(y, u)  # y·d|u|/du
        pull = bent * (divisor + z * divisor_slope)
        slope = above_slope - (_signed(pull, x) if ABSOLUTE else pull)
        dx = tl.reshape(t * slope, [ROWS * BLOCK * CHUNK])
        tl.store(dx_pointer + offset, dx.to(dx_pointer.dtype.element_ty), mask=mask)

        # dL/da_i = Σ t·x^i and dL/db_i = -Σ t·y·sign(u)·x^i, or -sign(b_i) Σ t·y·|x|^i
        new_above = (above_sums[0] + tl.sum(t, axis=2),)
        for i in tl.static_range(1, P + 1):
            t = t * x
            new_above = new_above + (above_sums[i] + tl.sum(t, axis=2),)
        new_below = ()
        weight = -dy * scale * bent
        for i in tl.static_range(Q):
            weight = weight * z
            new_below = new_below + (below_sums[i] + tl.sum(weight, axis=2),)
        above_sums = new_above
        below_sums = new_below

    partial += tl.program_id(1).to(tl.int64) * (P + 1 + Q) * CHUNKS + chunk
    for i in tl.static_range(P + 1):
        tl.store(partial + i * CHUNKS, tl.sum(above_sums[i], axis=0), mask=inside)
    for i in tl.static_range(Q):
        total = tl.sum(below_sums[i], axis=0)
        if ABSOLUTE:
            total = _signed(total, tl.load(denominator + group * Q + i).to(tl.float32))
        tl.store(partial + (P + 1 + i) * CHUNKS, total, mask=inside)
