"""A step's attention in two Triton kernels: every query against the beginning of its block, then each row's own keys.

A softmax can be cut: each part gives its weighted mean of values and the logarithm of its sum of exponentials, and from
those two the parts are put together. So the first kernel reads a beginning once for a tile of queries, a matrix product
each way, and the second reads what belongs to one row alone, puts the parts together, and keeps the new key and value.

Where a row stands, and which beginning is its own, is read from the device: nothing that differs from step to step is
part of a launch, and what a row gets is computed in one sequence whatever stands beside it.

Source: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, section 3; Juravsky et al. 2024, "Hydragen",
arXiv:2402.05099, section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kallm_bench.kan.kernels.device import product

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 128
"""Of a key or a value."""

QUERIES = {2: 64, 4: 16}
"""In a tile of the first kernel, at most, by bytes of a number; more of four bytes would not stay in registers."""

KEYS = {2: 64, 4: 32}
"""That a kernel reads at once, by bytes of a number."""

PROGRAMS = 4 * 132
"""Of the first kernel, about: where rows are few, a beginning is cut in parts."""

MOST_PARTS = 8


def attend_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: tuple[Tensor, Tensor],
    positions: Tensor,
    common: tuple[Tensor, Tensor],
    starts: Tensor,
    lengths: Tensor,
    block: int,
    scaling: float,
) -> Tensor:
    """Attention of one new token in each of B rows to a beginning, to the row's tokens so far, and to itself.

    Computed in float32, products of half types from half types. Writes `key` and `value` into `own`.

    Args:
        query: (B, H, 1, D).
        key, value: (B, N, 1, D) and (B, N, 1, V), of the new token; N divides H.
        own: keys (R, N, L, D) and values (R, N, L, V) of rows, R at least B, in the dtype of the result.
        positions: (R,) int64, of the new token in its row, less than L: what `own` has before it is looked at.
        common: keys (N, P, D) and values (N, P, V) of beginnings; P may be 0.
        starts, lengths: (R,) int64, where a row's beginning stands in `common`; alike in a block.
        block: rows in a block.

    Returns:
        (B, 1, H, V), in the dtype of `own`.
    """
    rows, heads, _, width = query.shape
    groups, value_width = key.shape[1], value.shape[3]
    dtype = own[0].dtype
    query, key, value = (each[:, :, 0].to(dtype) for each in (query, key, value))
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    shared = heads // groups
    tile = min(QUERIES[dtype.itemsize], max(16, triton.next_power_of_2(block * shared)))
    tiles = triton.cdiv(rows, block) * triton.cdiv(block * shared, tile)
    parts = max(1, min(MOST_PARTS, PROGRAMS // (tiles * groups))) if common[0].shape[1] else 0
    means = query.new_empty(parts, rows, heads, value_width, dtype=torch.float32)
    sums = query.new_empty(parts, rows, heads, dtype=torch.float32)  # base 2, as all exponentials here
    found = query.new_empty(rows, 1, heads, value_width, dtype=dtype)
    widths = {
        "D": width,
        "V": value_width,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "VALUE_WIDTH": max(16, triton.next_power_of_2(value_width)),
        "SHARED": shared,
        "KEYS": KEYS[dtype.itemsize],
    }
    steepness = scaling * 1.4426950408889634  # log2(e)
    with torch.cuda.device_of(query):
        if parts:
            _beginnings[tiles, groups, parts](
                query, *common, starts, lengths, means, sums, *query.stride()[:2], *common[0].stride()[:2],
                *common[1].stride()[:2], rows, steepness, BLOCK=block, QUERIES=tile, **widths,
            )  # fmt: skip
        _own[rows, groups](
            query, key, value, *own, positions, means, sums, found, *query.stride()[:2], *key.stride()[:2],
            *value.stride()[:2], *own[0].stride()[:3], *own[1].stride()[:3], rows, parts, steepness,
            QUERIES=max(16, triton.next_power_of_2(shared)), **widths,
        )  # fmt: skip
    return found


@triton.jit
def _weighed(query, keys, values, inside, width, value_width, steepness, top, total, mean, D: tl.constexpr,
             V: tl.constexpr):  # fmt: skip
    """The running softmax of a tile of queries, with some keys more.

    Args:
        query: [QUERIES, WIDTH].
        keys, values: where each of the keys and values begins, [KEYS].
        inside: [KEYS], of which there is at least one.
        top: [QUERIES], the largest score so far.
        total: [QUERIES], the sum of exponentials so far, over 2^top.
        mean: [QUERIES, VALUE_WIDTH], the sum of values so far, so weighed.
    """
    key = tl.load(keys[None, :] + width[:, None], mask=inside[None, :] & (width[:, None] < D), other=0.0)
    scores = tl.zeros([query.shape[0], key.shape[1]], tl.float32)
    scores = product(query, key, scores, "ieee") * steepness  # [QUERIES, KEYS]
    scores = tl.where(inside[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    value = tl.load(
        values[:, None] + value_width[None, :], mask=inside[:, None] & (value_width[None, :] < V), other=0.0
    )
    mean = product(weights.to(value.dtype), value, mean * shrink[:, None], "ieee")
    return higher, total * shrink + tl.sum(weights, 1), mean


@triton.jit(do_not_specialize=["rows"])
def _beginnings(
    query_pointer,  # (B, H, D)
    keys,  # (N, P, D)
    values,  # (N, P, V)
    starts,  # (R,)
    lengths,
    means,  # (parts, B, H, V)
    sums,  # (parts, B, H)
    query_row,
    query_head,
    key_group,
    key_token,
    value_group,
    value_token,
    rows,
    steepness,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of a block's queries against a part of its beginning."""
    TILES: tl.constexpr = (BLOCK * SHARED + QUERIES - 1) // QUERIES
    block = tl.program_id(0) // TILES
    group = tl.program_id(1)
    part = tl.program_id(2)
    heads = tl.num_programs(1) * SHARED
    number = (tl.program_id(0) % TILES) * QUERIES + tl.arange(0, QUERIES)  # row after row, in each its heads
    row = (block * BLOCK + number // SHARED).to(tl.int64)
    head = group * SHARED + number % SHARED
    used = (number < BLOCK * SHARED) & (row < rows)
    width = tl.arange(0, WIDTH)
    value_width = tl.arange(0, VALUE_WIDTH)
    query = tl.load(
        query_pointer + (row * query_row + head * query_head)[:, None] + width[None, :],
        mask=used[:, None] & (width[None, :] < D),
        other=0.0,
    )
    start = tl.load(starts + block * BLOCK)
    length = tl.load(lengths + block * BLOCK).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, KEYS), tl.num_programs(2)) * KEYS
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mean = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32)
    end = tl.minimum(length, part * share + share)
    for at in range(part * share, end, KEYS):
        token = at + tl.arange(0, KEYS)
        place = (start + token).to(tl.int64)
        top, total, mean = _weighed(
            query, keys + group.to(tl.int64) * key_group + place * key_token,
            values + group.to(tl.int64) * value_group + place * value_token, token < end, width, value_width,
            steepness, top, total, mean, D, V,
        )  # fmt: skip
    full = tl.where(total > 0, total, 1.0)  # nothing where the beginning has no such part: then top stays -inf
    place = (part.to(tl.int64) * rows + row) * heads + head
    tl.store(sums + place, top + tl.log2(full), mask=used)
    tl.store(
        means + place[:, None] * V + value_width[None, :],
        mean / full[:, None],
        mask=used[:, None] & (value_width[None, :] < V),
    )


