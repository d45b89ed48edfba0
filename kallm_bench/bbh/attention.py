"""Attention of many replies at once, each with tokens of its own after a beginning that many have in common.

The beginning (the few-shot text of a task, often nine tenths of a prompt) is in memory once. The queries of all replies
meet it in one large matrix product, which reads it once for all; what each reply has of its own is a small product
beside it, and one softmax runs over both. Ordinary attention would read the beginning again for each reply, at each
step.

Here that is said in plain PyTorch, for prompts and for steps; `kernels` says a step again in two kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

NAME = "kallm_replies"

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class UnsupportedError(Exception):
    """An architecture asks for something that this attention does not do."""


class Sight(Protocol):
    """What the queries of one call look at, beside the keys that come with them."""

    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(B, T, H, D) of query (B, H, T, D), and key and value (B, N, L, D) with H a multiple of N."""


@contextmanager
def of_any_shape() -> Iterator[None]:
    """Inside, PyTorch's attention is not cuDNN's, which on a GPU makes a plan for each shape it meets.

    A plan takes a tenth of a second and more, and questions come in hundreds of shapes, each used once or twice.
    """
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@contextmanager
def replies_attention(model: nn.Module) -> Iterator[None]:
    """Inside, `model` attends by `attend`, and wants a Sight as `kallm_sight` with every call. It makes no masks."""
    AttentionInterface.register(NAME, attend)
    configs: dict[int, Any] = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    kallm_sight: Sight | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as `kallm_sight` has it; shapes are its own.

    Returns:
        (B, T, H, D) in the dtype of `value`, and None for the weights.

    Raises:
        UnsupportedError: anything else than plain attention.
    """
    if kallm_sight is None or attention_mask is not None or dropout:
        raise UnsupportedError("replies are decoded with a Sight, without masks and dropout")
    if any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "head_mask")):
        raise UnsupportedError("attention with caps, sinks or biases")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kallm_sight.look(module.layer_idx, query.to(value.dtype), key.to(value.dtype), value, scaling), None


@dataclass(frozen=True)
class PromptSight:
    """Every token of a prompt looks at the whole beginning and at those before it.

    Args:
        beginning: keys and values (N, P, D) of the beginning in each layer; empty where there is none.
    """

    beginning: Sequence[Pair]

    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        attention = nn.functional.scaled_dot_product_attention
        if not self.beginning:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
            return attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)
        rows, heads, length, _ = query.shape
        groups, before = key.shape[1], self.beginning[layer][0].shape[1]
        key, value = (
            torch.cat([common.expand(rows, -1, -1, -1), own], dim=2)
            for common, own in zip(self.beginning[layer], (key, value), strict=True)
        )
        visible = torch.ones(length, before + length, dtype=torch.bool, device=query.device).tril(before)
        # Heads that share a key stand one behind the other, as if they were more queries: no key is copied for them.
        query = query.reshape(rows, groups, heads // groups * length, -1)
        found = attention(query, key, value, visible.repeat(heads // groups, 1), scale=scaling)
        return found.reshape(rows, heads, length, -1).transpose(1, 2)


@dataclass(frozen=True)
class Neighbours:
    """Rows side by side with one beginning: its tokens are `tokens` of those in memory, maybe none."""

    rows: slice
    tokens: slice


@dataclass(frozen=True)
class StepSight:
    """One token of each reply looks at its beginning and at its own tokens.

    Only matrix products of shapes that `neighbours` and the columns decide, so that what a reply gets does not depend
    on the others where those are fixed.

    Args:
        common: keys and values (N, P, D) of all beginnings in each layer.
        neighbours: all rows, in their sequence.
        visible: (B, 1, 1, L), True where a reply looks among its own tokens.
    """

    common: Sequence[Pair]
    neighbours: Sequence[Neighbours]
    visible: Tensor

    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.common[layer]
        found = [
            _step(
                query[some.rows] * scaling,
                (key[some.rows], value[some.rows]),
                (keys[:, some.tokens], values[:, some.tokens]),
                self.visible[some.rows],
            )
            for some in self.neighbours
        ]
        return found[0] if len(found) == 1 else torch.cat(found)


def _step(query: Tensor, own: Pair, common: Pair, visible: Tensor) -> Tensor:
    """(B, 1, H, D) of query (B, H, 1, D), own (B, N, L, D) and common (N, P, D)."""
    rows, heads, _, width = query.shape
    groups = own[0].shape[1]
    length = common[0].shape[1]
    query = query.reshape(rows, groups, heads // groups, width)  # heads that share a key are rows of one product
    scores = (query @ own[0].transpose(-1, -2)).float().masked_fill(~visible, -torch.inf)  # (B, N, H/N, L)
    if not length:
        return (scores.softmax(dim=-1).to(own[1].dtype) @ own[1]).reshape(rows, 1, heads, -1)
    all_queries = query.transpose(0, 1).reshape(groups, -1, width)  # (N, B·H/N, D)
    of_common = (all_queries @ common[0].transpose(-1, -2)).view(groups, rows, heads // groups, -1).transpose(0, 1)
    weights = torch.cat([of_common.float(), scores], dim=-1).softmax(dim=-1).to(own[1].dtype)
    all_weights = weights[..., :length].transpose(0, 1).reshape(groups, -1, length)
    found = (all_weights @ common[1]).view(groups, rows, heads // groups, -1).transpose(0, 1)
    return (found + weights[..., length:] @ own[1]).reshape(rows, 1, heads, -1)


@dataclass(frozen=True)
class FusedSight:
    """What a StepSight looks at, by the kernels. Shapes follow from the rows alone, so that a step can be recorded.

    The new keys and values are kept by the kernels too. For arguments see `kernels.attend_step`.
    """

    own: Sequence[Pair]
    positions: Tensor
    common: Sequence[Pair]
    starts: Tensor
    lengths: Tensor
    block: int

    def look(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        from kallm_bench.bbh.kernels import attend_step  # Triton is not on every machine

        own, common = self.own[layer], self.common[layer]
        return attend_step(
            query, key, value, own, self.positions, common, self.starts, self.lengths, self.block, scaling
        )
