"""Attention of many replies at once, each with tokens of its own after a beginning that all have in common.

The beginning (the few-shot text of a task, often nine tenths of a prompt) is in memory once. The queries of all replies
meet it in one large matrix product, which reads it once for all; what each reply has of its own is a small product
beside it, and one softmax runs over both. Ordinary attention would read the beginning again for each reply, at each
step.

Only matrix products whose shapes are fixed beforehand, so that a step can be recorded, and so that what a reply gets
does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "kallm_replies"


class UnsupportedError(Exception):
    """An architecture asks for something that this attention does not do."""


@dataclass(frozen=True)
class Sight:
    """What the queries of one call may look at, beside what the cache gives for them.

    Args:
        beginning: keys and values (N, P, D) of the beginning in each layer; empty where there is none.
        visible: of one query a reply: (B, 1, 1, P + L), True where it looks, first at the beginning, then at its own
            tokens. None for prompts, which look at the whole beginning and backwards.
    """

    beginning: tuple[tuple[Tensor, Tensor], ...]
    visible: Tensor | None


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
    """Attention to the beginning and to `key`.

    Args:
        query: (B, H, T, D).
        key, value: (B, N, L, D), H a multiple of N; for prompts L = T.

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
    query, key = query.to(value.dtype), key.to(value.dtype)
    beginning = kallm_sight.beginning[module.layer_idx] if kallm_sight.beginning else None
    if kallm_sight.visible is None:
        return _prompts(query, key, value, scaling, beginning).transpose(1, 2), None
    return _step(query, key, value, scaling, beginning, kallm_sight.visible), None


def _prompts(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, beginning: tuple[Tensor, Tensor] | None
) -> Tensor:
    """(B, H, T, D): every token looks at the whole beginning and at those before it."""
    before, visible = 0, None
    if beginning is not None:
        before = beginning[0].shape[1]
        key, value = (
            torch.cat([common.expand(len(own), -1, -1, -1), own], dim=2)
            for common, own in zip(beginning, (key, value), strict=True)
        )
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(before)
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, visible, is_causal=visible is None, scale=scaling
    )


def _step(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, beginning: tuple[Tensor, Tensor] | None, visible: Tensor
) -> Tensor:
    """(B, 1, H, D): one token of each reply looks at the beginning and at its own tokens."""
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    query = (
        query.reshape(rows, groups, heads // groups, width) * scaling
    )  # heads that share a key are rows of one product
    scores = query @ key.transpose(-1, -2)  # (B, N, H/N, L)
    if beginning is None:
        return (_weights(scores, visible, value.dtype) @ value).reshape(rows, 1, heads, -1)
    all_queries = query.transpose(0, 1).reshape(groups, -1, width)  # (N, B·H/N, D)
    common = (all_queries @ beginning[0].transpose(-1, -2)).view(groups, rows, heads // groups, -1).transpose(0, 1)
    weights = _weights(torch.cat([common, scores], dim=-1), visible, value.dtype)
    length = common.shape[-1]
    of_common = weights[..., :length].transpose(0, 1).reshape(groups, -1, length) @ beginning[1]
    of_common = of_common.view(groups, rows, heads // groups, -1).transpose(0, 1)
    return (of_common + weights[..., length:] @ value).reshape(rows, 1, heads, -1)


def _weights(scores: Tensor, visible: Tensor, dtype: torch.dtype) -> Tensor:
    return scores.float().masked_fill(~visible, -torch.inf).softmax(dim=-1).to(dtype)
