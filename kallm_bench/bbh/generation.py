"""Greedy answers, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int
) -> tuple[list[str], int]:
    """Greedy continuations of a batch of prompts.

    Args:
        prompts: token ids of each; padded on the left to the longest.
        max_new_tokens: where a continuation is cut, if no end-of-turn token comes first.

    Returns:
        The continuations as text without special tokens, and how many tokens went through the model, padding included.
    """
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=padding,
    )
    new = output[:, longest:]
    forwarded = ids.numel() + len(prompts) * max(0, new.shape[1] - 1)  # the last token is never fed back
    return tokenizer.batch_decode(new, skip_special_tokens=True), forwarded
