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
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import DeviceError
from kallm_bench.profiling.memory import peak_memory
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import WIDE_SPREAD, Metric
from kallm_bench.training import Forward, apply_scope
from kallm_bench.training.forward import batch_of


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured.

    Args:
        batch, length: sequences at once, and tokens in each, for prefill and training.
        new_tokens: how many decoding adds to each sequence, from 16 on.
        repeats: timed runs of each, after one to warm up.
        scope, tail_from: what learns in the training step; "none" skips it.

    Raises:
        DeviceError: a value that measures nothing.
    """

    batch: int = 4
    length: int = 256
    new_tokens: int = 32
    repeats: int = 5
    scope: str = "tail"
    tail_from: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "length": 32, "new_tokens": 1, "repeats": 2}.items():
            if getattr(self, name) < least:
                raise DeviceError(f"{name} must be at least {least}, got {getattr(self, name)}")


def measure_inference(model: PreTrainedModel, settings: ProfileSettings, watch: Watch = nobody) -> list[Metric]:
    """Prefill and decode throughput of a model in the dtype it is served in."""
    ids = _random_tokens(model, settings)
    new = settings.new_tokens
    timed = functools.partial(_timed, device=model.device, repeats=settings.repeats, watch=watch)
    with torch.inference_mode():
        prefill = timed("prefill_tokens_per_second", ids.numel(), lambda: _prefill(model, ids))
        decode = timed("decode_tokens_per_second", len(ids) * new, lambda: _decode(model, ids[:, :16], new))
    return [prefill, decode]


def measure_training(
    model: PreTrainedModel, settings: ProfileSettings, autocast: torch.dtype | None = None, watch: Watch = nobody
) -> list[Metric]:
    """Training throughput and the peak memory of its steps, with loss at every position.

    Set up as training is: parameters in float32, products in `autocast`. Changes the model's scope, and not its
    weights: the learning rate is zero.
    """
    ids = _random_tokens(model, settings)
    learning = apply_scope(model, settings.scope, settings.tail_from)
    with Forward(model, autocast=autocast) as forward, peak_memory(model.device) as peak:
        step = _training_step(forward, learning, ids)
        speed = _timed("train_tokens_per_second", ids.numel(), step, model.device, settings.repeats, watch)
    return [speed, *peak]


def _random_tokens(model: PreTrainedModel, settings: ProfileSettings) -> Tensor:
    """(batch, length) token ids, the same each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (settings.batch, settings.length), generator=generator).to(model.device)


def _timed(
    name: str, tokens: int, work: Callable[[], None], device: torch.device, repeats: int, watch: Watch
) -> Metric:
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


def _training_step(forward: Forward, learning: list[nn.Parameter], ids: Tensor) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    batch = batch_of(ids.cpu(), positions, ids.roll(-1, dims=1).cpu(), ids.device)

    def step() -> None:
        loss, count = forward.loss_sum(batch)
        torch.autograd.backward(loss / count)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
