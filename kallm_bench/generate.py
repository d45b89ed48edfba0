"""A model's reply to one prompt, piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from transformers import TextIteratorStreamer

from kallm_bench.models import load_model


def reply(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Yields the reply's text as it is made. The prompt is one user turn; without a chat template it is continued."""
    model, tokenizer = load_model(checkpoint, dtype, device)
    text = prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt").to(device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    chosen = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    work = threading.Thread(
        target=model.generate,
        kwargs={**inputs, "streamer": streamer, "max_new_tokens": max_new_tokens, **chosen},
        daemon=True,
    )
    work.start()
    yield from streamer
    work.join()