@triton.jit(do_not_specialize=["rows", "parts"])
def _own(
    query_pointer,  # (B, H, D)
    new_key,  # (B, N, D)
    new_value,  # (B, N, V)
    keys,  # (R, N, L, D)
    values,  # (R, N, L, V)
    positions,  # (R,)
    means,  # (parts, B, H, V)
    sums,  # (parts, B, H)
    found,  # (B, H, V)
    query_row,
    query_head,
    new_key_row,
    new_key_group,
    new_value_row,
    new_value_group,
    key_row,
    key_group,
    key_token,
    value_row,
    value_group,
    value_token,
    rows,
    parts,
    steepness,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The heads of a row that share keys, against what the row has of its own; and all parts put together."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(1) * SHARED
    number = tl.arange(0, QUERIES)
    head = group * SHARED + number
    used = number < SHARED
    width = tl.arange(0, WIDTH)
    value_width = tl.arange(0, VALUE_WIDTH)
    query = tl.load(
        query_pointer + row * query_row + head[:, None] * query_head + width[None, :],
        mask=used[:, None] & (width[None, :] < D),
        other=0.0,
    )
    position = tl.load(positions + row).to(tl.int32)
    keys += row * key_row + group * key_group
    values += row * value_row + group * value_group

    # The new token looks at itself, from registers: what is stored here no other program reads.
    key = tl.load(new_key + row * new_key_row + group * new_key_group + width, mask=width < D, other=0.0)
    tl.store(keys + position.to(tl.int64) * key_token + width, key, mask=width < D)
    value_pointer = new_value + row * new_value_row + group * new_value_group
    value = tl.load(value_pointer + value_width, mask=value_width < V, other=0.0)
    tl.store(values + position.to(tl.int64) * value_token + value_width, value, mask=value_width < V)
    top = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * steepness
    total = tl.full([QUERIES], 1.0, tl.float32)
    mean = tl.zeros([QUERIES, VALUE_WIDTH], tl.float32) + value.to(tl.float32)[None, :]

    for at in range(0, position, KEYS):
        token = at + tl.arange(0, KEYS)
        place = token.to(tl.int64)
        top, total, mean = _weighed(
            query, keys + place * key_token, values + place * value_token, token < position, width, value_width,
            steepness, top, total, mean, D, V,
        )  # fmt: skip
    for part in range(parts):
        place = (part * rows + row) * heads + head
        sum_of_part = tl.load(sums + place, mask=used, other=float("-inf"))
        mean_of_part = tl.load(
            means + place[:, None] * V + value_width[None, :],
            mask=used[:, None] & (value_width[None, :] < V),
            other=0.0,
        )
        higher = tl.maximum(top, sum_of_part)
        shrink = tl.exp2(top - higher)
        weight = tl.exp2(sum_of_part - higher)
        mean = mean * shrink[:, None] + mean_of_part * weight[:, None]
        total = total * shrink + weight
        top = higher
    mean = mean / total[:, None]
    place = row * heads + head
    tl.store(
        found + place[:, None] * V + value_width[None, :],
        mean.to(found.dtype.element_ty),
        mask=used[:, None] & (value_width[None, :] < V),
    )
