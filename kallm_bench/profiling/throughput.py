"""Tokens a second when a model is served, two ways, and why they differ.

Prefill puts whole prompts through at once: large matrix products, bound by arithmetic. Decoding gives every sequence
one token a step: each weight is read from memory for a handful of products, so it is bound by bandwidth, and on a GPU
often by how fast Python launches kernels. Both are measured at every point of a grid of batch and length, since a small
batch is bound by other things than a large one. Decoding at a length ends there: the last step sees that many tokens.

MFU holds the products that are needed (the head's at one position a sequence) against the data sheet's FLOP/s. The
fraction of the roofline holds the time against the longer of two that it cannot beat: those products at that speed, and
every weight and what the cache holds read once at the data sheet's bytes/s.
"""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from kallm_bench.models import context_length
from kallm_bench.profiling.flops import NO_DATA_SHEET, Limits, cache_bytes, forward_flops, limits_of, weight_bytes
from kallm_bench.profiling.hardware import Reading
from kallm_bench.profiling.memory import peak_memory, suppressed_lack
from kallm_bench.profiling.rig import Measured, Rig
from kallm_bench.profiling.settings import Point, ProfileSettings
from kallm_bench.profiling.turns import alone
from kallm_bench.records import Metric


def measure_inference(models: Sequence[PreTrainedModel], settings: ProfileSettings, rig: Rig) -> list[list[Metric]]:
    """Prefill and decoding of models in the dtype they are served in, in turn; the metrics of each.

    Throughput, latency, energy, MFU and fraction of the roofline at every point; peak memory at the largest.
    """
    found: list[list[Metric]] = [[] for _ in models]
    for point in settings.points:
        with torch.inference_mode():
            measured = _measure_point(models, point, settings, rig)
        for mine, metrics in zip(found, measured, strict=True):
            mine += metrics
    largest = max(settings.points, key=lambda point: (point.batch * point.length, point.batch))
    for number, (mine, model) in enumerate(zip(found, models, strict=True)):
        # what is moved in inference mode can never learn again
        with alone(models, number), torch.inference_mode():
            mine += _peaks(model, largest, settings, rig)
    return found


def _measure_point(
    models: Sequence[PreTrainedModel], point: Point, settings: ProfileSettings, rig: Rig
) -> list[list[Metric]]:
    """Both ways of all models at one point; a length that a model does not take is None, with the reason."""
    part, new = settings.part(point), new_tokens(point, settings)
    if reason := next((why for model in models if (why := too_long(model, point.length))), ""):
        prefills = decodes = [Measured(reason=reason)] * len(models)
    else:
        ids = [random_tokens(model, point) for model in models]
        pairs = list(zip(models, ids, strict=True))
        prefills = rig.measure(f"prefill {point}", [Prefill(rig, model, each) for model, each in pairs])
        decodes = rig.measure(f"decode {point}", [Decode(rig, model, each, new) for model, each in pairs])
    return [
        _metrics(model, point, part, settings, prefill, decode, rig)
        for model, prefill, decode in zip(models, prefills, decodes, strict=True)
    ]


def _metrics(
    model: PreTrainedModel,
    point: Point,
    part: str,
    settings: ProfileSettings,
    prefill: Measured,
    decode: Measured,
    rig: Rig,
) -> list[Metric]:
    batch, length = point
    new, tokens = new_tokens(point, settings), batch * length
    found = [
        prefill.metric(f"prefill_tokens_per_second{part}", lambda seconds: tokens / seconds),
        prefill.metric(f"prefill_seconds{part}"),
        decode.metric(f"decode_tokens_per_second{part}", lambda seconds: batch / seconds),
        decode.metric(f"decode_seconds{part}"),
    ]
    limits = limits_of(rig.device, model.dtype)
    if limits or not part:  # why there is none is said once, not at every point
        cached = cache_bytes(model.config, model.dtype)
        heads = batch if takes_last(model) else tokens
        work = forward_flops(model, tokens, heads), weight_bytes(model) + tokens * cached
        found += fractions("prefill", part, prefill, *work, limits)
        seen = length - new / 2  # on average, over the steps
        work = forward_flops(model, batch, batch), weight_bytes(model) + int(batch * seen * cached)
        found += fractions("decode", part, decode, *work, limits)
    if (rig.gpu and not rig.gpu.missing) or not part:
        found.append(prefill.joules_per_token(f"prefill_joules_per_token{part}", tokens))
        steps = _without_prompt(decode, prefill, (length - new) / length)
        found.append(steps.joules_per_token(f"decode_joules_per_token{part}", batch * (new - 1)))
    return found


