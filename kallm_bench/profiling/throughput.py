"""Tokens a second, three ways, and why they differ.

Prefill puts whole prompts through at once: large matrix products, bound by arithmetic. Decoding gives every sequence
one token a step: each weight is read from memory for a handful of products, so it is bound by bandwidth, and on a GPU
often by how fast Python launches kernels. A training step is forward, backward and optimiser; the frozen blocks cost
their forward alone.

Each is run once to warm up, then several times with the device synchronised; the median is reported and every sample
kept. A spread over 3 % is said beside the number.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kallm_bench.profiling.memory import peak_memory
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Metric
from kallm_bench.training import apply_scope
from kallm_bench.training.loss import loss_sum

WIDE_SPREAD = 0.03


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured.

    Args:
        batch, length: sequences at once, and tokens in each, for prefill and training; decoding starts from 16 tokens
            and adds half the length.
        repeats: timed runs of each, after one to warm up.
        scope, tail_from: what learns in the training step; "none" skips it.
    """

    batch: int = 4
    length: int = 256
    repeats: int = 5
    scope: str = "tail"
    tail_from: int | None = None


def measure(
    model: PreTrainedModel, settings: ProfileSettings, *, autocast: torch.dtype | None = None, watch: Watch = nobody
) -> list[Metric]:
    """Prefill, decode and training throughput, and the peak memory of the training steps.

    The model's scope is changed, and its weights are not: the learning rate is zero.
    """
    device = model.device
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (settings.batch, settings.length), generator=generator).to(device)
    done = 0

    def timed(name: str, tokens: int, work: Callable[[], None]) -> Metric:
        nonlocal done
        seconds = []
        for number in range(settings.repeats + 1):
            watch("profiling", done, 3 * (settings.repeats + 1), name)
            _synchronise(device)
            start = time.perf_counter()
            work()
            _synchronise(device)
            if number > 0:  # the first warms up
                seconds.append(time.perf_counter() - start)
            done += 1
        return throughput(name, tokens, seconds)

    with torch.inference_mode():
        prefill = timed("prefill_tokens_per_second", ids.numel(), lambda: _prefill(model, ids))
        new = settings.length // 2
        decode = timed("decode_tokens_per_second", settings.batch * new, lambda: _decode(model, ids[:, :16], new))
    metrics = [prefill, decode]
    if settings.scope != "none":
        step = _training_step(model, ids, settings, autocast)
        with peak_memory(device) as peak:
            metrics.append(timed("train_tokens_per_second", ids.numel(), step))
        metrics.extend(peak)
    return metrics


def throughput(name: str, tokens: int, seconds: list[float]) -> Metric:
    """Tokens a second by the median time; the note tells of a spread (range over median) above 3 %."""
    rates = [tokens / each for each in seconds]
    median = statistics.median(rates)
    spread = (max(rates) - min(rates)) / median
    note = f"spread {spread:.0%}" if spread > WIDE_SPREAD else ""
    return Metric(name, median, n=len(rates), samples=rates, note=note)


def _prefill(model: PreTrainedModel, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _decode(model: PreTrainedModel, ids: Tensor, new: int) -> None:
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )


def _training_step(
    model: PreTrainedModel, ids: Tensor, settings: ProfileSettings, autocast: torch.dtype | None
) -> Callable[[], None]:
    learning = apply_scope(model, settings.scope, settings.tail_from)
    optimiser = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    batch = {"input_ids": ids, "position_ids": positions, "targets": ids.roll(-1, dims=1)}
    enabled = autocast is not None

    def step() -> None:
        with torch.autocast(ids.device.type, autocast, enabled=enabled):
            loss, count = loss_sum(model, batch)
        torch.autograd.backward(loss / count)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
