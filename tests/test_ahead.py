"""The time that is left of planned work, against a clock that is known."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from kallm_bench import console
from kallm_bench.console import ahead
from kallm_bench.console.ahead import Ahead

Told = tuple[float, float, str]
"""The time, what was said to be left, and the part that was on."""


class Clock:
    """A time that goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(ahead.time, "monotonic", own)
    return own


def go(clock: Clock, plan: dict[str, float], took: dict[str, float]) -> Iterator[Told]:
    """Goes through a plan, second by second; training counts its steps, a profile and an evaluation's start do not."""
    left = Ahead(plan)
    for part, seconds in took.items():
        left.begin(part)
        for second in range(int(seconds)):
            clock.now += 1
            if part.endswith("train"):
                left.hear("training", 2 * (second + 1), 2 * int(seconds))
            else:
                left.hear("profile of prefill", second % 3, 3)
            yield clock.now, left.left(), part


def test_what_is_left_goes_down_to_nothing_whatever_was_predicted(clock: Clock) -> None:
    arms, true = ("linear", "kan", "drop"), {"train": 400.0, "profile": 200.0}
    took = {f"{arm} seed 0 {stage}": seconds for arm in arms for stage, seconds in true.items()}
    plan = {part: seconds * (3 if "train" in part else 0.5) for part, seconds in took.items()}
    told = list(go(clock, plan, took))
    whole = sum(took.values())
    for now, left, part in told:
        if not part.startswith("linear"):  # one part of each kind has told how wrong the plan was
            assert left == pytest.approx(whole - now, rel=0.06, abs=10)
    assert told[-1][1] == 0


def test_what_is_left_of_a_part_never_grows_while_it_goes_as_foreseen(clock: Clock) -> None:
    plan = {"kan seed 0 retrofit": 5.0, "kan seed 0 train": 30.0, "kan seed 0 profile": 20.0}
    lefts = [left for _, left, _ in go(clock, plan, plan)]
    assert lefts == pytest.approx([54.0 - second for second in range(55)])


def test_a_short_part_tells_little_of_a_long_one_and_nothing_tells_all_of_another_kind(clock: Clock) -> None:
    left = Ahead({"a seed 0 retrofit": 1.0, "b seed 0 retrofit": 100.0, "b seed 0 train": 100.0})
    left.begin("a seed 0 retrofit")
    clock.now += 12
    left.begin("none of the plan")
    assert left.left() == pytest.approx(2 * 100 * 22 / 11)
    left = Ahead({"a seed 0 train": 1.0, "a seed 0 profile": 100.0})
    left.begin("a seed 0 train")
    clock.now += 500
    left.begin("none of the plan")
    assert left.left() == 300


def test_parts_that_an_earlier_run_has_done_count_neither_as_work_nor_as_speed(clock: Clock) -> None:
    left = Ahead({"a seed 0 train": 100.0, "b seed 0 train": 100.0, "c seed 0 train": 100.0})
    for part in ("a seed 0 train", "b seed 0 train"):
        left.begin(part)
        clock.now += 0.5
    left.begin("c seed 0 train")
    left.hear("training", 80, 100)  # a resumed run
    clock.now += 10
    left.hear("training", 90, 100)
    assert left.left() == pytest.approx(10)
    assert left.share(left.left()) == pytest.approx(11 / 21)


def test_a_part_that_takes_longer_than_foreseen_promises_nothing(clock: Clock) -> None:
    left = Ahead({"kan seed 0 profile": 5.0})
    left.begin("kan seed 0 profile")
    clock.now += 60
    left.hear("profile of decoding", 1, 3)
    assert left.left() == 0


def test_a_terminal_is_shown_one_time_for_all_of_it(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    err = Console(file=io.StringIO(), width=160, force_terminal=True, color_system=None)
    monkeypatch.setattr(console.streams, "err", err)
    display = console.Display()
    display.expect({"kan seed 0 train": 100.0, "kan seed 0 profile": 60.0})
    display.begin("kan seed 0 train")
    display("training", 0, 100, "loss 2")
    clock.now += 50
    display("training", 50, 100, "loss 2")
    err.print(display.progress.make_tasks_table(display.progress.tasks))
    whole = next(line for line in err.file.getvalue().splitlines() if "all of it" in line)  # type: ignore[attr-defined]
    assert whole.rstrip().endswith("left about 1:50")
    assert whole.count("left") == 1
    assert " 31/100 " in whole
