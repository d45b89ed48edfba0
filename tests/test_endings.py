"""How cells ended: which failures still stand, how they are kept, and how a report tells them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console
from test_reporting import Bench

from kallm_bench import console
from kallm_bench.errors import RecordError
from kallm_bench.records import Ending, ResultsStore, standing_failures
from kallm_bench.reporting import build_tables, to_csv, to_json, to_markdown
from kallm_bench.reporting.check import check
from kallm_bench.reporting.html import to_html
from kallm_bench.reporting.json_text import SCHEMA_FILE

SPEC = {"basis": "cheby2", "degree": 2}
REASON = "out of memory; a | smaller <b>batch</b> needs less"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def standing(bench: Bench) -> list[tuple[str, int, str]]:
    found = standing_failures(bench.store.endings(), bench.store.records())
    return [(each.arm, each.seed, each.reason) for each in found]


def test_an_ending_comes_back_as_it_was(bench: Bench) -> None:
    ending = bench.ending("kan", 1, "train", "né")
    path = bench.store.folder / bench.testbed / "try" / "endings" / f"{ending.id}.json"
    assert Ending.from_json(path.read_text()) == ending
    assert bench.store.endings() == [ending] == bench.store.endings("try", bench.testbed)
    assert bench.store.endings("other") == bench.store.endings(testbed="other") == bench.store.records() == []
    with pytest.raises(RecordError, match="never rewritten"):
        bench.store.write_ending(ending)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"schema": 99}, "schema 99"),
        ({"reason": 5}, "reason is 5"),
        ({"seed": "0"}, "seed is 0"),
        ({"more": 1}, "more"),
        (None, "not the ending of a cell"),
    ],
    ids=str,
)
def test_a_damaged_ending_is_set_aside_by_name(bench: Bench, damage: dict[str, Any] | None, told: str) -> None:
    bench.ending("kan", 0, "train", "it failed")
    path = next(bench.store.folder.rglob("endings/*.json"))
    text = json.dumps(json.loads(path.read_text()) | damage) if damage else "{"
    path.with_name("bad.json").write_text(text)
    for _ in range(2):  # asked again, it is named once
        assert len(bench.store.endings()) == 1
    ((bad, reason),) = bench.store.damaged
    assert (bad.name, told in reason) == ("bad.json", True), reason


def test_a_testbed_that_is_named_keeps_its_failures(bench: Bench) -> None:
    bench.ending("kan", 0, "train", "it failed")
    (bench.store.folder / bench.testbed).rename(bench.store.folder / "desk")
    assert [each.testbed for each in bench.store.endings()] == ["desk"]
    assert [table.title for table in build_tables(bench.store)] == ["try on desk: what failed"]


def test_the_newest_word_of_a_cell_counts(bench: Bench) -> None:
    bench.ending("kan", 0, "train", "first")
    bench.ending("kan", 1, "train", "other seed")
    bench.ending("kan", 0, "eval-bbh", "second")
    assert standing(bench) == [("kan", 1, "other seed"), ("kan", 0, "second")]
    bench.ending("kan", 1, "profile", "")
    assert standing(bench) == [("kan", 0, "second")]


@pytest.mark.parametrize(
    ("failed", "done", "over"),
    [
        ("train", ("train",), True),
        ("train", ("retrofit",), False),
        ("train", ("profile",), False),  # of weights that were not trained
        ("retrofit", ("train",), True),  # where every cell begins, also one without a retrofit
        ("kernels", (), False),
    ],
)
def test_a_record_of_what_had_failed_ends_the_failure(
    bench: Bench, failed: str, done: tuple[str, ...], over: bool
) -> None:
    """A stop came between, so that the cell as a whole did not end again."""
    settings: dict[str, dict[str, Any]] = {
        "retrofit": {"spec": {}},
        "train": {"row_length": 1, "rows_per_step": 1, "learning_rate": 1.0, "scope": "all"},
        "profile": {},
    }
    for stage in settings:
        bench.record(stage, "kan", 0, settings[stage], [])
    bench.ending("kan", 0, failed, "it failed")
    assert standing(bench) == [("kan", 0, "it failed")], "records from before are no success since"
    for stage in done:
        bench.record(stage, "kan", 1, settings[stage], [])
    assert standing(bench) == [("kan", 0, "it failed")], "another seed's success"
    for stage in done:
        bench.record(stage, "kan", 0, settings[stage], [])
    assert standing(bench) == ([] if over else [("kan", 0, "it failed")])


def test_every_format_tells_what_failed_and_why(bench: Bench) -> None:
    bench.arm("kan", 0, SPEC, 2.0, right=8)
    before = [table.rows for table in build_tables(bench.store)]
    bench.ending("kan", 0, "profile", REASON)
    bench.ending("late", 2, "train", "the loss is infinite")
    tables = build_tables(bench.store)
    assert [table.kind for table in tables] == ["arms", "failures"]
    assert [table.rows for table in tables[:1]] == before, "a later failure hides nothing"
    assert tables[0].notes[0] == (
        "Failed when last run: kan, seed 0; late, seed 2. What stands in this table of them is from before."
    )
    text = to_markdown(tables)
    assert "| arm | seed | stage | why it failed |\n| --- | --- | --- | --- |\n| kan | 0 | profile | out of" in text
    assert "| late | 2 | train | the loss is infinite |" in text
    assert "- Run them again: `kallm run try.toml --only kan,late`; what is done is not done again." in text
    rows = [row for row in csv.DictReader(io.StringIO(to_csv(tables))) if row["table"] == "failures"]
    assert [(row["arm"], row["seed"], row["stage"], row["why it failed"]) for row in rows] == [
        ("kan", "0", "profile", REASON),
        ("late", "2", "train", "the loss is infinite"),
    ]
    data = json.loads(to_json(tables))
    jsonschema.validate(data, json.loads(SCHEMA_FILE.read_text()))
    (table,) = [table for table in data["tables"] if table["table"] == "failures"]
    assert [row["words"] for row in table["rows"]][1] == {
        "seed": "2",
        "stage": "train",
        "why it failed": "the loss is infinite",
    }
    page = to_html(tables)
    assert "<caption>try on " in page
    assert "out of memory; a | smaller &lt;b&gt;batch&lt;/b&gt; needs less" in page


@pytest.mark.parametrize("width", [50, 200])
def test_a_terminal_tells_it_in_full(bench: Bench, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.ending("kan", 0, "train", "the loss is infinite after step 12 of 280, and was so before")
    monkeypatch.setattr(console.streams, "out", Console(file=(file := io.StringIO()), width=width))
    (table,) = build_tables(bench.store)
    console.show_tables([dataclasses.replace(table, notes=())])
    shown = " ".join(file.getvalue().split())
    assert "the loss is infinite after step 12 of 280, and was so before" in shown
    assert ("kan, 0, train: " in shown) is (width == 50)


def test_layers_alone_have_no_seed(bench: Bench) -> None:
    bench.ending("576-cheby2", 0, "kernels", "no such kernel")
    (table,) = build_tables(bench.store)
    assert "| 576-cheby2 |  | kernels | no such kernel |" in to_markdown([table])
    assert "Published figures" not in to_markdown([table])
    with pytest.raises(RecordError, match="576-cheby2 has no accuracy; failed in kernels: no such kernel"):
        check("576-cheby2.accuracy > 1", [table])


def test_a_report_of_chosen_records_tells_of_no_other_failures(bench: Bench) -> None:
    bench.arm("kan", 0, SPEC, 2.0, right=8)
    bench.ending("late", 2, "train", "the loss is infinite")
    assert not [t for t in build_tables(bench.store, stands=lambda each: each.arm == "kan") if t.kind == "failures"]
    assert not build_tables(bench.store, suite="other")


def test_a_condition_on_what_failed_says_why_there_is_no_figure(bench: Bench) -> None:
    bench.arm("kan", 0, SPEC, 2.0, right=4)
    bench.ending("kan", 1, "train", "no room")
    bench.ending("late", 0, "train", "the loss is infinite")
    tables = build_tables(bench.store)
    (outcome,) = check("kan.accuracy > 1", tables)
    assert (outcome.holds, outcome.values) == (True, "kan.accuracy = 50 (seed 1 failed when last run)")
    with pytest.raises(RecordError) as refused:
        check("late.accuracy >= kan.accuracy", tables)
    assert str(refused.value) == (
        f"try on {bench.testbed}: late has no accuracy; seed 0 failed in train: the loss is infinite; it has no figures"
    )
    with pytest.raises(RecordError, match="late has no figures: seed 0 failed in train: the loss is infinite"):
        build_tables(bench.store, reference="late")
    with pytest.raises(RecordError, match="Did you mean 'late'"):
        check("lade.accuracy > 1", tables)


def test_an_empty_store_has_no_endings(tmp_path: Path) -> None:
    assert ResultsStore(tmp_path / "none").endings() == []
