"""Entering a decoder at a block, and leaving it before one, whatever the architecture does around its blocks.

The decoder is run as it is, with masks, positions and norms of its own; where a block shall not run stands a module
that passes hidden states on, or puts others in their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.models.anatomy import find_blocks


def first_learning(model: PreTrainedModel) -> int:
    """The first block that learns anything; the last one where none does."""
    blocks = find_blocks(model)
    learns = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return learns.index(True) if any(learns) else len(blocks) - 1


class _Passing(nn.Module):
    """Stands in a block's place and passes the hidden states on, in the form in which that block answers.

    Args:
        given: passed on in the place of what comes in.
    """

    def __init__(self, in_tuple: bool, given: Tensor | None = None) -> None:
        super().__init__()
        self.in_tuple, self.given = in_tuple, given
        self._seen: Tensor | None = None

    def forward(self, hidden_states: Tensor, *inputs: Any, **named: Any) -> Tensor | tuple[Tensor]:
        self._seen = hidden_states if self.given is None else self.given
        return (self._seen,) if self.in_tuple else self._seen

    def taken(self) -> Tensor:
        """What went through it last."""
        assert self._seen is not None
        return self._seen


@contextmanager
def left(blocks: nn.ModuleList, frozen: Sequence[nn.Module], in_tuples: bool) -> Iterator[_Passing]:
    """Inside, `frozen` stand for the first blocks, and nothing is done after them; yields what sees what they give."""
    rest = [_Passing(in_tuples) for _ in range(len(blocks) - len(frozen))]
    with _standing(blocks, [*frozen, *rest]):
        yield rest[0]


@contextmanager
def entered(blocks: nn.ModuleList, first: int, hidden: Tensor, in_tuples: bool) -> Iterator[None]:
    """Inside, the decoder begins at block `first`, with these hidden states."""
    below = [_Passing(in_tuples, hidden), *(_Passing(in_tuples) for _ in range(first - 1))]
    with _standing(blocks, [*below, *blocks[first:]]):
        yield


@contextmanager
def _standing(blocks: nn.ModuleList, modules: Sequence[nn.Module]) -> Iterator[None]:
    before = list(blocks)
    try:
        for number, module in enumerate(modules):
            blocks[number] = module
        yield
    finally:
        for number, module in enumerate(before):
            blocks[number] = module


@torch.no_grad()
def place_to_split(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> tuple[int, bool]:
    """The first learning block, and whether blocks answer in tuples; 0 where a decoder cannot be entered there.

    Some hand more from block to block than hidden states. They fail here, or come to something else.

    Args:
        input_ids, position_ids: (B, T), tokens to try it with.
    """
    first, blocks, decoder = first_learning(model), find_blocks(model), model.get_decoder()

    def decode() -> Tensor:
        hidden: Tensor = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        return hidden

    answers: list[Any] = []
    listening = blocks[0].register_forward_hook(lambda module, inputs, output: answers.append(output))
    whole = decode()
    listening.remove()
    in_tuples = isinstance(answers[0], tuple)
    if not first or (in_tuples and len(answers[0]) > 1):
        return 0, in_tuples
    try:
        with left(blocks, list(blocks[:first]), in_tuples) as last:
            decode()
        with entered(blocks, first, last.taken(), in_tuples):
            parted = decode()
    except Exception:  # whatever another architecture does with what is not there
        return 0, in_tuples
    return (first if torch.equal(parted, whole) else 0), in_tuples
