"""Greedy answers by transformers' own `generate`, a batch at a time: for any model that it knows, and as the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kallm_bench.bbh.stops import Ending


@torch.inference_mode()
def replies(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]], endings: Sequence[Ending]
) -> list[tuple[list[int], str]]:
    """The tokens of each greedy reply up to its ending, and why it ended. The model's generation settings have no say.

    Args:
        prompts: token ids of each; padded on the left to the longest.
    """
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with _plainly_greedy(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(ending.most for ending in endings),
            do_sample=False,
            pad_token_id=padding,
            stopping_criteria=StoppingCriteriaList([_Endings(tokenizer, endings, longest)]),
        )
    found = []
    for tokens, ending in zip(output[:, longest:].tolist(), endings, strict=True):
        count, why = ending.find(tokenizer, tokens, 0) or (len(tokens), "length")
        found.append((tokens[:count], why))
    return found


class _Endings(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    """Which rows have ended."""

    def __init__(self, tokenizer: Any, endings: Sequence[Ending], start: int) -> None:
        self.tokenizer, self.endings, self.start = tokenizer, endings, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: Any) -> Tensor:
        rows = input_ids[:, self.start :].tolist()
        ended = [
            ending.find(self.tokenizer, row, len(row) - 1) is not None
            for row, ending in zip(rows, self.endings, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def _plainly_greedy(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no generation settings but its ends: no repetition penalty or minimum length."""
    shipped = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = shipped
