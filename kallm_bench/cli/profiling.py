"""The command that measures models or layers alone: profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench
from kallm_bench.cli.options import Checkpoint, Device, Dtype, Json, Results, Trust, read_names, read_numbers

MODEL_OPTIONS = ("checkpoint", "other", "batch", "length", "scope", "trust_remote_code")
KERNEL_OPTIONS = ("suite", "shape", "basis", "tokens", "tune")
"""What `kallm profile` takes only without --kernels, and only with it."""

TUNING_SECONDS = 20.0
"""Of one size, until the first one has told."""


def profile(
    context: typer.Context,
    checkpoint: Checkpoint = "bundled",
    other: Annotated[
        str | None, typer.Argument(metavar="CKPT2", help="Measured in turn with CKPT; its ratios to it are given.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Sequences at once, one number or several; 1,16, or 1,4 on a CPU, if left out.")
    ] = None,
    length: Annotated[
        str | None, typer.Option(help="Tokens in each, the same; 128,1024, or 64,256 on a CPU, if left out.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=2, help="Timed runs of each measurement; 5, or 3 on a CPU, or 20 of kernels, if left out."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            help="What learns in the training step, one or several, or none; if left out, all scopes the model has, "
            "or the first of them on a CPU."
        ),
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
    """Measure what a model costs on this machine, or two side by side, or the time of KAN layers alone.

    Parameters, FLOP, load time; throughput, latency, energy and memory of prefill, decoding and training; the time of
    attention, feed-forwards, KANs and head. The largest batch and length are the main ones, on which training is timed.

    kallm profile runs/..., kallm profile bundled runs/... --batch 1,8 --length 512 --scope tail,
    kallm profile --kernels, kallm profile --kernels --shape 576x384 --basis legendre:degree=3
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
    names = [checkpoint] if other is None else [checkpoint, other]
    _profile_models(names, batch, length, repeats, scope, device, dtype, results, as_json, trust_remote_code)


def _profile_models(
    names: Sequence[str],
    batch: str | None,
    length: str | None,
    repeats: int | None,
    scope: str | None,
    device: str,
    dtype: str,
    results: Path,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.profiling import USUAL, ProfileSettings

    with console.Display() as display:
        bench = make_bench(results, display, device, dtype, None)
        usual = USUAL[bench.device.type]
        batches = read_numbers(batch, "--batch") if batch else usual.batches
        lengths = read_numbers(length, "--length") if length else usual.lengths
        refs = [find_ref(name, trust_remote_code) for name in names]
        scopes, tail_from = engine.scopes_of(refs)
        if scope:
            scopes = read_names(scope, "--scope")
        elif not usual.every_scope:
            scopes = scopes[:1]
        settings = ProfileSettings(
            max(batches),
            max(lengths),
            tuple(batches),
            tuple(lengths),
            new_tokens=usual.new_tokens,
            repeats=repeats or usual.repeats,
            scope=scopes[0],
            scopes=tuple(scopes[1:]),
            tail_from=tail_from,
        )
        if other := refs[1:]:
            records = engine.profile_side_by_side(bench, (refs[0], *other), settings)
        else:
            records = [engine.profile(bench, refs[0], settings, again=True)]
    console.show_records(records, as_json, bench.store.written)


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
    from kallm_bench.suites import Suite, choose_kernels

    asked = choose_kernels(suite, shapes, bases, tokens, repeats, find_device(device).type == "cpu")
    if asked.note:
        console.tell(asked.note)
    with console.Display() as display:
        bench = make_bench(results, display, device, dtype, None, suite_file=asked.suite_file)
        display.expect(engine.plan_of(bench, Suite(asked.suite, "", (), (), asked.problems)))
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
    with console.Display() as display:
        display.expect({str(size): TUNING_SECONDS for size in sizes})
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
            arguments = {"checkpoint": "CKPT", "other": "CKPT2"}
            shown = arguments.get(name) or f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"{shown} goes {'with' if name in KERNEL_OPTIONS else 'without'} --kernels")
