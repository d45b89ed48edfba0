"""The only module that prints: progress and errors to standard error, results to standard output."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

if TYPE_CHECKING:
    from kallm_bench.budget import Budget, Room
    from kallm_bench.engine import CellForecast
    from kallm_bench.forecast import Forecast
    from kallm_bench.records import Metric, RunRecord
    from kallm_bench.reporting import Table

_console = functools.partial(Console, highlight=False, markup=False, emoji=False)  # names are shown as users wrote them
out = _console(soft_wrap=not sys.stdout.isatty())
err = _console(stderr=True)

PLAIN_EVERY_SECONDS = 15.0
"""Without a terminal there is no bar to redraw: a line now and then, so that a log shows that work goes on."""

NOTES = 4
"""Parts of a note that are shown."""

MAIN_WORKS = ("training", "questions", "contenders")
"""Of what a part of a plan consists of, the works that take its time."""

SMALL = {"s": "ms", "J/token": "mJ/token"}
"""Units of figures that may be small, and those that they are then shown in."""

SKIPPED_SECONDS = 3.0
"""A part that is over sooner was done by an earlier run."""


class NotePart(ProgressColumn):
    """One part of a task's note; see Watch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def render(self, task: Task) -> Text:
        parts = task.fields["note"].split(", ")
        return Text(parts[self.number] if self.number < len(parts) else "", no_wrap=True)


class Lines(Progress):
    """A line a task; where the terminal is too narrow for it, what matters less is left out."""

    def __init__(self) -> None:
        notes = [NotePart(number) for number in range(NOTES)]
        bar, elapsed, left = BarColumn(bar_width=20), TimeElapsedColumn(), _Left()
        work = TextColumn("{task.description}", markup=False)
        self.dispensable: list[ProgressColumn] = [bar, elapsed, *reversed(notes[1:]), left, notes[0]]
        super().__init__(
            work, bar, MofNCompleteColumn(), *notes, elapsed, left,
            console=err, transient=True, speed_estimate_period=300,
        )  # fmt: skip

    def make_tasks_table(self, tasks: Iterable[Task]) -> RichTable:
        every, tasks = self.columns, list(tasks)
        wide = err.options.update(max_width=10_000)
        try:
            for count in range(len(self.dispensable) + 1):
                self.columns = tuple(column for column in every if column not in self.dispensable[:count])
                table = super().make_tasks_table(tasks)
                if table.__rich_measure__(err, wide).maximum <= err.width:
                    break
        finally:
            self.columns = every
        return table


class _Left(TimeRemainingColumn):
    """The time left, with the word."""

    def render(self, task: Task) -> Text:
        return Text("left ") + super().render(task)


