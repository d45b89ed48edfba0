"""The stages that measure what a model costs, or a layer alone."""

from __future__ import annotations

import dataclasses
import time

import torch

from kallm_bench.engine.checkpoints import size_metrics
from kallm_bench.filing import Bench, ModelRef, Stage
from kallm_bench.models import load_model, replaced_modules
from kallm_bench.profiling import (
    KernelProblem,
    ProfileSettings,
    flops_per_token,
    measure_inference,
    measure_kernels,
    measure_training,
)
from kallm_bench.records import Metric, RunRecord
from kallm_bench.training import SCOPES, parameters_in


def profile(bench: Bench, ref: ModelRef, settings: ProfileSettings, *, again: bool = False) -> RunRecord:
    """Measures what the model costs here. `again` measures anew where a record exists."""
    stage = Stage(bench, "profile", dataclasses.asdict(settings) | bench.place, ref)
    with stage.claimed(again=again) as done:
        if done:
            return done
        source = ref.open()
        start = time.perf_counter()
        model, _ = load_model(source, bench.dtype, bench.device)
        loaded = time.perf_counter() - start
        metrics = [
            *size_metrics(model),
            Metric("flops_per_token", flops_per_token(model)),
            Metric("load_seconds", loaded),
        ]
        tail_from = settings.tail_from
        for scope in SCOPES if replaced_modules(model) or tail_from is not None else ["all"]:
            if scope != "replaced" or replaced_modules(model):
                count = sum(parameter.numel() for parameter in parameters_in(model, scope, tail_from))
                metrics.append(Metric(f"trainable_parameters/{scope}", count))
        metrics += measure_inference(model, settings, bench.watch)
        if settings.scope != "none":
            if bench.autocast:
                model, _ = load_model(source, torch.float32, bench.device)
            metrics += measure_training(model, settings, bench.autocast, bench.watch)
        return stage.finish(metrics, model=model)


def profile_kernels(bench: Bench, problem: KernelProblem, *, again: bool = False) -> RunRecord:
    """Measures a layer by itself beside its contenders. `again` measures anew where a record exists."""
    bench = dataclasses.replace(bench, arm=problem.arm)
    stage = Stage(bench, "kernels", problem.settings() | bench.place)
    with stage.claimed(again=again) as done:
        return done or stage.finish(measure_kernels(problem, bench.device, bench.dtype, bench.watch))