def fractions(
    phase: str, part: str, measured: Measured, flops: float, moved: float, limits: Limits | None
) -> list[Metric]:
    """MFU and fraction of the roofline of work that needs so many FLOP and moves so many bytes."""
    names = f"{phase}_mfu{part}", f"{phase}_roofline{part}"
    if limits is None or not measured.seconds:
        reason = measured.reason or NO_DATA_SHEET
        return [Metric(name, None, n=0, note=reason) for name in names]
    least = limits.seconds(flops, moved)
    found = [
        measured.metric(names[0], lambda seconds: flops / (limits.flops * seconds)),
        measured.metric(names[1], lambda seconds: least / seconds),
    ]
    return [dataclasses.replace(metric, samples=()) for metric in found]  # those of the throughput, times a constant


def _without_prompt(decode: Measured, prefill: Measured, share: float) -> Measured:
    """Decoding's energy less that of its prompt, which is the `share` of the prompts that were measured."""
    if decode.joules.value is None or prefill.joules.value is None:
        return decode
    left = decode.joules.value - share * prefill.joules.value
    reading = Reading(left) if left > 0 else Reading(None, "no more than its prompts take")
    return dataclasses.replace(decode, joules=reading)


def _peaks(model: PreTrainedModel, point: Point, settings: ProfileSettings, rig: Rig) -> list[Metric]:
    """Peak memory of a prefill and of decoding, once each; what did not fit has no peak."""
    if too_long(model, point.length):
        return []
    ids = random_tokens(model, point)
    found: list[Metric] = []
    works: dict[str, Prefill | Decode] = {
        "prefill": Prefill(rig, model, ids),
        "decode": Decode(rig, model, ids, new_tokens(point, settings)),
    }
    for number, (phase, work) in enumerate(works.items()):
        rig.watch(f"profile of peak memory at {point}", number, len(works))
        with suppressed_lack(), peak_memory(rig.device, rig.gpu, f"/{phase}") as peaks:
            work()
            if rig.gpu:
                rig.gpu.look()
        found += peaks
    return found


def new_tokens(point: Point, settings: ProfileSettings) -> int:
    """How many tokens decoding adds to each sequence of a point."""
    return min(settings.new_tokens, point.length // 2)


def too_long(model: PreTrainedModel, length: int) -> str:
    """Why a model does not take so many tokens; empty where it does, or does not say."""
    most = context_length(model.config)
    return f"the model takes {most} tokens" if most is not None and most < length else ""


def random_tokens(model: PreTrainedModel, point: Point) -> Tensor:
    """(batch, length) token ids, the same each time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, tuple(point), generator=generator).to(model.device)


def takes_last(model: PreTrainedModel) -> bool:
    """Whether a model can be asked for the logits of the last position alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


class Prefill:
    """One forward pass over whole prompts, up to the logits that choose the next token: what a first token waits for.

    Args:
        ids: (B, T).
    """

    def __init__(self, rig: Rig, model: PreTrainedModel, ids: Tensor) -> None:
        self.rig, self.model, self.ids = rig, model, ids

    def __call__(self) -> float:
        last = {"logits_to_keep": 1} if takes_last(self.model) else {}
        return self.rig.clocked(lambda: self.model(input_ids=self.ids, use_cache=False, **last))


class Decode:
    """Greedy generation of the last `new` of `ids`' length; what counts are the steps that follow the first token.

    Args:
        ids: (B, T).
    """

    def __init__(self, rig: Rig, model: PreTrainedModel, ids: Tensor, new: int) -> None:
        self.rig, self.model, self.new = rig, model, new
        self.prompt = ids[:, : ids.shape[1] - new]

    def __call__(self) -> float:
        clock = _Clock(self.rig)
        self.model.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return (clock.times[-1] - clock.times[0]) / (len(clock.times) - 1)


class _Clock(StoppingCriteria):  # type: ignore[misc]  # of transformers, whose types are not read
    """Notes when each token of a generation is there. Stops none."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        self.rig.synchronise()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
