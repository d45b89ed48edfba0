"""The command that measures models or layers alone: profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench
from kallm_bench.cli.options import Checkpoint, Device, Dtype, Json, Results, Trust

MODEL_OPTIONS = ("checkpoint", "batch", "length", "scope", "trust_remote_code")
KERNEL_OPTIONS = ("suite", "shape", "basis", "tokens", "tune")
"""What `kallm profile` takes only without --kernels, and only with it."""


def profile(
    context: typer.Context,
    checkpoint: Checkpoint = "bundled",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 4,
    length: Annotated[int, typer.Option(min=32, help="Tokens in each.")] = 256,
    repeats: Annotated[
        int | None, typer.Option(min=2, help="Timed runs of each measurement; 5, or 20 of kernels, if left out.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="What learns in the training step; tail, or all where nothing is replaced.")
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Measure layers alone instead of a model, beside what they compete with.")
    ] = False,
    suite: Annotated[
        str | None, typer.Option(help="Of kernels: a suite's; on a GPU `kernels`, if nothing else is asked for.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of kernels: 576x384, a layer; 1536, a function per channel group.")
    ] = None,
    basis: Annotated[list[str] | None, typer.Option(help="Of kernels: on every --shape; both may be repeated.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of kernels: rows at once; 16384, or 1024 on a CPU, if left out.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Of kernels: find the fastest way at each size, and take it from now on.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a model's parameters, throughput and peak memory on this machine, or the time of KAN layers alone.

    kallm profile runs/..., kallm profile --kernels, kallm profile --kernels --shape 576x384 --basis legendre:degree=3
    """
    _refuse_mixed(context, MODEL_OPTIONS if kernels else KERNEL_OPTIONS)
    if kernels:
        if suite and (shape or basis or tokens):
            raise typer.BadParameter("a suite has its own shapes, bases and tokens", param_hint="--suite")
        asked = (suite, shape or [], basis or [], tokens, repeats)
        if tune:
            _tune_kernels(*asked, device, dtype, as_json)
        else:
            _profile_kernels(*asked, device, dtype, results, as_json)
        return
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.models import load_config, specs_of
    from kallm_bench.profiling import ProfileSettings

    with console.Display() as display:
        bench = make_bench(results, display, device, dtype, None)
        ref = find_ref(checkpoint, trust_remote_code)
        scope = scope or ("tail" if specs_of(load_config(ref.open())) else "all")
        settings = ProfileSettings(batch, length, repeats=repeats or 5, scope=scope)
        record = engine.profile(bench, ref, settings, again=True)
    console.show_records([record], as_json, bench.store.written)


def _profile_kernels(
    suite: str | None,
    shapes: list[str],
    bases: list[str],
    tokens: int | None,
    repeats: int | None,
    device: str,
    dtype: str,
    results: Path,
    as_json: bool,
) -> None:
    from kallm_bench import engine
    from kallm_bench.profiling import find_device
    from kallm_bench.reporting import build_tables
    from kallm_bench.suites import choose_kernels

    asked = choose_kernels(suite, shapes, bases, tokens, repeats, find_device(device).type == "cpu")
    if asked.note:
        console.tell(asked.note)
    with console.Display(engine.plan_of_kernels(asked.problems)) as display:
        bench = make_bench(results, display, device, dtype, None, suite_file=asked.suite_file)
        bench = dataclasses.replace(bench, suite=asked.suite)
        records = []
        for problem in asked.problems:
            display.begin(problem.arm)
            records.append(engine.profile_kernels(bench, problem, again=True))
    if as_json:
        console.show_records(records, as_json, bench.store.written)
        return
    measured = {record.id for record in records}
    console.show_tables(build_tables(bench.store, asked.suite, bench.testbed, lambda record: record.id in measured))


def _tune_kernels(
    suite: str | None,
    shapes: list[str],
    bases: list[str],
    tokens: int | None,
    repeats: int | None,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    from kallm_bench.errors import DeviceError
    from kallm_bench.files import cache_folder, check_writable
    from kallm_bench.profiling import find_device, find_dtype
    from kallm_bench.suites import choose_kernels

    place = find_device(device)
    if place.type != "cuda":
        raise DeviceError("plans are measured on an NVIDIA GPU; this device is the CPU")
    from kallm_bench.profiling.tuning import sizes_of, tune

    check_writable(cache_folder())
    sizes = sizes_of(choose_kernels(suite, shapes, bases, tokens, repeats, place.type == "cpu").problems)
    rows = []
    with console.Display({str(size): 1.0 for size in sizes}) as display:
        for size in sizes:
            display.begin(str(size))
            for operation, seconds in tune(size, place, find_dtype(dtype, place), repeats or 6).items():
                ranked = sorted(seconds, key=lambda plan: seconds[plan])
                shown = ", ".join(f"{plan} {seconds[plan] * 1e6:,.1f}" for plan in ranked)
                rows.append((str(size), operation.replace("_", " "), shown))
    headings = ("size", "operation", "plans, fastest first, in µs")
    if as_json:
        console.show_json([dict(zip(headings, row, strict=True)) for row in rows])
    else:
        console.show_rows(headings, rows)


def _refuse_mixed(context: typer.Context, unfit: Sequence[str]) -> None:
    """Refuses options that say nothing about what is asked for, rather than ignore them."""
    for name in unfit:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            shown = "CKPT" if name == "checkpoint" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{shown} goes {'with' if name in KERNEL_OPTIONS else 'without'} --kernels")
