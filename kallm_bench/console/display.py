"""How work is seen to go on: bars on a terminal, and a line now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

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

from kallm_bench.console import streams
from kallm_bench.console.ahead import Ahead
from kallm_bench.console.grids import minutes

PLAIN_EVERY_SECONDS = 15.0
"""Without a terminal there is no bar to redraw: a line now and then, so that a log shows that work goes on."""

NOTES = 4
"""Parts of a note that are shown."""


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
            console=streams.err, transient=True, speed_estimate_period=300,
        )  # fmt: skip

    def make_tasks_table(self, tasks: Iterable[Task]) -> RichTable:
        every, tasks = self.columns, list(tasks)
        wide = streams.err.options.update(max_width=10_000)
        try:
            for count in range(len(self.dispensable) + 1):
                self.columns = tuple(column for column in every if column not in self.dispensable[:count])
                table = super().make_tasks_table(tasks)
                if table.__rich_measure__(streams.err, wide).maximum <= streams.err.width:
                    break
        finally:
            self.columns = every
        return table


class _Left(TimeRemainingColumn):
    """The time left, with the word: what the task says of it, else by its speed."""

    def render(self, task: Task) -> Text:
        if (told := task.fields.get("left")) is not None:
            return Text(f"left {told}" if told else "")
        return Text("left ") + super().render(task)


class Display:
    """Shows progress while it is entered; it is the Watch that stages are given.

    Once it knows what to `expect`, it also shows how much of the whole is done and how long the rest will take.

    A work of which nothing is counted is a word about how it goes: said once, and on a terminal left standing above the
    bars. `silent` shows nothing.
    """

    def __init__(self, silent: bool = False) -> None:
        self.ahead = Ahead({})
        self.silent = silent
        self.last_word = ""
        self.last_plain = 0.0
        self.last_work = ""
        self.heard = ("", 0, 0, 0.0)
        self.progress = Lines()
        self.whole: TaskID | None = None
        self.current: TaskID | None = None

    def __enter__(self) -> Display:
        if streams.err.is_terminal and not self.silent:
            self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if streams.err.is_terminal:
            self.progress.stop()

    def expect(self, plan: Mapping[str, float]) -> None:
        """The seconds that each part of the whole would take."""
        self.ahead = Ahead(plan)
        if plan and self.whole is None and streams.err.is_terminal and not self.silent:
            self.whole = self.progress.add_task("all of it", total=100, note="", left="")

    def begin(self, part: str) -> None:
        """A part of the plan begins; the one before it is done."""
        self.ahead.begin(part)

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None:
        if self.silent:
            return
        if not total and not done:
            if work != self.last_word:
                streams.tell(work)
            self.last_word = work
            return
        self.ahead.hear(work, done, total)
        left = self.ahead.left()
        left_text = minutes(left) if left else self._left_of_work(work, done, total)
        if not streams.err.is_terminal:
            self._plain(work, done, total, note, left_text)
            return
        if self.whole is not None:
            self.progress.update(
                self.whole,
                completed=min(99, int(100 * self.ahead.share(left))),
                description=f"all of it, {self.ahead.part}" if self.ahead.part else "all of it",
                left=f"about {left_text}" if left_text else "",
            )
        if self.current is None or work != self.last_work:
            if self.current is not None:
                self.progress.remove_task(self.current)
            # what an earlier run has done says nothing of the speed of this one
            self.current = self.progress.add_task(work, total=total or None, completed=done, note=note)
            self.last_work = work
        self.progress.update(self.current, completed=done, total=total or None, note=note)

    def _left_of_work(self, work: str, done: int, total: int) -> str:
        """By the speed since this work was first heard of; where there is no plan, that is all that is known."""
        now = time.monotonic()
        if self.ahead.plan or (work, total) != self.heard[:2]:
            self.heard = (work, total, done, now)
            return ""
        _, _, first, began = self.heard
        return minutes((now - began) * (total - done) / (done - first)) if first < done < total else ""

    def _plain(self, work: str, done: int, total: int, note: str, left: str) -> None:
        now = time.monotonic()
        if total == 1 and done == 0:
            return  # short works of one piece are for those who look on
        if work == self.last_work and done < max(total, 1) and now - self.last_plain < PLAIN_EVERY_SECONDS:
            return
        if work == self.last_work and done == total and now - self.last_plain < 1:
            return
        self.last_plain, self.last_work = now, work
        parts = [
            self.ahead.part,
            f"{work} {done}/{total}" if total else work,
            note,
            f"about {left} left" if left else "",
        ]
        streams.err.print(", ".join(part for part in parts if part), soft_wrap=True)
