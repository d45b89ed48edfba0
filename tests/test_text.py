"""Figures as text: no unit is too large for what it holds, and nothing that is there is written as nothing."""

from __future__ import annotations

import re

import pytest

from kallm_bench.records import METRICS, kind_of
from kallm_bench.reporting import Figure, Table, written
from kallm_bench.reporting.html import to_html
from kallm_bench.reporting.notes import together
from kallm_bench.reporting.table import Row
from kallm_bench.reporting.text import grid, markdown_table, parts


def test_reservations_that_differ_in_a_share_are_one() -> None:
    said = ["others take 20% of the CPU", "heat", "others take 22% of the CPU", "others take 9% of the GPU"]
    assert together(said) == {
        said[0]: "others take 20% to 22% of the CPU",
        "heat": "heat",
        said[2]: "others take 20% to 22% of the CPU",
        said[3]: said[3],
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4321.0, "4,321.00 s"),
        (12.345, "12.35 s"),
        (1.0, "1.00 s"),
        (0.99996, "1.00 s"),
        (0.9989, "999 ms"),
        (0.0485, "48.5 ms"),
        (0.00301, "3.01 ms"),
        (0.0009999, "1.00 ms"),
        (0.000122, "122 µs"),
        (3.5e-6, "3.50 µs"),
        (4.2e-8, "42.0 ns"),
        (2e-13, "0.0002 ns"),
        (0.0, "0.00 s"),
        (-0.0021, "-2.10 ms"),
    ],
)
def test_seconds_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert written("decode_seconds/1x128", Figure(seconds)) == text


@pytest.mark.parametrize(
    ("joules", "text"),
    [(2.5, "2.50 J/token"), (0.0123, "12.3 mJ/token"), (0.000456, "456 µJ/token"), (7.7e-7, "770 nJ/token")],
)
def test_joules_have_the_unit_that_fits(joules: float, text: str) -> None:
    assert written("decode_joules_per_token", Figure(joules)) == text


def test_an_interval_is_in_the_unit_of_its_figure() -> None:
    figure = Figure(0.0012, (0.0009, 0.0021), over="seeds")
    assert written("start_seconds", figure) == "1.20 ms [0.90 ms, 2.10 ms]"
    assert written("start_seconds", Figure(0.0, (0.0, 0.0021))) == "0.00 s"
    assert parts("start_seconds", Figure(0.012, (0.011, 0.013), over="samples")) == ("12.0 ms", "± 8 %", "")


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("parameters", 1234.0, "1,234"),
        ("parameters", 0.0, "0"),
        ("peak_resident_bytes", 300 * 2**10, "0.0003 GiB"),
        ("train_mfu", 0.0002, "0.02 %"),
        ("train_mfu", 0.4382, "43.8 %"),
        ("ratio", 0.0031, "0.003"),
        ("heldout_loss", 2.3914, "2.391"),
        ("accuracy", 0.0, "0.0 %"),
        ("decode_tokens_per_second", 0.31, "0.3"),
        ("accuracy_difference", 0.02, "+0.0"),
        ("heldout_loss_difference", -0.0001, "-0.000"),
    ],
)
def test_what_is_there_is_not_written_as_nothing(metric: str, value: float, text: str) -> None:
    """But for differences: one that small is none."""
    assert written(metric, Figure(value)) == text


def test_a_unit_is_said_where_no_heading_says_it() -> None:
    assert written("forward_seconds", Figure(1.08e-4)) == "108"
    assert written("forward_seconds", Figure(1.08e-4), headed=False) == "108 µs"
    assert written("peak_bytes", Figure(3 * 2**30), headed=False) == "3.00 GiB"


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_no_metric_of_any_size_is_written_as_zero(metric: str) -> None:
    whole = kind_of(metric).unit == "parameters"
    for power in range(0 if whole else -7, 7):
        text = written(metric, Figure(3.3 * 10**power), headed=False)
        assert re.search("[1-9]", text) or text.startswith("+"), text


def asked(name: str, way: str, accuracy: float, loss: float = 2.5, **more: object) -> Row:
    figures = {"heldout_loss": Figure(loss), "accuracy": Figure(accuracy)}
    return Row(name, "a KAN", 3, figures, way=way, number=int(bool(way)), asked=way, **more)  # type: ignore[arg-type]


def table_of(*rows: Row) -> Table:
    return Table("s", "t", rows, (), ("heldout_loss", "accuracy"), ("held-out loss", "accuracy"))


GUESSING = [Row(f"guessing ({way})", "no model", 0, {"accuracy": Figure(0.25)}, asked=way) for way in ("chat", "other")]


def test_scores_of_several_protocols_stand_side_by_side() -> None:
    lone = Row("late", "a KAN", 3, {"accuracy": Figure(0.5)}, asked="chat")
    table = table_of(asked("kan", "chat", 0.4), asked("kan", "other", 0.3), lone, *GUESSING)
    assert grid(table) == [
        ["arm", "what", "seeds", "held-out loss", "accuracy, chat", "accuracy, other"],
        ["kan", "a KAN", "3", "2.500", "40.0 %", "30.0 %"],
        ["late", "a KAN", "3", "–", "50.0 %", "–"],
        ["guessing", "no model", "", "–", "25.0 %", "25.0 %"],
    ]
    assert markdown_table(table, notes=False).splitlines()[1] == "| --- | --- | --- | --: | --: | --: |"
    assert "accuracy, other" in to_html([table])


@pytest.mark.parametrize(
    "rows",
    [
        (asked("kan", "chat", 0.4), asked("kan", "other", 0.3, loss=2.6)),
        (asked("kan", "chat", 0.4), asked("linear", "other", 0.3)),
        (asked("kan", "chat", 0.4), asked("kan", "chat", 0.3)),
    ],
    ids=["not of one training", "not of one arm", "asked the same"],
)
def test_rows_that_differ_in_more_than_scores_stay_apart(rows: tuple[Row, Row]) -> None:
    assert [line[0] for line in grid(table_of(*rows))[1:]] == [row.label for row in rows]