class Display:
    """Shows progress while it is entered; it is the Watch that stages are given.

    With `plan`, the predicted work of each part, it also shows how much of the whole is done and how long the rest will
    take. Predictions need only be right relative to each other.

    A work of which nothing is counted is a word about how it goes: said once, and on a terminal left standing above the
    bars. `silent` shows nothing.
    """

    def __init__(self, plan: dict[str, float] | None = None, silent: bool = False) -> None:
        self.plan = plan or {}
        self.silent = silent
        self.last_word = ""
        self.part = ""
        self.finished = 0.0
        self.part_began = self.began = time.monotonic()
        self.last_plain = 0.0
        self.last_work = ""
        self.heard = ("", 0, 0, 0.0)
        self.progress = Lines()
        self.whole: TaskID | None = None
        self.current: TaskID | None = None

    def __enter__(self) -> Display:
        if err.is_terminal and not self.silent:
            self.progress.start()
            if self.plan:
                self.whole = self.progress.add_task("all", total=100, note="")
        return self

    def __exit__(self, *exception: object) -> None:
        if err.is_terminal:
            self.progress.stop()

    def begin(self, part: str) -> None:
        """A part of the plan begins; the one before it is done."""
        now = time.monotonic()
        if now - self.part_began < SKIPPED_SECONDS:
            self.plan.pop(self.part, None)  # was done before; counted as work it would promise too much
        self.finished += self.plan.get(self.part, 0.0)
        self.part, self.part_began = part, now

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None:
        if self.silent:
            return
        if not total and not done:
            if work != self.last_word:
                tell(work)
            self.last_word = work
            return
        share = self._share(work, done, total)
        left = self._left(share) or self._left_of_work(work, done, total)
        if not err.is_terminal:
            self._plain(work, done, total, note, left)
            return
        if self.whole is not None:
            description = f"all of it, {self.part}" if self.part else "all of it"
            self.progress.update(
                self.whole,
                completed=round(100 * share),
                description=description,
                note=f"about {left} left" if left else "",
            )
        if self.current is None or work != self.last_work:
            if self.current is not None:
                self.progress.remove_task(self.current)
            # what an earlier run has done says nothing of the speed of this one
            self.current = self.progress.add_task(work, total=total or None, completed=done, note=note)
            self.last_work = work
        self.progress.update(self.current, completed=done, total=total or None, note=note)

    def _share(self, work: str, done: int, total: int) -> float:
        """How much of the whole plan is done, 0 to 1; of a part that is several works, the main one counts."""
        whole = sum(self.plan.values())
        within = self.plan.get(self.part, 0.0) * (done / total if total and work in MAIN_WORKS else 0.0)
        return (self.finished + within) / whole if whole else 0.0

    def _left(self, share: float) -> str:
        elapsed = time.monotonic() - self.began
        if share < 0.02:
            return ""
        return _minutes(elapsed * (1 - share) / share)

    def _left_of_work(self, work: str, done: int, total: int) -> str:
        """By the speed since this work was first heard of; where there is no plan, that is all that is known."""
        now = time.monotonic()
        if self.plan or (work, total) != self.heard[:2]:
            self.heard = (work, total, done, now)
            return ""
        _, _, first, began = self.heard
        return _minutes((now - began) * (total - done) / (done - first)) if first < done < total else ""

    def _plain(self, work: str, done: int, total: int, note: str, left: str) -> None:
        now = time.monotonic()
        if total == 1 and done == 0:
            return  # short works of one piece are for those who look on
        if work == self.last_work and done < max(total, 1) and now - self.last_plain < PLAIN_EVERY_SECONDS:
            return
        if work == self.last_work and done == total and now - self.last_plain < 1:
            return
        self.last_plain, self.last_work = now, work
        parts = [self.part, f"{work} {done}/{total}" if total else work, note, f"about {left} left" if left else ""]
        err.print(", ".join(part for part in parts if part), soft_wrap=True)


def _minutes(seconds: float) -> str:
    """As minutes:seconds; from two hours on in hours, as "12 h"."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def prepare() -> None:
    """Lets a terminal that is not in UTF-8 show a question mark, instead of failing, for what it cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def show_records(records: Sequence[RunRecord], as_json: bool, written: Collection[str]) -> None:
    """The figures of what was done, or found done where its id is not among those `written`; as JSON whole records."""
    if as_json:
        show_json([json.loads(record.to_json()) for record in records])
        return
    for record in records:
        _show_figures(record)
        _show_parts(record)
        _show_marks(record)
        if record.artifacts:
            out.print(f"Checkpoint: {record.artifacts[0].path.rpartition('/')[0]}")
        out.print(f"Record: {record.id}")
        if record.id not in written or record.reused:
            out.print("Found, not done again: nothing that decides it has changed.")


def _show_figures(record: RunRecord) -> None:
    """The figures of the whole: one a line, with what a reader should know beside it; below, what there is none of."""
    at = ", {batch} x {length}".format_map(record.settings) if {"batch", "length"} <= set(record.settings) else ""
    table = RichTable(
        title=f"{record.stage}: {record.arm}{at}", title_justify="left", title_style="bold", show_header=False
    )
    missing: dict[str, list[str]] = {}
    for metric in record.metrics:
        if "/" in metric.name or metric.name in ENDS:
            continue
        if metric.value is None:
            missing.setdefault(metric.note or "no reason is known", []).append(metric.name)
        else:
            table.add_row(metric.name, Text(_written(record, metric), justify="right"), metric.note)
    out.print(table)
    for reason, names in missing.items():
        out.print(f"· not measured: {', '.join(names)}: {reason}", style="dim")


