"""The command line: parse, call one function, show what came back. Heavy imports stay inside the commands."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from kallm_bench import console
from kallm_bench.errors import Interrupted, KallmError, LeftAloneError
from kallm_bench.interrupts import Stop, ignore_signals, stop_on_signals

if TYPE_CHECKING:
    from kallm_bench.filing import Bench
    from kallm_bench.records import ResultsStore
    from kallm_bench.training import Processes

app = typer.Typer(
    help="Puts Kolmogorov-Arnold networks into language models and finds out, honestly, whether they are worth it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `kallm run quickstart`. CKPT is a hub id, a folder, a .gguf file, or 'bundled'.",
)

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Hub id, folder, .gguf file, or 'bundled'.")]
Out = Annotated[Path | None, typer.Option(help="Checkpoint folder to write; named below runs/ if left out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random start, or of the order of the data.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU, else float32.")]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache",
        help="Keep on disk what frozen blocks give, for other arms and seeds on the same data: about 1 KB a token.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences at once; chosen by device if left out.")]
Track = Annotated[
    str, typer.Option(help="Trackers that training is logged to, with commas: tensorboard, wandb, trackio, mlflow.")
]
Results = Annotated[Path, typer.Option(help="Folder of records.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that CKPT brings; look at it first.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

MODEL_OPTIONS = ("checkpoint", "batch", "length", "scope", "trust_remote_code")
KERNEL_OPTIONS = ("suite", "shape", "basis", "tokens", "tune")
"""What `kallm profile` takes only without --kernels, and only with it."""


@app.callback(invoke_without_command=True)
def kallm(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        console.say(installed("kallm-bench"))
        raise typer.Exit


@app.command()
def retrofit(
    checkpoint: Checkpoint = "bundled",
    blocks: Annotated[
        str | None,
        typer.Option(help="Which: 25-29, 0,3,5-7, last:5, all. If left out last:5, or with --revert all."),
    ] = None,
    basis: Annotated[
        str, typer.Option(help="Basis (`kallm bases` lists them), or linear (fresh feed-forward), or drop (none).")
    ] = "cheby2",
    target: Annotated[
        str, typer.Option(help="feedforward: as a whole; linears: each layer inside it; attention: each of its layers.")
    ] = "feedforward",
    degree: Annotated[int | None, typer.Option(help="Highest polynomial degree, where the basis has one.")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Inner width; a quarter of the original's for KANs, the original's for linear.")
    ] = None,
    form: Annotated[
        str, typer.Option(help="stack: two KAN layers; single: one; gated: two multiplied; glu: SwiGLU, learned gate.")
    ] = "stack",
    constant: Annotated[
        str, typer.Option(help="Where the constant function goes: one bias, or on every edge as published.")
    ] = "bias",
    linear: Annotated[bool, typer.Option("--linear", help="Give KAN layers a path past the basis.")] = False,
    groups: Annotated[int | None, typer.Option(help="Learned functions in form glu; 8 if left out.")] = None,
    up: Annotated[bool, typer.Option("--up", help="In form glu, learned functions on the up path too.")] = False,
    params: Annotated[
        str | None, typer.Option(help="Choose --hidden for so many parameters in all: a number, or original.")
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            help="random; lstsq, distill or inherit (from what is replaced; joined by +, such as inherit+distill; "
            "sequence may end it); convert (what the blocks' KANs do, in the new basis). auto: convert, or random."
        ),
    ] = "auto",
    start_steps: Annotated[int, typer.Option(min=1, help="Of distillation.")] = 400,
    calibration: Annotated[
        str, typer.Option(help="Text that a start is calibrated on: as --data of `kallm train`.")
    ] = "bundled",
    calibration_tokens: Annotated[int, typer.Option(min=1024, help="How much of it.")] = 20_480,
    calibration_row: Annotated[int, typer.Option(min=16, help="Tokens in a row of it.")] = 512,
    activation: Annotated[
        str, typer.Option(help="With --target linears: keep the feed-forward's own activation, or drop it.")
    ] = "keep",
    experts: Annotated[bool, typer.Option("--experts", help="Replace mixtures of experts too, as a whole.")] = False,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would come to.")] = False,
    reverting: Annotated[bool, typer.Option("--revert", help="Put the model's own modules back instead.")] = False,
    base: Annotated[
        str | None, typer.Option(help="With --revert: where they come from; what CKPT was made of, if left out.")
    ] = None,
    out: Out = None,
    force: Force = False,
    device: Device = "auto",
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Replace the feed-forward parts of some blocks by KAN layers, and save the checkpoint.

    kallm retrofit --blocks 25-29 --basis cheby2
    kallm retrofit --form glu --basis rational --hidden 512 --start inherit
    kallm retrofit --target linears --start inherit --dry-run
    kallm retrofit runs/CKPT --revert --blocks 25,26
    """
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.models import CalibrationSettings, KANSpec

    if reverting:
        if dry_run:
            raise typer.BadParameter("--revert has no --dry-run: it only puts modules back")
        with console.Display() as display:
            bench = _bench(results, display, device, "float32", None, seed)
            ref, source = find_ref(checkpoint, trust_remote_code), find_ref(base) if base else None
            record = engine.revert(bench, ref, blocks or "all", source, out, replace=force)
        console.show_records([record], as_json, bench.store.written)
        return
    if base is not None:
        raise typer.BadParameter("--base is for --revert")
    size = int(params) if params and params.isdecimal() else params
    spec = KANSpec(
        blocks or "last:5", basis, degree, hidden, form, constant, seed, linear=linear, groups=groups, up=up,
        start=start, start_steps=start_steps, params=size, target=target, activation=activation, experts=experts,
    )  # fmt: skip
    if dry_run:
        from kallm_bench.forecast import forecast
        from kallm_bench.models import find_model, load_config

        console.show_forecast(forecast(load_config(find_model(checkpoint, trust_remote_code)), spec), as_json)
        return
    text = None
    if spec.needs_calibration:
        text = CalibrationSettings(calibration, tokens=calibration_tokens, row_length=calibration_row)
    with console.Display() as display:
        bench = _bench(results, display, device, "float32", None, seed)
        record = engine.retrofit(
            bench, find_ref(checkpoint, trust_remote_code), spec, out, calibration=text, replace=force
        )
    console.show_records([record], as_json, bench.store.written)


