"""Trees of questions through a model, and the log-likelihoods of their choices out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from kallm_bench.bbh.encoding import Encoded
from kallm_bench.bbh.trees import Batch, Tree

READ_AT_ONCE = 1024
"""Rows of logits that are taken to float32 at one time."""

NOISE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far logits may lie apart that are computed in two ways, as a share of their own spread."""

LOW_PRECISION_NOISE = 0.15
"""The same in dtypes of sixteen bits: 0.02 to 0.06 is what rounding alone gives a model of 30 blocks in bfloat16."""


class _NotSharedError(Exception):
    """The model keeps something else than a key and a value for every token."""


class _Layer(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Grows while the beginning is read; then it stays as it is, and stands before every row."""

    finished = False
    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.finished:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        rows = len(key_states)
        keys, values = (each.expand(rows, -1, -1, -1) for each in (self.keys, self.values))
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def finish(self, tokens: int, kept: int) -> None:
        """Keeps the first `kept` of so many tokens."""
        if self.keys.shape[-2] != tokens or self.values.shape[-2] != tokens:
            raise _NotSharedError
        self.keys, self.values = (each[:, :, :kept].clone() for each in (self.keys, self.values))
        self.finished = True


class Beginning:
    """Keys and values of the tokens that questions have in common; each question sees them, and none changes them.

    Args:
        tokens: what is read, one at least.
        kept: how many of them, from the first one on, are kept; None for all.
    """

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int], kept: int | None = None, read: int = 1) -> None:
        self.cache = Cache(layer_class_to_replicate=_Layer)
        ids = torch.tensor([tokens], device=model.device)
        last = torch.arange(len(tokens) - read, len(tokens), device=model.device)
        with torch.inference_mode(), _reading(model, last):
            self.logits: Tensor = model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[
                0
            ]  # (read, V)
        self.tokens = len(tokens) if kept is None else kept
        filled = [layer for layer in self.cache.layers if layer.is_initialized]
        if not filled:
            raise _NotSharedError
        for layer in filled:
            layer.finish(len(tokens), self.tokens)


class _Layout:
    """A batch as tensors.

    Shapes:
        ids, positions, ends (R, T): tokens, their places in the text, and where what hangs on each slot ends.
        slots (N,): the places among R·T that something is read off at.
        reads, targets, there (C, L): for each choice, which of these and the token to come; choices are of length L
            where `there` says so.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        shape = len(batch.rows), batch.width
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        ends = np.tile(np.arange(1, batch.width + 1), (shape[0], 1))  # what is padded sees itself alone
        slots: list[np.ndarray] = []
        paths: list[tuple[int, ...]] = []
        targets: list[tuple[int, ...]] = []
        read = 0
        for number, row in enumerate(batch.rows):
            at = 0
            for tree in row:
                trunk, branches = len(tree.trunk), tree.branches
                here = slice(at, at + len(tree))
                ids[number, here] = tree.trunk + branches.tokens
                positions[number, here] = tree.start + np.r_[:trunk, np.array(branches.depths, np.int64) + trunk - 1]
                ends[number, at : at + trunk] = at + len(tree)
                ends[number, at + trunk : at + len(tree)] = np.array(branches.ends, np.int64) + at + trunk
                slots.append(np.arange(at + trunk - 1, at + len(tree)) + number * batch.width)
                paths += [tuple(read + 1 + node for node in path) for path in branches.paths]
                targets += tree.targets
                read += len(branches.tokens) + 1
                at += len(tree)
        longest = max(map(len, targets))
        filled = np.array([[i < len(target) for i in range(longest)] for target in targets])
        tables = [np.zeros(filled.shape, np.int64) for _ in range(2)]
        for table, rows in zip(tables, (paths, targets), strict=True):
            table[filled] = np.concatenate([np.array(row, np.int64) for row in rows])
        arrays = (ids, positions, ends, np.concatenate(slots), *tables, filled)
        tensors = [torch.from_numpy(array).to(device, non_blocking=True) for array in arrays]
        self.ids, self.positions, self.ends, self.slots, self.reads, self.targets, self.there = tensors

    def mask(self, before: int, dtype: torch.dtype) -> Tensor:
        """(R, 1, T, before + T), to be added to attention: each slot sees what is above it, and all that comes before.

        Node j is above node i, or i itself, exactly if j <= i < ends[j].
        """
        rows, width = self.ends.shape
        slot = torch.arange(width, device=self.ends.device)
        hidden = (slot > slot[:, None]) | (slot[:, None] >= self.ends[:, None])  # (R, T, T)
        mask = torch.zeros(rows, 1, width, before + width, dtype=dtype, device=self.ends.device)
        mask[..., before:].masked_fill_(hidden[:, None], torch.finfo(dtype).min)
        return mask


@torch.inference_mode()
def loglikelihoods(model: PreTrainedModel, batch: Batch, beginning: Beginning | None) -> list[list[float]]:
    """For each tree of the batch, in its order, ln p of each of its choices, summed over tokens.

    Args:
        beginning: what comes before the trees of a batch that shares it; None where nothing does.
    """
    layout = _Layout(batch, model.device)
    logits = _logits(model, layout, batch.shares, beginning)  # (N, V)
    normal = torch.cat([part.float().logsumexp(-1) for part in torch.split(logits, READ_AT_ONCE)])
    each = logits[layout.reads, layout.targets].float() - normal[layout.reads]  # (C, L)
    values = iter(each.double().where(layout.there, 0).sum(-1).tolist())
    return [[next(values) for _ in tree.choices] for tree in batch.trees]


@torch.inference_mode()
def can_share(model: PreTrainedModel, question: Encoded, trees: Sequence[Tree]) -> tuple[bool, int]:
    """Whether the model gives the same logits for a question behind a shared beginning, beside another, as alone.

    The last branch is looked at, whose slot is far from its place in the text.

    Args:
        question, trees: the question, and two trees of its task of which it is the second.

    Returns:
        Whether it does, and how many tokens went through the model.
    """
    tree = trees[1]
    choice = max(range(len(tree.choices)), key=lambda number: tree.branches.paths[number][-1])
    continuation = question.continuations[choice]
    alone = question.context + continuation[:-1]
    forwarded = len(alone) + sum(map(len, trees))
    if _sees_at_most(model) < len(alone):
        return False, 0
    batch = Batch([[*trees]], shares=True)
    path = torch.tensor(tree.branches.paths[choice], device=model.device) + 1 + len(trees[0].branches.tokens) + 1
    try:
        if tree.start:
            beginning = Beginning(model, alone, tree.start, read=len(continuation))
            expected = beginning.logits
        else:
            beginning = None
            expected = model(input_ids=torch.tensor([alone], device=model.device)).logits[0, -len(continuation) :]
        found = _logits(model, _Layout(batch, model.device), True, beginning)[path]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # someone else's model may refuse what it does not know in any way
        return False, forwarded
    expected, found = expected.double(), found.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    noise = NOISE.get(model.dtype, LOW_PRECISION_NOISE)
    return bool((found - expected).norm() <= noise * spread), forwarded


def _sees_at_most(model: PreTrainedModel) -> float:
    """Tokens that each of the model's layers looks back over, where its configuration says so."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    return window if window and "sliding_attention" in kinds else float("inf")


def _logits(model: PreTrainedModel, layout: _Layout, shares: bool, beginning: Beginning | None) -> Tensor:
    """(N, V) at the slots that are read."""
    if not shares:
        logits: Tensor = model(input_ids=layout.ids).logits.flatten(0, 1)[layout.slots]
        return logits
    with _reading(model, layout.slots):
        answer = model(
            input_ids=layout.ids,
            position_ids=layout.positions,
            attention_mask=layout.mask(beginning.tokens if beginning else 0, model.dtype),
            past_key_values=beginning.cache if beginning else None,
            use_cache=beginning is not None,
        )
    read: Tensor = answer.logits[0]
    return read


@contextmanager
def _reading(model: PreTrainedModel, slots: Tensor) -> Iterator[None]:
    """Inside, the model's head is given these slots of its R·T alone, and answers with (1, N, V)."""

    def chosen(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].flatten(0, 1)[slots][None], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        yield
    finally:
        hook.remove()
