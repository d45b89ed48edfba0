"""kallm report: formats and where they go, a reference, conditions, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from conftest import Run
from rich.console import Console
from test_reporting import Bench

from kallm_bench import console
from kallm_bench.records import ResultsStore
from kallm_bench.reporting import build_tables, grid


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results of three arms, and of a fourth on another machine, which commands run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    bench = Bench(tmp_path / "results")
    bench.arm("untouched", 0, None, 2.274, right=4)
    bench.arm("linear", 0, {"basis": "linear"}, 2.5, right=1, replaced=1000)
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.391, right=8, replaced=1000)
    other = dataclasses.replace(bench.store.records()[0], id="other", testbed="other", suite="elsewhere")
    bench.store.write(other)
    return tmp_path


def test_every_format_goes_where_it_is_sent(home: Path, kallm: Run) -> None:
    for name in ("r.md", "r.csv", "r.json", "r.html"):
        assert kallm("report", "--out", name)[0] == 0
    assert (home / "r.html").read_text().startswith("<!DOCTYPE html>")
    assert {table["table"] for table in json.loads((home / "r.json").read_text())["tables"]} == {"arms", "differences"}
    code, out, _ = kallm("report", "--json")
    assert (code, out) == (0, (home / "r.json").read_text())
    assert kallm("report", "--format", "md")[1] == (home / "r.md").read_text()
    assert "not distinguishable" not in kallm("report")[1]
    assert "better" in kallm("report")[1]
    assert kallm("report", "--format", "svg", "--out", "pictures")[0] == 0
    assert sorted(path.name.rpartition("-")[2] for path in (home / "pictures").iterdir()) == [
        "costs.svg",
        "losses.svg",
        "tasks.svg",
    ]


def test_the_screen_has_the_published_figures_marked_as_such(home: Path, kallm: Run) -> None:
    out = kallm("report")[1]
    assert out.index("McNemar") < out.index("Published figures, for reference") < out.index("43.8 %")
    assert "Published" not in kallm("report", "--check", "kan.accuracy > 1")[1]


def test_a_reference_is_asked_for_by_name(home: Path, kallm: Run) -> None:
    code, out, _ = kallm("report", "--reference", "untouched", "--format", "md")
    assert code == 0
    assert "| linear | 1 | untouched | not distinguishable |" in out
    assert kallm("report", "--reference", "untoched")[::2] == (
        1,
        "error: no arm 'untoched'. Did you mean 'untouched'?\n",
    )


def test_conditions_decide_the_exit_code(home: Path, kallm: Run) -> None:
    code, out, err = kallm("report", "--check", "kan.accuracy >= linear.accuracy - 1")
    assert (code, out) == (0, "")
    assert "holds: kan.accuracy >= linear.accuracy - 1: try on local-" in err
    assert "kan.accuracy = 100, linear.accuracy = 12.5" in err
    code, out, err = kallm("report", "--check", "kan.heldout_loss < 2", "--check", "kan.accuracy > 99", "--json")
    assert code == 1
    assert json.loads(out)["schema"] == 1
    assert [line.partition(":")[0] for line in err.splitlines()] == ["fails", "holds"]
    code, out, err = kallm("report", "--check", "kann.accuracy > 1")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "Did you mean 'kan'?" in err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--suite", "tri"), 1, "no records of suite 'tri'. Did you mean 'try'?"),
        (("--testbed", "h10"), 1, "no records of testbed 'h10'"),
        (
            ("--suite", "try", "--testbed", "other"),
            1,
            "no records of suite 'try' on testbed 'other'; there are some on: lo",
        ),
        (("--format", "htm"), 1, "no format 'htm'. Did you mean 'html'?"),
        (("--format", "svg"), 2, "name a folder"),
        (("--results", "nowhere"), 1, "no records in nowhere. Make some: kallm run quickstart"),
        (("--format", "html", "--out", "results"), 1, "it is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_in_words(
    home: Path, kallm: Run, words: tuple[str, ...], code: int, told: str
) -> None:
    left, out, err = kallm("report", *words)
    assert (left, out) == (code, "")
    assert told in " ".join(err.replace("│", "").split())


def test_what_is_set_aside_is_named_and_the_rest_reported(home: Path, kallm: Run) -> None:
    (folder,) = home.glob("results/*/try")
    (folder / "cut.json").write_text("{")
    newer = json.loads(next(folder.glob("*.json")).read_text()) | {"schema": 99, "id": "newer"}
    (folder / "newer.json").write_text(json.dumps(newer))
    (folder.parent / "testbed.json").write_text("[")
    code, out, err = kallm("report", "--json")
    assert code == 0
    assert err.count("set aside: ") == 3
    assert "schema 99, this program reads 1; a newer kallm reads it" in err
    assert [Path(each["file"]).name for each in json.loads(out)["set_aside"]] == [
        "testbed.json",
        "cut.json",
        "newer.json",
    ]
    assert kallm("report", "--out", "r.html")[0] == 0
    assert "not the description of a testbed" in (home / "r.html").read_text()


@pytest.mark.parametrize("width", [60, 100, 400])
def test_tables_are_readable_on_any_terminal(home: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.streams, "out", Console(file=(file := io.StringIO()), width=width))
    tables = build_tables(ResultsStore("results"))
    console.show_tables([dataclasses.replace(table, notes=()) for table in tables])
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for row in tables[0].rows:
        assert any(row.name in line and row.what in line for line in lines) or width == 400
    for text in (text for table in tables for line in grid(table) for text in line if text not in ("–", "what")):
        assert any(text in line for line in lines), text