@app.command()
def cut(
    checkpoint: Checkpoint = "bundled",
    blocks: Annotated[
        int | None, typer.Option(min=1, help="How many to keep, the first ones; all if left out.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Texts whose tokens stay: as --data of `train --task classify`; all if left out."),
    ] = None,
    out: Out = None,
    force: Force = False,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Cut a small model out of a large one, for quick screens: its first blocks, the tokens that a data set needs.

    kallm cut --blocks 3 --data ag_news.jsonl.gz
    """
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.models import CutSettings

    with console.Display() as display:
        bench = _bench(results, display, "cpu", "float32", None)
        ref = find_ref(checkpoint, trust_remote_code)
        record = engine.cut_model(bench, ref, CutSettings(blocks, data), out, replace=force)
    console.show_records([record], as_json, bench.store.written)


@app.command()
def train(
    checkpoint: Checkpoint,
    data: Annotated[
        str,
        typer.Option(help="Hub id, JSONL(.gz) or parquet file, with 'messages' or 'text' and 'label'; or 'bundled'."),
    ] = "bundled",
    heldout: Annotated[
        str | None, typer.Option(help="Held-out data; every 50th conversation, or 10th text, if left out.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to see; 0 only measures the held-out loss.")] = 1_000_000,
    row_length: Annotated[int, typer.Option(help="Tokens in a packed row.")] = 1024,
    rows_per_step: Annotated[int, typer.Option(help="Rows that make one optimiser step.")] = 32,
    scope: Annotated[str, typer.Option(help="What learns: replaced, tail, tail+head, all, lora.")] = "tail",
    task: Annotated[str, typer.Option(help="chat: the assistant's words; classify: each text's class.")] = "chat",
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 4e-4,
    distill: Annotated[
        float, typer.Option(help="Share of the loss that is what the untouched model would say, 0 to 1.")
    ] = 0.0,
    temperature: Annotated[float, typer.Option(help="By which logits are divided for that.")] = 2.0,
    base: Annotated[
        str | None, typer.Option(help="With --distill: the untouched model; what CKPT was made of, if left out.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where a stopped run of this command stands, or anew.")
    ] = True,
    prefix_cache: PrefixCache = False,
    heldout_every: Annotated[
        float, typer.Option(help="Take the held-out loss after so many steps too; below 1, a share of all steps.")
    ] = 0.0,
    track: Track = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few steps, in memory alone, and say what training would come to.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split the weights over the processes (FSDP): for models that do not fit.")
    ] = False,
    out: Out = None,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train what was replaced, or more, on conversations; stopped with Ctrl-C, the same command goes on.

    kallm train runs/bundled-cheby2-25-29-... --tokens 1000000
    kallm train CKPT --distill 0.5
    kallm train runs/... --task classify --data train.jsonl.gz --heldout test.jsonl.gz --row-length 256
    torchrun --nproc-per-node 2 -m kallm_bench.cli train CKPT --tokens 1000000
    """
    from kallm_bench import engine
    from kallm_bench.budget import Room
    from kallm_bench.errors import TrainingError
    from kallm_bench.filing import find_ref
    from kallm_bench.profiling import find_device
    from kallm_bench.training import DistillationSettings, TrainSettings, join

    if base is not None and not distill:
        raise typer.BadParameter("--base is for --distill")
    with join(find_device(device)) as processes:
        if shard and processes.count == 1:
            raise TrainingError("--shard splits weights over several processes; start them by torchrun, as --help says")
        with console.Display(silent=not processes.first) as display:
            with processes.in_turn():
                settings = TrainSettings(
                    data=data,
                    heldout=heldout,
                    tokens=tokens,
                    row_length=row_length,
                    rows_per_step=rows_per_step,
                    scope=scope,
                    task=task,
                    learning_rate=learning_rate,
                    heldout_every=heldout_every,
                    seed=seed,
                )
                bench = _bench(
                    results, display, device, dtype, batch_size, seed, processes=processes, sharded=shard,
                    prefix_cache=prefix_cache, trackers=_trackers(track), dry=dry_run,
                )  # fmt: skip
                ref = find_ref(checkpoint, trust_remote_code)
                lessons = engine.Lessons(
                    distillation=DistillationSettings(distill, temperature),
                    base=find_ref(base, trust_remote_code) if base else None,
                )
            if dry_run:
                coming = engine.try_training(bench, ref, settings)
            else:
                record = engine.train_model(bench, ref, settings, out, lessons=lessons, replace=force, resume=resume)
        if dry_run:
            console.show_training(coming, Room.of(bench.device, out or bench.runs), as_json)
        elif processes.first:
            console.show_records([record], as_json, bench.store.written)


@app.command(name="eval-bbh")
def eval_bbh(
    checkpoint: Checkpoint = "bundled",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="chat (if left out), or lm-eval's leaderboard, zeroshot, fewshot, cot-fewshot, cot-zeroshot."
        ),
    ] = None,
    reading: Annotated[
        str | None,
        typer.Option(help="Of lm-eval's: lm-eval, as it is, or fixed, without its faults in reading replies."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="BIG-Bench-Hard folder, hub id, or 'procedural'; KALLM_BBH_DIR, then the hub, if left out."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task names, with commas; all if left out.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each task.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Where an answer is cut.")] = None,
    prompts_only: Annotated[
        bool,
        typer.Option("--prompts-only", help="Write what would be asked to --out; of all lm-eval protocols if none."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --prompts-only: JSON lines to write.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Ask a model BIG-Bench Hard, or fresh questions like it, and score the answers beside guessing.

    kallm eval-bbh runs/... --source path/to/BIG-Bench-Hard --limit 20
    kallm eval-bbh --prompts-only --out prompts.jsonl
    """
    if prompts_only != (out is not None):
        raise typer.BadParameter("--prompts-only and --out FILE go together")
    from kallm_bench import engine
    from kallm_bench.bbh.evaluate import EvalSettings
    from kallm_bench.bbh.protocols import LM_EVAL_PROTOCOLS
    from kallm_bench.filing import find_ref

    chosen = tuple(_names(tasks, "--tasks")) if tasks else ()
    settings = EvalSettings(protocol or "chat", source, chosen, limit, max_new_tokens, reading=reading)
    if out is not None:
        asked = [protocol] if protocol else LM_EVAL_PROTOCOLS
        counts = engine.write_prompts(lambda: find_ref(checkpoint, trust_remote_code), settings, asked, out)
        if as_json:
            console.show_json({"out": str(out), "prompts": counts})
        else:
            console.say(f"{sum(counts.values()):,} prompts in {out}")
        return
    with console.Display() as display:
        bench = _bench(results, display, device, dtype, batch_size)
        record = engine.eval_bbh(bench, find_ref(checkpoint, trust_remote_code), settings)
    console.show_records([record], as_json, bench.store.written)


@app.command()
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
        bench = _bench(results, display, device, dtype, None)
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
        bench = _bench(results, display, device, dtype, None, suite_file=asked.suite_file)
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


@app.command()
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A TOML file, or the name of a shipped suite.")],
    only: Annotated[str, typer.Option(help="Arms to run, with commas; all if left out.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds in place of the suite's: 0,1,2.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, with what they will take, and stop.")
    ] = False,
    track: Track = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    prefix_cache: PrefixCache = False,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Run every arm and seed of a suite, skip what is done, and end in its report.

    kallm run quickstart
    """
    from kallm_bench import engine
    from kallm_bench.budget import Room
    from kallm_bench.suites import find_suite, read_suite

    arms = _names(only, "--only") if only else []
    read = read_suite(find_suite(suite), arms, _numbers(seeds) if seeds else None)
    if dry_run:
        bench = _bench(results, console.Display(silent=True), device, dtype, batch_size, dry=True)
        console.show_cells(engine.foresee_suite(bench, read), Room.of(bench.device, bench.runs), as_json)
        return
    with console.Display(engine.plan_of(read)) as display:
        bench = _bench(
            results, display, device, dtype, batch_size, suite_file=suite, prefix_cache=prefix_cache,
            trackers=_trackers(track),
        )  # fmt: skip
        records, failures = engine.run_suite(bench, read, begin=display.begin)
    report = engine.write_report(bench.store, read, bench.testbed, records)
    _tell_damaged(bench.store)
    if as_json:
        console.show_json({"failures": failures, "report": str(report.folder)})
    else:
        console.show_tables(report.tables)
        console.say(f"Written: {report.folder}/report.md, report.csv")
    for arm, reason in failures.items():
        console.fail(f"{arm}: {reason}")
    if failures:
        raise typer.Exit(1)


@app.command(name="report")
def show_report(
    suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None,
    testbed: Annotated[str | None, typer.Option(help="Only this machine.")] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help="screen, md, csv, json; by the ending of --out if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
    results: Results = Path("results"),
) -> None:
    """Compare arms in tables: means over seeds, intervals, guessing, and what is missing.

    kallm report --suite quickstart --format md
    """
    from kallm_bench.errors import RecordError, unknown
    from kallm_bench.files import write_file
    from kallm_bench.records import ResultsStore
    from kallm_bench.reporting import build_tables, to_csv, to_json, to_markdown

    formats = {"md": to_markdown, "csv": to_csv, "json": to_json}
    if fmt is None:
        fmt = (
            out.suffix.removeprefix(".")
            if out and out.suffix.removeprefix(".") in formats
            else "md"
            if out
            else "screen"
        )
    if fmt != "screen" and fmt not in formats:
        raise RecordError(unknown("format", fmt, ("screen", *formats)))
    if fmt == "screen" and out:
        raise typer.BadParameter(
            "the screen's tables cannot go into a file; take --format md, csv or json", param_hint="--out"
        )
    store = ResultsStore(results)
    tables = build_tables(store, suite, testbed)
    _tell_damaged(store)
    if not tables:
        raise RecordError(_nothing_to_report(store, suite, testbed))
    if fmt == "screen":
        console.show_tables(tables)
        return
    text = formats[fmt](tables)
    if out is None:
        console.stream(text)
    else:
        write_file(out, text.encode())
        console.say(f"Written: {out}")


@app.command()
def inspect(
    checkpoint: Checkpoint,
    top: Annotated[int, typer.Option(min=1, max=50, help="Most curved functions of each layer to draw.")] = 3,
    fmt: Annotated[str, typer.Option("--format", help="Of the drawing: png, svg.")] = "png",
    out: Annotated[
        Path | None, typer.Option(help="Folder for curves.csv and the drawing; below runs/ if left out.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Look at what a KAN learned: energy by basis function, curved and linear edges, the functions themselves.

    kallm inspect runs/... --top 5
    """
    import csv
    import dataclasses
    import io

    from kallm_bench.errors import SpecError, unknown
    from kallm_bench.files import write_file
    from kallm_bench.filing import find_ref
    from kallm_bench.models import load_model
    from kallm_bench.models.inspect import curves_as_rows, inspect_model
    from kallm_bench.plots import FORMATS, draw_curves

    if fmt not in FORMATS:
        raise SpecError(unknown("format", fmt, FORMATS))
    ref = find_ref(checkpoint, trust_remote_code)
    facts, curves = inspect_model(load_model(ref.open())[0], top)
    folder = out or Path("runs") / f"{ref.label}-inspect"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(curves_as_rows(curves))
    write_file(folder / "curves.csv", text.getvalue().encode())
    write_file(folder / f"curves.{fmt}", draw_curves(curves, fmt))
    if as_json:
        console.show_json([dataclasses.asdict(each) for each in facts])
        return
    console.show_rows(
        ("block", "layer", "energy by function", "edges", "linear within 1 %", "median curvature"),
        [
            (
                str(each.block),
                each.layer,
                " ".join(f"{100 * share:.0f}%" for share in each.energy),
                f"{each.edges:,}",
                f"{each.linear_edges:,}",
                f"{each.curvature:.3f}",
            )
            for each in facts
        ],
    )
    console.say(f"Written: {folder}/curves.csv, curves.{fmt}")


@app.command()
def bases(as_json: Json = False) -> None:
    """List the bases: arguments, domain, what one 576 -> 384 layer costs, and their first functions, drawn."""
    from kallm_bench.kan.catalogue import catalogue

    rows = catalogue()
    if as_json:
        console.show_json([entry._asdict() for entry in rows])
    else:
        console.show_rows(
            ("basis", "arguments", "squash, domain", "functions", "parameters", "MFLOP", "drawn"),
            [
                (
                    e.name,
                    e.arguments,
                    f"{e.squash}, {e.domain}",
                    str(e.functions),
                    f"{e.parameters:,}",
                    f"{e.flops / 1e6:.2f}",
                    e.drawing,
                )
                for e in rows
            ],
        )


@app.command()
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the reply is cut.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Let a model reply, as it goes.

    kallm generate bundled "What is a spline?"
    """
    from kallm_bench.generate import reply
    from kallm_bench.models import find_model
    from kallm_bench.profiling import find_device, find_dtype

    where = find_device(device)
    reply(
        find_model(checkpoint, trust_remote_code),
        prompt,
        console.stream,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=where,
        dtype=find_dtype(dtype, where),
    )
    console.stream("\n")


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(help="model or bbh.")],
    name: Annotated[str, typer.Argument(help="Hub id of the model; folder for bbh.")] = "",
) -> None:
    """Fetch a model or BIG-Bench Hard, so that everything later works without a network.

    kallm fetch model HuggingFaceTB/SmolLM2-135M-Instruct, kallm fetch bbh BIG-Bench-Hard
    """
    from kallm_bench.errors import ModelError, unknown

    if what == "model":
        from kallm_bench.models import find_model

        console.say(f"Model at {find_model(name or 'bundled').folder}")
    elif what == "bbh":
        from kallm_bench.fetch import fetch_bbh

        with console.Display() as display:
            folder = fetch_bbh(Path(name or "BIG-Bench-Hard"), watch=display)
        console.say(f"BIG-Bench Hard at {folder}. Use it: export KALLM_BBH_DIR={folder.absolute()}")
    else:
        raise ModelError(unknown("thing to fetch", what, ("model", "bbh")))


@app.command(name="testbed")
def name_testbed(
    name: Annotated[str | None, typer.Argument(help="New name for this machine.")] = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Show this machine as records know it, or name it."""
    from kallm_bench.profiling import identity
    from kallm_bench.records import ResultsStore

    store = ResultsStore(results)
    called = store.name_testbed(identity(), name) if name else store.testbed(identity())
    if as_json:
        console.show_json({"name": called, **identity()})
    else:
        console.show_pairs(called, [(key, str(value)) for key, value in identity().items()])


@app.command()
def doctor(results: Results = Path("results"), as_json: Json = False) -> None:
    """Tell what is installed and at hand: devices, model, data, disk."""
    from kallm_bench.doctor import examine

    findings = examine(results)
    if as_json:
        console.show_json(dict(findings))
    else:
        console.show_pairs("kallm doctor", findings)


def _bench(
    results: Path,
    display: console.Display,
    device: str,
    dtype: str,
    batch_size: int | None,
    seed: int = 0,
    suite_file: str = "",
    processes: Processes | None = None,
    sharded: bool = False,
    prefix_cache: bool = False,
    trackers: tuple[str, ...] = (),
    dry: bool = False,
) -> Bench:
    """The bench of a command; refuses an unwritable results folder before any work is done. `dry` makes no folder."""
    from kallm_bench.errors import DeviceError
    from kallm_bench.filing import Bench
    from kallm_bench.profiling import find_device, find_dtype, identity
    from kallm_bench.records import ResultsStore
    from kallm_bench.training import ALONE, asked_for

    if processes is None and asked_for() > 1:
        raise DeviceError(f"{asked_for()} processes were started for this; only `kallm train` runs on several")
    processes = processes or ALONE
    where = processes.device or find_device(device)
    computes_in = find_dtype(dtype, where)
    store = ResultsStore(results)
    return Bench(
        store,
        store.known_testbed(identity()) if dry else store.testbed(identity()),
        Path("runs"),
        where,
        computes_in,
        seed=seed,
        suite_file=suite_file,
        batch_size=batch_size,
        processes=processes,
        sharded=sharded,
        prefix_cache=prefix_cache,
        trackers=trackers,
        watch=display,
    )


def _tell_damaged(store: ResultsStore) -> None:
    for path, reason in dict(store.damaged).items():
        console.tell(f"set aside: {path}: {reason}")


def _trackers(text: str) -> tuple[str, ...]:
    from kallm_bench.training import check_trackers

    names = tuple(_names(text, "--track")) if text else ()
    check_trackers(names)
    return names


def _names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"'{text}' names nothing; leave it out for all", param_hint=option)
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers; write 0,1,2", param_hint="--seeds") from None


def _nothing_to_report(store: ResultsStore, suite: str | None, testbed: str | None) -> str:
    from kallm_bench.errors import unknown

    records = store.records()
    if not records:
        return f"no records in {store.folder}. Make some: kallm run quickstart"
    for what, wanted, known in (
        ("suite", suite, {record.suite for record in records}),
        ("testbed", testbed, {record.testbed for record in records}),
    ):
        if wanted and wanted not in known:
            return unknown(f"records of {what}", wanted, known)
    if suite is None and testbed is None:
        return f"the records in {store.folder} are of checkpoints made, and none of what they can. Try: kallm profile"
    return f"nothing to compare in the records of suite '{suite or 'any'}' on testbed '{testbed or 'any'}'"


def main() -> NoReturn:
    """The console script: 0 fine, 1 the user's input or environment, 2 usage, 128 + signal when stopped."""
    stop_on_signals()
    console.prepare()
    try:
        Path.cwd()
        code = app(standalone_mode=False)
    except Interrupted as stopped:
        _leave(f"Stopped: {stopped}. The same command goes on from there.", stopped.exit_code)
    except Stop as stop:
        _leave("Stopped. What was finished is kept; the same command goes on from there.", 128 + stop.number)
    except KallmError as error:
        if not _follows():
            console.fail(str(error))
        elif not isinstance(error, LeftAloneError):  # whoever left has said why
            console.fail(f"process {os.environ['RANK']}: {error}")
        sys.exit(1)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except Exception as error:  # looked at for what can be said in one line; all else keeps its traceback
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # usage, as click tells it
            error.show()
            sys.exit(error.exit_code)
        if reason := _environment(error):
            console.fail(reason)
            sys.exit(1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _leave(message: str, code: int) -> NoReturn:
    ignore_signals()  # an impatient second one would only add a traceback
    if not _follows():
        console.tell(message)
    sys.exit(code)


def _follows() -> bool:
    """Whether this is one of several processes, and not the first, which speaks for all."""
    return int(os.environ.get("RANK") or 0) > 0


def _environment(error: Exception) -> str:
    """One line for what no code of ours can foresee or mend: no memory left, no current folder. Else empty."""
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "t allocate memory" in str(error)
    ):
        return "out of memory. A smaller --batch-size, --hidden, --length or --row-length needs less"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "the current folder does not exist any more; go to another one"
    return ""


if __name__ == "__main__":
    main()