ENDS = ("accuracy_low", "accuracy_high", "likeliest_accuracy_low", "likeliest_accuracy_high")
"""Figures that are shown as the interval of another."""


def _show_marks(record: RunRecord) -> None:
    """What the marks beside its figures mean."""
    from kallm_bench.reporting import EXPLAINED, judged

    marks = {judged(record, metric.name)[1] for metric in record.metrics}
    for mark, text in EXPLAINED.items():
        if mark in marks:
            out.print(text, style="dim")


def _show_parts(record: RunRecord) -> None:
    """The figures of parts, "accuracy/snarks": a line a part, a column a metric; of a profile in several tables."""
    parts: dict[str, dict[str, Metric]] = {}
    for metric in record.metrics:
        name, slash, part = metric.name.partition("/")
        if slash and name not in ENDS:
            parts.setdefault(part, {})[name] = metric
    if record.stage == "profile":
        _show_costs(record, parts)
    elif parts:
        names = list(dict.fromkeys(name for figures in parts.values() for name in figures))
        headings = ["", *(name.removesuffix("_accuracy").replace("_", " ") for name in names)]
        shown = {
            part: [_written(record, figures[name]) if name in figures else "" for name in names]
            for part, figures in parts.items()
        }
        show_rows(headings, [[part, *cells] for part, cells in shown.items()])


def _show_costs(record: RunRecord, parts: Mapping[str, Mapping[str, Metric]]) -> None:
    """A table for parts with the same metrics: scopes, phases, points of a grid, modules, ratios.

    Beside a number stands the spread of its samples where it is wide, and below the table what else there is to know.
    What could not be measured of any of them is left out.
    """
    tables: dict[tuple[str, ...], list[str]] = {}
    for part, figures in parts.items():
        tables.setdefault(tuple(figures), []).append(part)
    for names, alike in tables.items():
        measured = [name for name in names if any(parts[part][name].value is not None for part in alike)]
        if not measured:
            continue
        headings = ["", *(name.replace("_", " ") for name in measured)]
        rows = [[part, *(_beside(record, parts[part][name]) for name in measured)] for part in alike]
        _show_grid("", [headings, *rows])
        for part in alike:
            told = (word for name in measured for word in parts[part][name].note.split("; "))
            if other := [word for word in dict.fromkeys(told) if word and not word.startswith("spread ")]:
                out.print(f"· {part}: {'; '.join(other)}", style="dim")


def _beside(record: RunRecord, metric: Metric) -> str:
    """A figure and, where that was told of it, the spread of its samples."""
    spread, _, _ = metric.note.partition("; ")
    return _written(record, metric) + (f" ({spread})" if spread.startswith("spread ") else "")


def _written(record: RunRecord, metric: Metric) -> str:
    from kallm_bench.records import kind_of
    from kallm_bench.reporting import Figure, judged, written

    if metric.value is None:
        return "not measured"
    unit = kind_of(metric.name).unit
    if unit in SMALL and abs(metric.value) < 1:
        return f"{1000 * metric.value:,.3g} {SMALL[unit]}"
    return written(metric.name, Figure(metric.value, *judged(record, metric.name)))


def show_tables(tables: Sequence[Table]) -> None:
    """Report tables, with their notes below: a row an arm where that fits, else a column an arm."""
    from kallm_bench.reporting import grid

    for table in tables:
        cells = grid(table)
        if table.kind == "kernels":
            _show_groups(table.title, cells)
        else:
            _show_grid(table.title, cells)
        for note in table.notes:
            out.print(f"· {note}", style="dim")


