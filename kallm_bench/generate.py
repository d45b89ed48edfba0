"""A model's reply to one prompt, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from kallm_bench.errors import ModelError
from kallm_bench.models import Source, load_model


class _Teller(TextStreamer):  # type: ignore[misc]  # transformers is not typed
    """Hands on each piece of text as soon as it is whole."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text)


def reply(
    source: Source,
    prompt: str,
    tell: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Tells the reply's text as it is made. The prompt is one user turn; without a chat template it is continued.

    Raises:
        ModelError: the model has no tokenizer; and as load_model does.
    """
    model, tokenizer = load_model(source, dtype, device)
    if tokenizer is None:
        raise ModelError(f"{source.name} has no tokenizer beside it; save one into its folder")
    text = prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(device)
    chosen = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    model.generate(**inputs, streamer=_Teller(tokenizer, tell), max_new_tokens=max_new_tokens, **chosen)
