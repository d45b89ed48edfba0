"""What a training step takes of memory, estimated from a model's shapes where no run has told it yet.

Weights, gradients and moments are counted; the rest follows from how many values go through the layers. What of those
is kept for backward, in one value for each that goes into or comes out of a matrix product, was fitted: on a GPU to 27
arms of `osre25`, `lead`, `bases` and `depth` on an H100, which it gives within 16 %, reserved within 23 %; elsewhere to
what autograd saves of five arms on a CPU. Expect to be a quarter off. What teachers and curricula add was looked up in
`curricula` on an H100, six arms whose peaks it gives within 6 %.
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
from kallm_bench.training.teacher import CHUNK as HEARD_CHUNK

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

BETWEEN = {"cuda": 4, "cpu": 16}
"""Bytes of a logit on its way from product to slope, compiled and not."""

HEARD_BETWEEN = {"cuda": 12, "cpu": 32}
"""The same where a teacher's logit is beside it, which is another product; on a GPU by `curricula` on an H100."""

RESERVED = {"recorded": 1.85, "compiled": 1.1, "plain": 1.3}
"""What the GPU's allocator holds for each byte that tensors take: with the pools of recorded graphs, and without."""


class Turn(NamedTuple):
    """What differs for some time of a run under a curriculum.

    Args:
        values: more of them a token, that learning blocks keep for backward; see Shares.
        idle: parameters that have had no gradient yet.
    """

    values: int = 0
    idle: int = 0


class Beside(NamedTuple):
    """What a teacher and a curriculum bring along; see kallm_bench.teaching.

    Args:
        loaded: parameters of the untouched model, which is whole when training begins; 0 where it takes no part.
        held: those of them that stay on a GPU; on a CPU a file is mapped as long as anything of it is used.
        turns: all that there are in a run.
        heard: whether a teacher's word counts.
        changes: whether modules change, so that nothing can be recorded.
    """

    loaded: int = 0
    held: int = 0
    turns: tuple[Turn, ...] = (Turn(),)
    heard: bool = False
    changes: bool = False


ALONE = Beside()
"""Nothing of them."""


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
    beside: Beside = ALONE,
) -> dict[str, float]:
    """Metric -> bytes: peaks of training a model, whose scope is set; its values are not looked at.

    Args:
        positions: tokens of a step that go through at once.
        judged: how many bear loss of those that go through at once, held-out ones too.
        dtype: of the products.
        fast: whether blocks are compiled; see Forward.
        beside: what comes with a teacher or a curriculum.
    """
    blocks, first = find_blocks(model), first_learning(model)
    shares = COMPILED if fast else PLAIN[dtype]
    size = dtype.itemsize * positions
    sizes = [size * through(block) for block in blocks]
    every, learning = list(model.parameters()), [each for each in model.parameters() if each.requires_grad]
    parameters, learn = (sum(each.numel() for each in some) for some in (every, learning))
    on_gpu = device.type == "cuda"
    static = static_bytes(parameters, learn) + 4 * (beside.held if on_gpu else beside.loaded)
    frozen = shares.frozen * max(sizes[:first], default=0)
    if dtype == torch.bfloat16:  # frozen blocks are copied into it
        static += dtype.itemsize * sum(each.numel() for block in blocks[:first] for each in block.parameters())
    text = model.config.get_text_config(decoder=True)
    logits = min(CHUNK[device.type], judged) * text.vocab_size * (2 * dtype.itemsize + BETWEEN[device.type])
    between = logits  # products, their slope
    if beside.heard:
        heard = 3 * dtype.itemsize + HEARD_BETWEEN[device.type]
        between = min(HEARD_CHUNK[device.type], judged) * text.vocab_size * heard + size * text.hidden_size
    turns = (
        shares.learning * (sum(sizes[first:]) + size * turn.values) - ADAM_BYTES * turn.idle for turn in beside.turns
    )
    total = static + frozen + max(max(turns) + between, logits)
    total = max(total, 4.0 * (parameters + beside.loaded))
    if on_gpu:
        way = "plain" if not fast else "compiled" if beside.changes else "recorded"
        return {"peak_vram_allocated_bytes": total, "peak_vram_reserved_bytes": RESERVED[way] * total}
    return {"peak_resident_bytes": total + process_bytes()}


def through(block: nn.Module, inputs: bool = True) -> int:
    """Values a token that go into and come out of a block's products; those that come out alone where nothing learns.

    Args:
        inputs: whether they count, which backward needs for the gradients of weights.
    """
    weights: list[Any] = [
        module.coefficients if isinstance(module, KANLinear) else module.weight
        for module in block.modules()
        if product_weights(module)
    ]
    return sum(int(each.shape[0] + inputs * each.shape[-1]) for each in weights)


def process_bytes() -> int:
    """What this process takes with its libraries, without a model."""
    return memory_in_use(torch.device("cpu")) or 0
