"""How elementwise kernels cut a tensor of M rows and I channels: into chunks that one load of 16 bytes fetches.

A chunk is a few channels side by side, all of one group. A thread holds whole chunks where it can, so that what belongs
to a group (its coefficients, its share of their gradients) costs a thread one register a chunk, not one an element.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How a kernel is spread over the GPU."""

    chunks: int
    """In a tile, the part of the tensor that a program takes at a time; a power of two."""
    warps: int
    """In a program."""
    programs: int = 0
    """Started at most, where a program takes one tile after another; 0 where it takes one alone."""


@dataclass(frozen=True)
class Cut:
    """A tensor in tiles: `across` of them side by side, in a row or in each group of one, and `down` of such rows."""

    across: int
    down: int
    arguments: dict[str, int]
    """What every kernel takes: M, CHUNKS to a row; and of a tile ROWS, BLOCK chunks side by side, of CHUNK channels."""


def cut(x: Tensor, groups: int, launch: Launch, within_group: bool = False) -> Cut:
    """Tiles for x (..., I), where no chunk, or if `within_group` no tile, holds channels of two of the groups."""
    features = x.shape[-1]
    rows = x.numel() // features
    chunk = chunk_size(features // groups, x.element_size())
    chunks = features // chunk
    width = chunks // groups if within_group else chunks
    block = block_size(width, min(32, launch.chunks))
    tile = launch.chunks // block
    arguments = {"M": rows, "CHUNKS": chunks, "ROWS": tile, "BLOCK": block, "CHUNK": chunk, "num_warps": launch.warps}
    return Cut(triton.cdiv(width, block), triton.cdiv(rows, tile), arguments)


def chunk_size(channels: int, itemsize: int) -> int:
    """Channels to a chunk: the largest power of two that divides a group's channels and fits into 16 bytes."""
    return min(channels & -channels, 16 // itemsize)


def block_size(chunks: int, most: int) -> int:
    """Chunks side by side in a tile: the largest power of two up to `most` that leaves at most an eighth masked."""
    size = most
    while triton.cdiv(chunks, size) * size > chunks * 9 / 8:
        size //= 2
    return size


@triton.jit
def place(first_row, first_chunk, M, END, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """A tile's elements: the row of each, in 64 bits, its chunk, its lane in the chunk, and whether it counts.

    Those of rows before M and chunks before END do. All of shape [ROWS·BLOCK·CHUNK], one axis: of more, Triton does not
    always see which one neighbouring threads should walk along.
    """
    number = tl.arange(0, ROWS * BLOCK * CHUNK)
    row = first_row + number // (BLOCK * CHUNK)
    chunk = first_chunk + number // CHUNK % BLOCK
    return row.to(tl.int64), chunk, number % CHUNK, (row < M) & (chunk < END)
