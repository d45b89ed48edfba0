"""A training run says whether it read what its frozen blocks give; speeds of runs that differ in it make no ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_reporting import PLACE, TRAINING, Bench
from test_training import CHAT, write_chat

from kallm_bench.models import KANSpec, retrofit
from kallm_bench.profiling import describe_run
from kallm_bench.records import Metric
from kallm_bench.reporting import Figure, Row, build_tables
from kallm_bench.training import TrainSettings, prepare, train
from kallm_bench.training.processes import ALONE

SETTINGS = TrainSettings(tokens=4 * 64, row_length=32, rows_per_step=2, scope="tail", heldout_rows=2)


def test_a_run_says_what_it_read(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path) -> None:
    """Without a cache nothing, the first run with one nothing yet, the second all, one with longer data its part."""
    rows, kept = prepare(write_chat(tmp_path / "chat.jsonl", CHAT * 40), bundled_tokenizer, 32, tmp_path / "rows")

    def told(cache: Path | None, settings: TrainSettings = SETTINGS) -> Metric:
        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        result = train(model, rows, kept, settings, None, cache=cache)
        metrics = describe_run(model, rows, settings, result, torch.float32, ALONE)
        return next(metric for metric in metrics if metric.name == "prefix_cache_share")

    plain = told(None)
    assert plain.value is None
    assert "--prefix-cache" in plain.note
    assert [told(tmp_path / "cache").value for _ in range(2)] == [0.0, 1.0]
    longer = told(tmp_path / "cache", TrainSettings(**{**vars(SETTINGS), "tokens": 8 * 64}))
    assert longer.n == 16
    assert longer.value is not None
    assert 0 < longer.value < 1


# --- what a report makes of it ----------------------------------------------------------------------------------------


class Runs:
    """Training runs alone: of each its speed, and what it read, which is None without a cache. Old ones do not say."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)

    def run(self, arm: str, seed: int, speed: float, *share: float | None, note: str = "") -> None:
        spec = {"basis": "linear" if arm == "linear" else "cheby2", "degree": 2, "hidden": None, "form": "stack"}
        spec |= {"constant": "bias", "blocks": [1], "seed": seed}
        made = f"{arm}{seed}"
        self.bench.record("retrofit", arm, seed, {"spec": spec, "weights": "base"}, [], model={"fingerprint": made})
        metrics = [Metric("train_tokens_per_second", speed, note=note), Metric("trained_tokens", 8192)]
        metrics += [Metric("prefix_cache_share", each) for each in share]
        settings = TRAINING | {"seed": seed, "weights": made, **PLACE}
        parents = (f"r{self.bench.count:04d}",)
        self.bench.record("train", arm, seed, settings, metrics, model={"fingerprint": f"t{made}"}, parents=parents)

    def told(self) -> tuple[Row, str, str]:
        """The row of differences, and the notes of both tables."""
        tables = {table.kind: table for table in build_tables(self.bench.store, reference="linear")}
        (row,) = tables["differences"].rows or (Row("kan"),)
        return row, "\n".join(tables["arms"].notes), "\n".join(tables["differences"].notes)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


ALIKE = [((), ()), ((None,), (None,)), ((0.0,), (0.0,)), ((1.0,), (1.0,)), ((0.31,), (0.312,))]
UNLIKE = [((), (1.0,)), ((None,), ()), ((None,), (0.0,)), ((0.0,), (1.0,)), ((0.5,), (1.0,))]


@pytest.mark.parametrize(("mine", "theirs"), ALIKE + UNLIKE, ids=str)
def test_only_like_runs_make_a_ratio(runs: Runs, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for seed in range(2):
        runs.run("linear", seed, 600.0 + seed, *theirs)
        runs.run("kan", seed, 300.0 + seed, *mine)
    runs.bench.record("profile", "linear", 0, PLACE | {"weights": "tlinear0"}, [Metric("parameters", 10)])
    runs.bench.record("profile", "kan", 0, PLACE | {"weights": "tkan0"}, [Metric("parameters", 10)])
    row, _, notes = runs.told()
    like = (mine, theirs) in ALIKE
    assert ("train_to_reference" in row.figures) == like
    assert ("No ratio of training runs' speeds of 'kan' and 'linear'" in notes) != like
    assert ("was not noted of 'kan' and 'linear'" in notes) == (mine == theirs == ())


def test_the_seed_that_fills_the_cache_is_left_out_of_the_ratio(runs: Runs) -> None:
    """As a suite goes: the first run of all computes and keeps, all later ones read."""
    for seed in range(3):
        runs.run("linear", seed, 600.0 if seed else 250.0, 1.0 if seed else 0.0)
        runs.run("kan", seed, 660.0, 1.0)
    row, arms, notes = runs.told()
    assert row.figures["train_to_reference"].value == pytest.approx(1.1)
    assert "× training speed by some of the seeds, others being unlike: 'kan' and 'linear'." in notes
    assert "computed and kept on disk in linear (seed 0); read from the disk in kan, linear (seed 1, 2)." in arms


def test_speeds_of_a_shared_machine_are_marked_and_make_no_ratio(runs: Runs) -> None:
    """Where one of two arms had the machine to itself, too; once both had, all is as ever."""

    def speed_of(arm: str) -> Figure:
        (table,) = [table for table in build_tables(runs.bench.store) if table.kind == "arms"]
        return next(row for row in table.rows if row.name == arm).figures["train_tokens_per_second"]

    runs.run("linear", 0, 200.0, 1.0, note="6 other processes compute on the GPU; spread 5%")
    runs.run("kan", 0, 660.0, 1.0)
    for arm in ("linear", "kan"):
        runs.bench.record("profile", arm, 0, PLACE | {"weights": f"t{arm}0"}, [Metric("parameters", 10)])
    assert (speed_of("linear").mark, speed_of("kan").mark) == ("§", "")
    row, arms, notes = runs.told()
    assert "train_to_reference" not in row.figures
    assert "where other processes computed on the machine meanwhile: 'kan' and 'linear'." in notes
    assert "§ Other processes" in arms
    runs.run("linear", 0, 600.0, 1.0)
    row, arms, notes = runs.told()
    assert row.figures["train_to_reference"].value == pytest.approx(1.1)
    assert "§" not in arms
    assert "other processes" not in notes


def test_where_no_run_had_a_cache_nothing_is_said_of_it(runs: Runs) -> None:
    runs.run("linear", 0, 600.0, None)
    runs.run("kan", 0, 300.0, None)
    assert not any("frozen" in notes for notes in runs.told()[1:])