def _show_grid(title: str, cells: Sequence[Sequence[str]]) -> None:
    """A table where it fits; else without what its arms are, which then stands above it, or turned, or in parts."""
    if _fits(shown := _grid(title, cells)):
        out.print(shown)
        return
    if "what" in cells[0]:
        place = cells[0].index("what")
        out.print(Text(title, style="bold"))
        for row in cells[1:]:
            out.print(Text(f"{row[0]}: {row[place]}"), soft_wrap=True)
        title, cells = "", [[*row[:place], *row[place + 1 :]] for row in cells]
    turned = [list(column) for column in zip(*cells, strict=True)]
    whole = next((each for each in (cells, turned) if _fits(_grid(title, each))), None)
    for part in [whole] if whole else _parts(cells):
        out.print(_grid(title, part))
        title = ""


def _fits(table: RichTable) -> bool:
    return table.__rich_measure__(out, out.options.update(max_width=10_000)).maximum <= out.width


def _parts(cells: Sequence[Sequence[str]]) -> Iterator[list[list[str]]]:
    """A table in as many as it takes to fit, each with the first column and at least one more."""
    begin, columns = 1, len(cells[0])
    while begin < columns:
        end = begin + 1
        while end < columns and _fits(_grid("", _columns(cells, begin, end + 1))):
            end += 1
        yield _columns(cells, begin, end)
        begin = end


def _columns(cells: Sequence[Sequence[str]], begin: int, end: int) -> list[list[str]]:
    return [[row[0], *row[begin:end]] for row in cells]


