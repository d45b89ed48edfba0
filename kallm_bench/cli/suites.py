"""The command that runs a suite: run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench, tell_damaged
from kallm_bench.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    PrefixCache,
    Results,
    Track,
    read_names,
    read_numbers,
    read_trackers,
)


def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A TOML file, or the name of a shipped suite.")],
    only: Annotated[str, typer.Option(help="Arms to run, with commas; all if left out.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds in place of the suite's: 0,1,2.")] = "",
    stages: Annotated[
        str, typer.Option(help="Stages to run of retrofit,train,eval-bbh,profile; the suite's if left out.")
    ] = "",
    model: Annotated[str | None, typer.Option(help="Model in place of the suite's: hub id, folder or .gguf.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data in place of the suite's: hub id or file.")] = None,
    heldout: Annotated[
        str | None, typer.Option(help="Held-out data beside --data; a part of that if left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, with what they will take, and stop.")
    ] = False,
    track: Track = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    prefix_cache: PrefixCache = False,
    keep_weights: Annotated[
        bool,
        typer.Option(
            help="Leave checkpoints in runs/; without it they go once used, but for those that other arms go on from."
        ),
    ] = True,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Run every arm and seed of a suite, skip what is done, and end in its report.

    kallm run quickstart

    kallm run osre25 --model HuggingFaceTB/SmolLM2-135M --data HuggingFaceTB/smol-smoltalk
    """
    from kallm_bench import engine
    from kallm_bench.budget import Room
    from kallm_bench.profiling import find_device
    from kallm_bench.suite_files import find_suite
    from kallm_bench.suites import read_suite

    arms = read_names(only, "--only") if only else []
    named_stages = read_names(stages, "--stages") if stages else []
    read = read_suite(
        find_suite(suite), arms, read_numbers(seeds) if seeds else None, model, data, heldout, named_stages,
        find_device(device).type,
    )  # fmt: skip
    if dtype != "auto" and any(cell.dtype for cell in read.cells):
        raise typer.BadParameter("this suite says itself what its arms compute in", param_hint="--dtype")
    if dry_run:
        bench = make_bench(
            results, console.Display(silent=True), device, dtype, batch_size, prefix_cache=prefix_cache, dry=True
        )
        room = Room.of(bench.device, bench.runs)
        cells = engine.foresee_suite(bench, read)
        console.show_cells(cells, room, as_json, keep_weights)
        if any(cell.trouble for cell in cells):
            raise typer.Exit(1)
        return
    other = {"--model": model, "--data": data, "--heldout": heldout}
    named = shlex.join([suite, *(word for option, value in other.items() if value for word in (option, value))])
    with console.Display() as display:
        bench = make_bench(
            results, display, device, dtype, batch_size, suite_file=named, prefix_cache=prefix_cache,
            keep_weights=keep_weights, trackers=read_trackers(track),
        )  # fmt: skip
        display.expect(engine.plan_of(bench, read))
        records, failures = engine.run_suite(bench, read, begin=display.begin)
    report = engine.write_report(bench.store, read, bench.testbed, records)
    tell_damaged(bench.store)
    if as_json:
        console.show_json({"failures": failures, "report": str(report.folder)})
    else:
        console.show_tables(report.tables)
        console.say(f"Written: {report.folder}/report.md, report.csv")
    for arm, reason in failures.items():
        console.fail(f"{arm}: {reason}")
    if failures:
        raise typer.Exit(1)
