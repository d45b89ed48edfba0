"""The stages that measure what a model costs, or a layer alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from kallm_bench.engine.checkpoints import size_metrics
from kallm_bench.filing import Bench, ModelRef, Stage
from kallm_bench.models import Source, load_config, load_weights, replaced_modules, specs_of
from kallm_bench.models.sources import load_skeleton
from kallm_bench.profiling import (
    KernelProblem,
    ProfileSettings,
    Rig,
    begin_anew,
    check_room,
    flops_per_token,
    give_back,
    measure_inference,
    measure_kernels,
    measure_parts,
    measure_training,
    no_steps,
    only_new_garbage,
    peak_memory,
    ratios,
    too_large,
)
from kallm_bench.records import Metric, RunRecord
from kallm_bench.training import SCOPES, check_scope, parameters_in
from kallm_bench.training.scope import FOR_ANY

LOADS = 3
"""Timed loads, at most; one before them brings the files into the system's memory."""


class Profiled(NamedTuple):
    """A model and what was measured of it."""

    model: PreTrainedModel
    metrics: list[Metric]


def profile(bench: Bench, ref: ModelRef, settings: ProfileSettings, *, again: bool = False) -> RunRecord:
    """Measures what the model costs here. `again` measures anew where a record exists.

    Raises:
        DeviceError: it would not fit the device. TrainingError: a scope that it does not have.
    """
    stage = Stage(bench, "profile", dataclasses.asdict(settings) | bench.place, ref)
    with stage.claimed(again=again) as done:
        if done:
            return done
        (profiled,) = _measure(bench, [ref], settings)
        return stage.finish(profiled.metrics, model=profiled.model)


def profile_side_by_side(bench: Bench, refs: Sequence[ModelRef], settings: ProfileSettings) -> list[RunRecord]:
    """Measures two models in turn; the record of each, the second's with its ratios to the first. Raises as `profile`.

    Both have to fit the device together. A checkpoint beside itself tells how well ratios can be known here.
    """
    stages = [
        Stage(
            bench,
            "profile",
            dataclasses.asdict(settings) | bench.place | {"beside": other.fingerprint, "turn": turn},
            ref,
        )
        for turn, (ref, other) in enumerate(zip(refs, reversed(refs), strict=True))
    ]
    with ExitStack() as stack:
        for stage in stages:
            stack.enter_context(stage.claimed(again=True))
        first, second = _measure(bench, refs, settings)
        second.metrics.extend(ratios(first.metrics, second.metrics))
        both = zip(stages, (first, second), strict=True)
        return [stage.finish(each.metrics, model=each.model) for stage, each in both]


def scopes_of(refs: Sequence[ModelRef]) -> tuple[list[str], int | None]:
    """The scopes that all of these models have, the usual one first, and where the tail begins if not all say so.

    Beside a model with replaced blocks, the tail of an untouched one begins where that one's does.
    """
    replaced = [specs_of(load_config(ref.open())) for ref in refs]
    if not any(replaced):
        return list(FOR_ANY), None
    scopes = ["tail", *(scope for scope in SCOPES if scope != "tail" and (scope != "replaced" or all(replaced)))]
    if len(refs) == 1:
        return scopes, None
    return scopes, min(int(block) for specs in replaced for spec in specs for block in spec.blocks)


def _measure(bench: Bench, refs: Sequence[ModelRef], settings: ProfileSettings) -> list[Profiled]:
    """Everything there is to measure of models, in turn."""
    begin_anew(bench.device)
    with only_new_garbage():
        return _measured(bench, refs, settings)


def _measured(bench: Bench, refs: Sequence[ModelRef], settings: ProfileSettings) -> list[Profiled]:
    sources = [ref.open() for ref in refs]
    _check(refs, sources, bench, settings)
    rig = Rig.at(bench.device, settings.repeats, bench.watch)
    models, loading = _load(sources, bench.dtype, rig)
    found = [[*_sizes(model, settings), *metrics] for model, metrics in zip(models, loading, strict=True)]
    _extend(found, measure_inference(models, settings, rig))
    _extend(found, measure_parts(models, settings, rig))
    if settings.steps:
        _extend(found, _measure_steps(models, bench, settings, rig))
    if len(models) > 1 and bench.device.type == "cpu":
        found = [[_unless_of_all(metric) for metric in metrics] for metrics in found]
    return [Profiled(model, metrics) for model, metrics in zip(models, found, strict=True)]


