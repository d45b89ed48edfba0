"""What a model keeps of each token, whether a Decoder can keep it so, and for how many replies there is memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kallm_bench.bbh.attention import UnsupportedError

MOST_ROWS = 1024
"""Replies at once where nobody says, at most; more of them make a step of a small model no faster for each."""

ROWS_ELSEWHERE = 16
"""Replies at once where nobody says, not on a GPU."""

SHARE_OF_MEMORY = 0.6
"""Of what is free, for what replies keep; activations, recordings and beginnings take the rest."""


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of a token: a key and a value for each of so many heads."""

    heads: int
    width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        return self.heads * (self.width + self.value_width) * self.dtype.itemsize

    def zeros(self, device: torch.device, *rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values (*rows, N, tokens, D)."""
        widths = (self.width, self.value_width)
        keys, values = (
            torch.zeros(*rows, self.heads, tokens, each, dtype=self.dtype, device=device) for each in widths
        )
        return keys, values


def layers_of(model: PreTrainedModel, need: int) -> tuple[LayerShape, ...]:
    """The layers of a model's cache.

    Args:
        need: tokens in the longest prompt with its reply.

    Raises:
        UnsupportedError: the model keeps something else than keys and values of all tokens.
    """
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        windowed = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= need
        if not (type(layer) is DynamicLayer or windowed) or not layer.is_initialized:
            raise UnsupportedError(f"a cache of kind {type(layer).__name__}")
        keys, values = layer.keys, layer.values
        found.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
    return tuple(found)


def kernels_fit(device: torch.device, layers: Sequence[LayerShape]) -> bool:
    """Whether steps can attend by the kernels: on a GPU, where Triton is, for their types and widths."""
    if device.type != "cuda":
        return False
    try:
        from kallm_bench.bbh import kernels
        from kallm_bench.kan.kernels.device import runs_on
    except ImportError:
        return False
    return runs_on(device) and all(
        layer.dtype in kernels.DTYPES and max(layer.width, layer.value_width) <= kernels.WIDEST for layer in layers
    )


def compiler_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile a kernel for the device."""
    from triton import TritonError

    return (TritonError,)


def rows_that_fit(device: torch.device, layers: Sequence[LayerShape], own: int) -> int:
    """Replies at once that there is memory for, one at least, where each may have `own` tokens."""
    if device.type != "cuda":
        return ROWS_ELSEWHERE
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    row_bytes = own * sum(layer.token_bytes for layer in layers)
    return min(MOST_ROWS, max(1, int(SHARE_OF_MEMORY * free) // row_bytes))
