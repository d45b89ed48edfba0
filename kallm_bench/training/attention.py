"""Attention within the documents of packed rows, by the flash kernel for sequences of any length that torch carries.

A mask that keeps documents apart costs a number for every pair of tokens in a row. This kernel is told where documents
begin instead and never looks across. Where it cannot be had, or an architecture does not hand on what it needs, rows
are masked as before; `forward` compares the two before it believes one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "kallm_packed"
DOCUMENT = 128
"""Tokens in a document, at least on average: the list of their ends has room for so many, so that its length, which is
compiled and captured, hardly ever changes. What is short of it are documents of no token."""


class UnsupportedError(Exception):
    """An architecture asks for something that packed attention does not do. It is then run with masks."""


@contextmanager
def packed_attention(*modules: nn.Module) -> Iterator[None]:
    """Inside, `modules` attend by `attend`, and want `bounds_of` its batch with every call.

    It makes no masks then, since transformers knows of none for that name.

    Raises:
        UnsupportedError: this torch has no such kernel.
    """
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        raise UnsupportedError(f"torch {torch.__version__} has no attention for sequences of any length") from error
    kernel: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]
    known = frozenset(inspect.signature(kernel).parameters)
    AttentionInterface.register(NAME, functools.partial(attend, kernel, known))
    parts = [part for module in modules for part in module.modules()]
    configs: dict[int, Any] = {id(part.config): part.config for part in parts if hasattr(part, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def bounds_of(position_ids: Tensor) -> dict[str, Any]:
    """What `attend` needs to know of a batch, by the names that transformers hands to flash attention.

    Args:
        position_ids: (B, T) on the CPU, 0 where a document begins.
    """
    ends = torch.cat([(position_ids.flatten() == 0).nonzero().flatten(), torch.tensor([position_ids.numel()])])
    missing = -len(ends) % max(16, position_ids.numel() // DOCUMENT)
    ends = torch.nn.functional.pad(ends, (0, missing), value=position_ids.numel()).int()
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": position_ids.shape[1]}


def attend(
    kernel: Callable[..., Tensor],
    known: frozenset[str],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents.

    Args:
        kernel, known: torch's varlen_attn, and which arguments it takes, which differs by version.
        query, key, value: (B, N, T, D), the latter two with as many heads or a divisor of them.
        cu_seq_lens_q: where documents begin among the B·T tokens, and the end; from `bounds_of`.
        max_length_q: no document is longer.

    Returns:
        (B, T, N, D), and None for the weights, which never exist.

    Raises:
        UnsupportedError: anything else than plain causal attention.
    """
    if cu_seq_lens_q is None or dropout or softcap or others.get("s_aux") is not None:
        raise UnsupportedError("packed attention needs bounds, and knows no dropout, caps or sinks")
    batch, heads, length, width = query.shape
    window = -1 if sliding_window is None else sliding_window - 1  # the token itself counts among those of a window
    if window >= 0 and "window_size" not in known:
        raise UnsupportedError("this torch has no windows")
    options: dict[str, Any] = {"window_size": (window, 0)} if "window_size" in known else {"is_causal": True}
    if scaling is not None and scaling != width**-0.5:
        if "scale" not in known:
            raise UnsupportedError("this torch scales by the width of a head alone")
        options["scale"] = scaling
    if key.shape[1] != heads:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    # rotary positions leave queries and keys in float32 under autocast
    rows = [each.to(value.dtype).transpose(1, 2).reshape(batch * length, -1, width) for each in (query, key, value)]
    y = kernel(*rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **options)
    return y.view(batch, length, heads, width), None