def _grid(title: str, cells: Sequence[Sequence[str]]) -> RichTable:
    """A table of which the first row and the first column are headings."""
    table = RichTable(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(cells[0]):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in cells[1:]:
        table.add_row(*row)
    return table


def _show_groups(title: str, cells: Sequence[Sequence[str]]) -> None:
    """A table of many rows: the first column, where it says something, is the heading of those that follow."""
    (_, *headings), *rows = cells
    longest = [
        max(len(text) for text in (*heading.split(), *(row[number] for row in rows)))
        for number, heading in enumerate(headings, start=1)
    ]

    def part(group: Sequence[Sequence[str]]) -> RichTable:
        table = RichTable(box=None, show_header=not group)
        for number, (heading, width) in enumerate(zip(headings, longest, strict=True)):
            table.add_column(heading, justify="right" if number else "left", vertical="bottom", width=width)
        for row in group:
            table.add_row(*row[1:])
        return table

    out.print(title, style="bold")
    out.print(part([]))
    starts = [number for number, row in enumerate(rows) if row[0]]
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        out.print(rows[start][0], style="italic")
        out.print(part(rows[start:end]))


def show_forecast(coming: Forecast, as_json: bool) -> None:
    """What a retrofit would come to: place by place, then the whole."""
    if as_json:
        show_json(coming.to_json())
        return
    rows = [
        [place.name, place.before[0], f"{place.before[1]:,}", place.after[0], f"{place.after[1]:,}"]
        for place in coming.places
    ]
    show_rows(["site", "goes", "parameters", "comes", "parameters"], rows)
    before, after = coming.parameters
    replaced = [sum(place.before[1] for place in coming.places), sum(place.after[1] for place in coming.places)]
    pairs = [
        ("start", coming.spec.start),
        ("parameters", f"{before:,} -> {after:,}"),
        ("of them replaced", f"{replaced[0]:,} -> {replaced[1]:,}"),
        ("FLOP a token, forward", f"{coming.flops[0]:,} -> {coming.flops[1]:,}"),
        ("weights", ", ".join(f"{_gib(size)} in {name}" for name, size in coming.weights.items())),
    ]
    pairs += [
        (f"learn in scope {scope}", f"{count:,}; {_gib(coming.training_bytes(scope))} and activations")
        for scope, count in coming.trainable.items()
    ]
    show_pairs("Nothing was done: this is what it would come to", pairs)


def show_training(coming: Budget, room: Room, as_json: bool) -> None:
    """What a training run would take."""
    if as_json:
        show_json(coming.to_json() | {"room": dataclasses.asdict(room)})
        return
    pairs = [
        ("steps", f"{coming.steps:,}"),
        ("tokens", f"{coming.tokens:,}"),
        ("parameters", f"{coming.parameters:,}"),
        ("of them learn", f"{coming.trainable_parameters:,}"),
        ("takes", f"about {_minutes(coming.seconds)}, loading aside"),
        *((name, _gib(size)) for name, size in coming.peaks.items()),
        ("rows at once", str(coming.rows_at_once)),
        ("checkpoint", _gib(coming.checkpoint_bytes)),
        ("state of a stopped run", _gib(coming.state_bytes)),
        ("disk, at most at one time", _gib(coming.disk_bytes)),
    ]
    if coming.cache_bytes:
        pairs.append(("what frozen blocks give, if kept", _gib(coming.cache_bytes)))
    pairs.append(("known from", coming.source))
    show_pairs("Nothing was saved: this is what it would take", pairs)
    for line in _too_much([coming.peak_bytes or 0], coming.disk_bytes, room):
        tell(line)


def _too_much(peaks: Sequence[float], disk_bytes: float, room: Room) -> list[str]:
    """Whether memory and disk will do."""
    lines = []
    for what, needed, there in (
        ("memory", max(peaks, default=0), room.memory_bytes),
        ("disk", disk_bytes, room.disk_bytes),
    ):
        verdict = "fits" if needed <= there else "does not fit"
        lines.append(f"{what}: {_gib(needed)} of {_gib(there)}: {verdict}")
    return lines


CELL_HEADINGS = (
    "arm", "seed", "what", "training tokens", "steps", "parameters", "that learn", "takes", "peak memory",
    "checkpoint", "known from", "questions from",
)  # fmt: skip


def show_cells(cells: Sequence[CellForecast], room: Room, as_json: bool) -> None:
    """The cells of a suite, with what each one's training would take, and all of it."""
    if as_json:
        show_json([dataclasses.asdict(cell) | {"budget": cell.budget and cell.budget.to_json()} for cell in cells])
        return
    _show_grid("Nothing was run: this is what it would take", [CELL_HEADINGS, *(_cell_row(cell) for cell in cells)])
    budgets = [cell.budget for cell in cells if cell.budget]
    if budgets:
        # every cell keeps what it retrofitted and what it trained; states go one after the other
        kept = sum(2 * budget.checkpoint_bytes for budget in budgets)
        disk = kept + max(budget.disk_bytes - budget.checkpoint_bytes for budget in budgets)
        say(f"Training takes about {_minutes(sum(budget.seconds for budget in budgets))} in all.")
        for line in _too_much([budget.peak_bytes or 0 for budget in budgets], disk, room):
            tell(line)


def _cell_row(cell: CellForecast) -> list[str]:
    budget = cell.budget
    if budget is None:
        return [cell.arm, cell.seed, cell.what, *("–" for _ in range(7)), cell.trouble or "–", cell.questions or "–"]
    return [
        cell.arm, cell.seed, cell.what, f"{budget.tokens:,}", f"{budget.steps:,}", f"{budget.parameters / 1e6:.2f}M",
        f"{budget.trainable_parameters / 1e6:.2f}M", _minutes(budget.seconds),
        _gib(budget.peak_bytes) if budget.peak_bytes else "–", _gib(budget.checkpoint_bytes), budget.source,
        cell.questions or "–",
    ]  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def show_pairs(title: str, pairs: Sequence[tuple[str, str]]) -> None:
    """A small two-column table."""
    table = RichTable(title=title, title_justify="left", show_header=False)
    for name, value in pairs:
        table.add_row(name, value)
    out.print(table)


def show_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table."""
    table = RichTable()
    for number, heading in enumerate(headings):
        figures = number > 0 and all(_is_figure(row[number]) for row in rows)
        widest = max((len(row[number]) for row in rows), default=0) if figures else None  # a figure is never broken
        table.add_column(heading, justify="right" if figures else "left", overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _is_figure(text: str) -> bool:
    return not text or text.removeprefix("-")[:1].isdigit()


def say(text: str) -> None:
    """One line of result."""
    out.print(text)


def tell(text: str) -> None:
    """One line about how the work goes."""
    err.print(text, style="dim", soft_wrap=True)


def stream(text: str) -> None:
    """A piece of generated text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def fail(message: str) -> None:
    """The one line of an error."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
