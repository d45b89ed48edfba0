"""Drawings and JSON: what they hold, that the same records give the same, and that the schema describes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import test_reporting
from test_reporting import ASKED, TRAINING, Bench

from kallm_bench.records import Metric
from kallm_bench.reporting import Figure, Memory, Table, build_tables, to_json
from kallm_bench.reporting.answers import AnswerBook
from kallm_bench.reporting.html import to_html
from kallm_bench.reporting.json_text import SCHEMA_FILE
from kallm_bench.reporting.plots import PICTURES, Drawing, drawings_of, rendered
from kallm_bench.reporting.sweeps import Line, sweeps_of
from kallm_bench.reporting.tradeoffs import Panel, Point, panels_of, pareto_front, points_of

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("results"))
    bench.arm("untouched", 0, None, 2.274, right=8)
    for seed in range(2):
        bench.arm("linear", seed, {"basis": "linear"}, 2.5 + seed / 10, right=5, replaced=1000)
        bench.arm("kan", seed, {"basis": "cheby2", "degree": 2}, 2.391 + seed / 100, right=7, replaced=1000)
    return bench


@pytest.fixture(scope="module")
def arms(bench: Bench) -> Table:
    return build_tables(bench.store)[0]


@pytest.mark.parametrize(
    ("cost", "skill", "front"),
    [
        ("parameters", "accuracy", "ab"),  # less, and more
        ("parameters", "heldout_loss", "ac"),  # less, and less
        ("decode_tokens_per_second", "accuracy", "bd"),  # more, and more
        ("decode_tokens_per_second", "heldout_loss", "cd"),  # more, and less
    ],
)
def test_the_pareto_front_is_what_nothing_beats(cost: str, skill: str, front: str) -> None:
    places = {"a": (1.0, 2.0), "b": (3.0, 5.0), "c": (2.0, 1.0), "d": (4.0, 3.0), "e": (2.5, 2.0)}
    places["e"] = (2.5, 3.5) if front in ("ac", "cd") else (2.5, 1.9)
    if front == "ab":
        places["c"] = (3.0, 1.0)
    points = [Point(name, *place, None, None) for name, place in places.items()]
    assert "".join(sorted(point.arm for point in pareto_front(points, cost, skill))) == front


def test_twins_stand_on_the_front_together() -> None:
    points = [Point(name, 1.0, 2.0, None, None) for name in "ab"]
    assert pareto_front(points, "parameters", "accuracy") == points


def test_points_are_in_the_units_of_their_axes(arms: Table) -> None:
    points = {point.arm: point for point in points_of(arms, Panel("parameters", "accuracy"))}
    assert set(points) == {"untouched", "linear", "kan"}  # and no guessing
    assert points["kan"].x == pytest.approx(134.515008)
    assert points["kan"].y == pytest.approx(87.5)
    assert points["kan"].y_ends is not None
    assert points["kan"].y_ends[0] < 87.5 < points["kan"].y_ends[1]


def test_speeds_of_a_shared_machine_are_not_drawn(arms: Table) -> None:
    def with_speeds(**marks: str) -> Table:
        speeds = {name: {"train_tokens_per_second": Figure(600.0, mark=mark)} for name, mark in marks.items()}
        rows = [dataclasses.replace(row, figures=row.figures | speeds.get(row.name, {})) for row in arms.rows]
        return dataclasses.replace(arms, rows=tuple(rows))

    panel = Panel("train_tokens_per_second", "heldout_loss")
    alone, shared = with_speeds(linear="", kan=""), with_speeds(linear="", kan="§")
    assert [point.arm for point in points_of(alone, panel)] == ["linear", "kan"]
    assert panel in [each for row in panels_of(alone) for each in row]
    assert [point.arm for point in points_of(shared, panel)] == ["linear"]
    assert panel not in [each for row in panels_of(shared) for each in row]  # one arm is nothing to compare


def test_two_ways_of_asking_share_no_axis(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    for name, spec in (("linear", {"basis": "linear"}), ("kan", {"basis": "cheby2", "degree": 2})):
        bench.arm(name, 0, spec, 2.0, right=4)
        other = ASKED | {"protocol": "leaderboard", "weights": bench.trained}
        scores = [Metric("accuracy", 0.9, n=8), Metric("guessing_accuracy", 0.3, n=8)]
        bench.record("eval-bbh", name, 0, other, scores, data={"source": "BIG-Bench Hard", "fingerprint": "q"})
    table = build_tables(bench.store)[0]
    by_way = {panel.asked: points_of(table, panel) for row in panels_of(table) for panel in row}
    assert {asked: [point.arm for point in points] for asked, points in by_way.items()} == {
        "chat, procedural": ["linear", "kan"],
        "leaderboard": ["linear", "kan"],
        "": ["linear", "kan"],  # of the loss, which is the same in both rows
    }
    guessing = [row.name for row in table.rows if row.name.startswith("guessing")]
    assert guessing == ["guessing (chat, procedural)", "guessing (leaderboard)"]
    losses = next(each for each in drawings_of(table) if each.name.endswith("losses"))
    assert [arm for arm, _, _ in losses.data] == ["linear", "kan"]
    tasks = next(each for each in drawings_of(table) if each.name.endswith("tasks"))
    assert list(tasks.data) == ["linear (chat, procedural)", "kan (chat, procedural)"]
    assert rendered(drawings_of(table)[0], "svg")


def test_what_was_trained_at_three_rates_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path)

    def add(rate: float, name: str, basis: str, *losses: float, **other: Any) -> None:
        monkeypatch.setattr(test_reporting, "TRAINING", TRAINING | other | {"learning_rate": rate})
        for seed, loss in enumerate(losses):
            bench.arm(f"{basis}-{name}", seed, {"basis": basis}, loss, right=4)

    def lines() -> list[Line]:
        return sweeps_of(build_tables(bench.store)[0])

    for basis, better in (("linear", 0.2), ("cheby2", 0.1)):
        add(4e-4, "usual", basis, 3.0 - better, 3.2 - better)
        add(1.3e-4, "slow", basis, 3.0)
    add(1.2e-3, "fast", "linear", 2.5, weight_decay=0.1)  # another training
    assert not lines(), "two rates make no line"
    add(1.2e-3, "faster", "linear", 2.6)
    ((name, points),) = lines()
    assert name == "linear"
    assert [(rate, pytest.approx(loss)) for rate, loss, _ in points] == [(1.3e-4, 3.0), (4e-4, 2.9), (1.2e-3, 2.6)]
    assert [interval is None for _, _, interval in points] == [True, False, True]
    add(1.2e-3, "fast", "cheby2", 2.7)
    assert [name for name, _ in lines()] == ["linear", "cheby2"]
    drawing = next(each for each in drawings_of(build_tables(bench.store)[0]) if each.name.endswith("rates"))
    text = rendered(drawing, "svg").decode()
    assert all(f">{rate}<" in text for rate in ("0.00013", "0.0004", "0.0012"))


@pytest.mark.parametrize("kind", PICTURES)
def test_the_same_records_give_the_same_pictures(bench: Bench, arms: Table, kind: str) -> None:
    drawings = drawings_of(arms)
    assert [drawing.name.rpartition("-")[2] for drawing in drawings] == ["costs", "losses", "tasks"]
    again = drawings_of(build_tables(bench.store)[0])
    for one, other in zip(drawings, again, strict=True):
        assert one.fingerprint == other.fingerprint
        assert rendered(one, kind) == rendered(other, kind)
    assert rendered(drawings[0], kind).startswith(b"<?xml" if kind == "svg" else b"\x89PNG")


def test_a_picture_says_of_what_it_is(arms: Table) -> None:
    (costs, losses, tasks) = drawings_of(arms)
    assert f"data {costs.fingerprint}" in rendered(costs, "svg").decode()
    assert len({costs.fingerprint, losses.fingerprint, tasks.fingerprint}) == 3
    other: Drawing = dataclasses.replace(losses, data=[*losses.data, 1])
    assert other.fingerprint != losses.fingerprint
    nearly = dataclasses.replace(
        costs, data=[[panel, [p | {"y": p["y"] * (1 + 1e-14)} for p in points]] for panel, points in costs.data]
    )
    assert nearly.data != costs.data
    assert nearly.fingerprint == costs.fingerprint  # as another processor might have it


def test_the_page_is_the_same_for_the_same_records(bench: Bench) -> None:
    assert to_html(build_tables(bench.store)) == to_html(build_tables(bench.store))


def test_curves_end_at_the_trained_tokens(arms: Table) -> None:
    (curve,) = next(row for row in arms.rows if row.name == "kan").curves
    assert curve.metric == "train_loss"
    assert [tokens for tokens, _ in curve.points] == [8192 * n / 16 for n in range(1, 17)]
    assert curve.points[-1][1] == pytest.approx((2.391 + 2.401) / 2 + 2 / 16)


def test_the_schema_describes_the_json(bench: Bench) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    data = json.loads(to_json(build_tables(bench.store), [(Path("cut.json"), "not a record")]))
    jsonschema.validate(data, SCHEMA)
    kinds = [table["table"] for table in data["tables"]]
    assert kinds == ["arms", "differences"]
    (kan,) = data["tables"][1]["rows"]
    assert kan["comparison"]["verdict"] == kan["words"]["verdict on accuracy"]
    assert data["tables"][0]["rows"][1]["tasks"]["snarks"] == {"accuracy": 0.625, "guessing": 0.5, "sure": False}
    for broken in ({**data, "schema": 2}, {**data, "more": 1}, {**data, "tables": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_what_was_computed_once_is_remembered(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(tmp_path)
    first = to_json(build_tables(bench.store, memory=memory))
    memory.keep()
    monkeypatch.setattr(AnswerBook, "_answers_of", lambda *_: pytest.fail("the answers were read again"))
    assert to_json(build_tables(bench.store, memory=Memory(tmp_path))) == first


def test_what_was_damaged_is_not_remembered(tmp_path: Path) -> None:
    bench, cache = Bench(tmp_path / "results"), tmp_path / "cache"
    bench.arm("untouched", 0, None, 2.274, right=8)

    def interval() -> tuple[float, float] | None:
        memory = Memory(cache)
        table = build_tables(bench.store, memory=memory)[0]
        memory.keep()
        return table.rows[0].figures["accuracy"].interval

    (path,) = bench.store.folder.rglob("*.samples.jsonl.gz")
    whole = path.read_bytes()
    right = interval()
    assert right is not None
    path.write_bytes(whole[:20])
    assert interval() is None
    assert interval() is None
    assert [each for each, _ in bench.store.damaged] == [path]
    path.write_bytes(whole)
    assert interval() == right
    cache.rename(tmp_path / "away")
    (tmp_path / "cache").write_text("a file where the cache should be")
    assert interval() == right


def test_a_task_is_above_guessing_only_beyond_chance(tmp_path: Path) -> None:
    from kallm_bench.reporting.rows import _above

    generator = np.random.default_rng(0)
    found = [_above(float(np.mean(generator.random(100) < 0.3)), 100, 0.3) < 0.05 for _ in range(1000)]
    assert sum(found) <= 65
    assert _above(0.5, 100, 0.3) < 1e-4
    assert _above(0.0, 100, 0.3) == _above(0.1, 100, 0.0) == 1.0
