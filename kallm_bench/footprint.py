"""What a training step takes of memory, estimated from a model's shapes where no run has told it yet.

Weights, gradients and moments are counted; the rest follows from how many values go through the layers. What of those
is kept for backward, in one value for each that goes into or comes out of a matrix product, was fitted: on a GPU to 27
arms of `osre25`, `lead`, `bases` and `depth` on an H100, which it gives within 16 %, reserved within 23 %; elsewhere to
what autograd saves of five arms on a CPU. Expect to be a quarter off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from kallm_bench.kan import KANLinear
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.profiling.flops import product_weights
from kallm_bench.training.entry import first_learning
from kallm_bench.training.loss import CHUNK
from kallm_bench.training.meter import memory_in_use

ADAM_BYTES = 12
"""A learning parameter's gradient and AdamW's two moments, in float32."""


class Shares(NamedTuple):
    """Values held for each that goes into or comes out of a product of a block: learning ones, and a frozen one."""

    learning: float
    frozen: float


COMPILED = Shares(0.8, 0.6)
"""Kernels that do several operations at once keep less between them; recordings keep the frozen part's results."""

PLAIN = {torch.float32: Shares(1.4, 1.0), torch.bfloat16: Shares(2.2, 1.0), torch.float16: Shares(2.2, 1.0)}
"""Operation by operation; under autocast copies in both dtypes."""

BETWEEN = {"cuda": 4, "cpu": 12}
"""Bytes of a logit on its way from product to slope, compiled and not."""

RESERVED = {True: 1.85, False: 1.3}
"""What the GPU's allocator holds for each byte that tensors take, with recorded graphs' pools, and without."""


def static_bytes(parameters: int, learning: int) -> int:
    """Float32 weights, and what learning ones need beside."""
    return 4 * parameters + ADAM_BYTES * learning


def estimated_peaks(
    model: PreTrainedModel,
    positions: int,
    judged: float,
    device: torch.device,
    dtype: torch.dtype,
    fast: bool,
) -> dict[str, float]:
    """Metric -> bytes: peaks of training a model, whose scope is set; its values are not looked at.

    Args:
        positions: tokens of a step that go through at once.
        judged: how many bear loss of those that go through at once, held-out ones too.
        dtype: of the products.
        fast: whether blocks are compiled; see Forward.
    """
    blocks, first = find_blocks(model), first_learning(model)
    shares = COMPILED if fast else PLAIN[dtype]
    sizes = [dtype.itemsize * positions * _through(block) for block in blocks]
    every, learning = list(model.parameters()), [each for each in model.parameters() if each.requires_grad]
    total = float(static_bytes(*(sum(each.numel() for each in some) for some in (every, learning))))
    total += shares.learning * sum(sizes[first:]) + shares.frozen * max(sizes[:first], default=0)
    if dtype == torch.bfloat16:  # frozen blocks are copied into it
        total += dtype.itemsize * sum(each.numel() for block in blocks[:first] for each in block.parameters())
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    at_once = min(CHUNK[device.type], judged)
    total += at_once * vocabulary * (2 * dtype.itemsize + BETWEEN[device.type])  # products, their slope
    if device.type == "cuda":
        return {"peak_vram_allocated_bytes": total, "peak_vram_reserved_bytes": RESERVED[fast] * total}
    return {"peak_resident_bytes": total + process_bytes()}


def _through(block: nn.Module) -> int:
    """Values a token that go into and come out of a block's products."""
    weights: list[Any] = [
        module.coefficients if isinstance(module, KANLinear) else module.weight
        for module in block.modules()
        if product_weights(module)
    ]
    return sum(int(each.shape[0] + each.shape[-1]) for each in weights)


def process_bytes() -> int:
    """What this process takes with its libraries, without a model."""
    return memory_in_use(torch.device("cpu")) or 0
