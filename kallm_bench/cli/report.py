"""The command that compares what came out: report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import tell_damaged
from kallm_bench.cli.options import Json, Results

if TYPE_CHECKING:
    from kallm_bench.records import ResultsStore
    from kallm_bench.reporting import Table

FORMATS = ("screen", "md", "csv", "json", "html", "svg", "png")


def show_report(
    suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None,
    testbed: Annotated[str | None, typer.Option(help="Only this machine.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Arm to set all others beside; else each KAN beside its linear control.")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Condition, e.g. 'kan.accuracy >= linear.accuracy - 1'; exit code 1 where it fails."),
    ] = None,
    fmt: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; by the ending of --out if left out.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write instead of printing; of svg and png a folder.")
    ] = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Compare arms in tables: means over seeds, intervals, verdicts, guessing, and what is missing.

    kallm report --suite quickstart --format html --out report.html
    """
    from kallm_bench.records.store import collector_paused

    fmt = _format("json" if as_json and fmt is None else fmt, out)
    with collector_paused():  # to the end: a process that is about to go need not tidy up
        if not _report(fmt, suite, testbed, reference, check or (), out, results):
            raise typer.Exit(1)


def _report(
    fmt: str,
    suite: str | None,
    testbed: str | None,
    reference: str | None,
    conditions: Sequence[str],
    out: Path | None,
    results: Path,
) -> bool:
    """Shows or writes the report; whether all conditions hold."""
    from kallm_bench.errors import RecordError
    from kallm_bench.files import cache_folder
    from kallm_bench.records import ResultsStore
    from kallm_bench.reporting import Memory, build_tables
    from kallm_bench.reporting.check import check as ask
    from kallm_bench.suite_files import arm_order

    store, memory = ResultsStore(results), Memory(cache_folder())
    tables = build_tables(store, suite, testbed, reference=reference, memory=memory, order=arm_order)
    memory.keep()
    tell_damaged(store)
    if not tables:
        raise RecordError(_nothing_to_report(store, suite, testbed))
    outcomes = [(text, outcome) for text in conditions for outcome in ask(text, tables)]
    if not (conditions and fmt == "screen"):
        _give(fmt, tables, store, out)
    for text, outcome in outcomes:
        console.tell(f"{'holds' if outcome.holds else 'fails'}: {text}: {outcome.where}: {outcome.values}")
    return all(outcome.holds for _, outcome in outcomes)


def _format(fmt: str | None, out: Path | None) -> str:
    """The format asked for, else that of the ending of `out`, else md into a file and the screen without one."""
    from kallm_bench.errors import RecordError, unknown

    if fmt is None:
        ending = out.suffix.removeprefix(".") if out else ""
        fmt = ending if ending in ("md", "csv", "json", "html") else "md" if out else "screen"
    if fmt not in FORMATS:
        raise RecordError(unknown("format", fmt, FORMATS))
    if fmt == "screen" and out:
        raise typer.BadParameter(
            "the screen's tables cannot go into a file; take --format md, csv, json or html", param_hint="--out"
        )
    if fmt in ("svg", "png") and out is None:
        raise typer.BadParameter(f"{fmt} writes a file for each drawing; name a folder for them", param_hint="--out")
    return fmt


def _give(fmt: str, tables: Sequence[Table], store: ResultsStore, out: Path | None) -> None:
    """Prints or writes the report."""
    from kallm_bench.files import write_file
    from kallm_bench.reporting import to_csv, to_json, to_markdown

    if fmt == "screen":
        console.show_tables(tables)
        console.show_published(tables)
    elif fmt in ("svg", "png"):
        assert out is not None
        _write_drawings(fmt, tables, out)
    else:
        if fmt == "html":
            from kallm_bench.reporting.html import to_html

            text = to_html(tables, store.damaged)
        elif fmt == "json":
            text = to_json(tables, store.damaged)
        else:
            text = {"md": to_markdown, "csv": to_csv}[fmt](tables)
        if out is None:
            console.stream(text)
        else:
            write_file(out, text.encode())
            console.say(f"Written: {out}")


def _write_drawings(fmt: str, tables: Sequence[Table], folder: Path) -> None:
    from kallm_bench.errors import RecordError
    from kallm_bench.files import write_file
    from kallm_bench.reporting.plots import drawings_of, rendered

    drawings = [drawing for table in tables for drawing in drawings_of(table)]
    if not drawings:
        raise RecordError("nothing to draw: no suite here has two arms with figures to set against each other")
    for drawing in drawings:
        write_file(folder / f"{drawing.name}.{fmt}", rendered(drawing, fmt))
        console.say(f"Written: {folder / f'{drawing.name}.{fmt}'}")


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
    if suite and testbed and not any((suite, testbed) == (record.suite, record.testbed) for record in records):
        found = ", ".join(sorted({record.testbed for record in records if record.suite == suite}))
        return f"no records of suite '{suite}' on testbed '{testbed}'; there are some on: {found}"
    return f"nothing to compare in the records of suite '{suite or 'any'}' on testbed '{testbed or 'any'}'"
