"""Commands that run a suite and compare what came out: run, report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from kallm_bench.records import ResultsStore


def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A TOML file, or the name of a shipped suite.")],
    only: Annotated[str, typer.Option(help="Arms to run, with commas; all if left out.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds in place of the suite's: 0,1,2.")] = "",
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
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Run every arm and seed of a suite, skip what is done, and end in its report.

    kallm run quickstart

    kallm run osre25 --model HuggingFaceTB/SmolLM2-135M --data HuggingFaceTB/smol-smoltalk
    """
    from kallm_bench import engine
    from kallm_bench.budget import Room
    from kallm_bench.suites import find_suite, read_suite

    arms = read_names(only, "--only") if only else []
    read = read_suite(find_suite(suite), arms, read_numbers(seeds) if seeds else None, model, data, heldout)
    if dtype != "auto" and any(cell.dtype for cell in read.cells):
        raise typer.BadParameter("this suite says itself what its arms compute in", param_hint="--dtype")
    if dry_run:
        bench = make_bench(results, console.Display(silent=True), device, dtype, batch_size, dry=True)
        console.show_cells(engine.foresee_suite(bench, read), Room.of(bench.device, bench.runs), as_json)
        return
    other = {"--model": model, "--data": data, "--heldout": heldout}
    named = shlex.join([suite, *(word for option, value in other.items() if value for word in (option, value))])
    with console.Display(engine.plan_of(read)) as display:
        bench = make_bench(
            results, display, device, dtype, batch_size, suite_file=named, prefix_cache=prefix_cache,
            trackers=read_trackers(track),
        )  # fmt: skip
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
    tell_damaged(store)
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
