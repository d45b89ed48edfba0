"""Tokens a second, three ways, and why they differ.

Prefill puts whole prompts through at once: large matrix products, bound by arithmetic. Decoding gives every sequence
one token a step: each weight is read from memory for a handful of products, so it is bound by bandwidth, and on a GPU
often by how fast Python launches kernels. A training step is forward, backward and optimiser; the frozen blocks cost
their forward alone.

Each is run once to warm up, then several times with the device synchronised; the median is reported and every sample
kept. A spread over 3 % is said beside the number.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kallm_bench.errors import DeviceError, unknown
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import WIDE_SPREAD, Metric

WAYS = {
    "ours": "as `kallm train` does it",
    "kept": "the same, with what frozen blocks give kept on disk",
    "plain": "a plain Hugging Face loop",
}
"""How a training step is done."""


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured.

    Args:
        batch, length: sequences at once, and tokens in each, for prefill and training.
        new_tokens: how many decoding adds to each sequence, from 16 on.
        repeats: timed runs of each, after one to warm up.
        scope, tail_from: what learns in the training step; "none" skips it.
        ways: how the step is done, names in WAYS.

    Raises:
        DeviceError: a value that measures nothing.
    """

    batch: int = 4
    length: int = 256
    new_tokens: int = 32
    repeats: int = 5
    scope: str = "tail"
    tail_from: int | None = None
    ways: tuple[str, ...] = ("ours",)

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise DeviceError(unknown("way", way, WAYS))
        for name, least in {"batch": 1, "length": 32, "new_tokens": 1, "repeats": 2}.items():
            if getattr(self, name) < least:
                raise DeviceError(f"{name} must be at least {least}, got {getattr(self, name)}")


def measure_inference(model: PreTrainedModel, settings: ProfileSettings, watch: Watch = nobody) -> list[Metric]:
    """Prefill and decode throughput of a model in the dtype it is served in."""
    ids = _random_tokens(model, settings)
    new = settings.new_tokens
    timing = functools.partial(timed, device=model.device, repeats=settings.repeats, watch=watch)
    with torch.inference_mode():
        prefill = timing("prefill_tokens_per_second", ids.numel(), lambda: _prefill(model, ids))
        decode = timing("decode_tokens_per_second", len(ids) * new, lambda: _decode(model, ids[:, :16], new))
    return [prefill, decode]


def _random_tokens(model: PreTrainedModel, settings: ProfileSettings) -> Tensor:
    """(batch, length) token ids, the same each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (settings.batch, settings.length), generator=generator).to(model.device)


def timed(name: str, tokens: int, work: Callable[[], None], device: torch.device, repeats: int, watch: Watch) -> Metric:
    """Throughput of `work`, which handles `tokens`, over the repeats that follow one to warm up."""
    seconds = []
    for number in range(repeats + 1):
        watch(f"profile of {name.partition('_')[0]}", number, repeats + 1)
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return throughput(name, tokens, seconds[1:])


def throughput(name: str, tokens: int, seconds: list[float]) -> Metric:
    """Tokens a second by the median time; the note tells of a spread (range over median) above 3 %."""
    rates = [tokens / each for each in seconds]
    metric = Metric(name, statistics.median(rates), n=len(rates), samples=rates)
    note = f"spread {metric.spread:.0%}" if metric.spread > WIDE_SPREAD else ""
    return dataclasses.replace(metric, note=note)


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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