def _check(refs: Sequence[ModelRef], sources: Sequence[Source], bench: Bench, settings: ProfileSettings) -> None:
    """Refuses what cannot be before anything is loaded; of models with code of their own less is known by then."""
    skeletons = [load_skeleton(source, bench.dtype) for source in sources if not source.trust_remote_code]
    for scope in settings.all_scopes:
        for source in sources:
            replaced = bool(specs_of(load_config(source)))
            check_scope(scope, replaced=replaced, tail_from=settings.tail_from)
        for skeleton in skeletons:
            parameters_in(skeleton, scope, settings.tail_from)
    if len(skeletons) == len(sources):
        check_room([ref.label for ref in refs], skeletons, settings, bench.device)


def _measure_steps(
    models: Sequence[PreTrainedModel], bench: Bench, settings: ProfileSettings, rig: Rig
) -> list[list[Metric]]:
    """Training steps of models whose parameters become float32; what they cost does not depend on their values."""
    if bench.autocast:
        needed = sum(4 * parameter.numel() for model in models for parameter in model.parameters())
        for model in models:
            model.to("cpu")
        if reason := too_large(needed, bench.device):
            return [no_steps(settings, reason) for _ in models]
        for model in models:
            model.to(bench.device, torch.float32)
    return measure_training(models, settings, rig, bench.autocast)


def _sizes(model: PreTrainedModel, settings: ProfileSettings) -> list[Metric]:
    metrics = [*size_metrics(model), Metric("flops_per_token", flops_per_token(model))]
    replaced = bool(replaced_modules(model))
    for scope in SCOPES:
        if replaced or scope in FOR_ANY or (scope != "replaced" and settings.tail_from is not None):
            count = sum(parameter.numel() for parameter in parameters_in(model, scope, settings.tail_from))
            metrics.append(Metric(f"trainable_parameters/{scope}", count))
    return metrics


def _load(sources: Sequence[Source], dtype: torch.dtype, rig: Rig) -> tuple[list[PreTrainedModel], list[list[Metric]]]:
    """The models, all on the device; how long each takes from the disk to there, others having been there before.

    The last of the timed loads is the one that is kept, with its peak memory, while the other models are elsewhere.
    """
    timing = dataclasses.replace(rig, gpu=None, repeats=min(LOADS, rig.repeats) - 1)

    models: list[PreTrainedModel] = []

    def load(source: Source, into: list[PreTrainedModel]) -> float:
        return rig.clocked(lambda: into.append(load_weights(source, dtype, rig.device)))

    def load_in_vain(source: Source) -> float:
        seconds = load(source, [])
        give_back(rig.device)
        return seconds

    works = [functools.partial(load_in_vain, source) for source in sources]
    found = []
    for source, timed in zip(sources, timing.measure("loading", works, warm_runs=1, runs=1), strict=True):
        for earlier in models:
            earlier.to("cpu")
        with peak_memory(rig.device, rig.gpu, "/load") as peak:
            seconds = (*timed.seconds, load(source, models))
        found.append([dataclasses.replace(timed, seconds=seconds).metric("load_seconds"), *peak])
    for model in models:
        model.to(rig.device)
    return models, found


def _extend(found: Sequence[list[Metric]], more: Sequence[Sequence[Metric]]) -> None:
    for mine, metrics in zip(found, more, strict=True):
        mine.extend(metrics)


def _unless_of_all(metric: Metric) -> Metric:
    """A metric that is not the peak of a process with several models, which would be the peak of neither."""
    if not metric.name.startswith("peak_resident_bytes"):
        return metric
    return Metric(metric.name, None, n=0, note="two models are in this process; profile each by itself")


def profile_kernels(bench: Bench, problem: KernelProblem, *, again: bool = False) -> RunRecord:
    """Measures a layer by itself beside its contenders. `again` measures anew where a record exists."""
    bench = dataclasses.replace(bench, arm=problem.arm)
    stage = Stage(bench, "kernels", problem.settings() | bench.place)
    with stage.claimed(again=again) as done:
        return done or stage.finish(measure_kernels(problem, bench.device, bench.dtype, bench.watch))
