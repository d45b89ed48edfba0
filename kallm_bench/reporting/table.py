"""What a report is made of: tables of rows of figures, with what stands beside them. Frozen, and knows no record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kallm_bench.records.comparison import Comparison
from kallm_bench.records.statistics import Interval
from kallm_bench.reporting.arms import Sweep, labelled

SUBTITLES = {
    "arms": "",
    "differences": ": differences",
    "starts": ": right after the retrofit",
    "training": ": training steps",
    "overview": ": layers alone, at a glance",
    "kernels": ": layers alone",
    "failures": ": what failed",
}
"""What a table's kind adds to its title."""


@dataclass(frozen=True)
class Figure:
    """One cell of a table.

    Args:
        value: the mean over seeds.
        interval: 95 %; None where nothing is known of how far it could have come out otherwise.
        over: what the interval is over: other seeds, other questions, or, as its whole range, the samples of one run.
        mark: a sign that a note explains.
    """

    value: float
    interval: Interval | None = None
    mark: str = ""
    over: Literal["seeds", "questions", "samples", ""] = ""


@dataclass(frozen=True)
class TaskScore:
    """Accuracy on one task, the mean over seeds, beside guessing. `sure`: whether it is above that, after Holm."""

    accuracy: float
    guessing: float | None
    sure: bool = False


@dataclass(frozen=True)
class Curve:
    """A loss during training: (trained tokens, nats a token), the mean over seeds."""

    metric: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """An arm, or a line beside the arms such as guessing.

    Args:
        seeds: 0 where none apply.
        figures: by metric.
        words: what is no number, by heading.
        number: 1, 2, … where several rows go by this name, else 0; a note says how they differ.
        way: how its questions were asked, where that alone tells it from the others of its name.
        asked: how its questions were asked, in a word or two; rows that differ in it share no axis of accuracy.
        comparison: with another row, on the questions that both were asked.
        tasks, curves, sweep: of the row's figures, for those who look closer.
    """

    name: str
    what: str = ""
    seeds: int = 0
    figures: dict[str, Figure] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    number: int = 0
    way: str = ""
    asked: str = ""
    comparison: Comparison | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    sweep: Sweep | None = None

    @property
    def label(self) -> str:
        """The name, with what tells it from others of that name."""
        return labelled(self.name, self.number, self.way)


@dataclass(frozen=True)
class Table:
    """One suite on one testbed: its arms, or another look at them.

    Args:
        kind: a key of SUBTITLES.
        metrics, headings: the columns of figures, in order.
        words: headings of the columns of words, which stand before them.
    """

    suite: str
    testbed: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    metrics: tuple[str, ...]
    headings: tuple[str, ...]
    kind: str = "arms"
    words: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.suite} on {self.testbed}{SUBTITLES[self.kind]}"
