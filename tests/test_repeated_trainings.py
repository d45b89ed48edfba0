"""A training done again, since what it had left was gone, stays one row; undisturbed runs tell what it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_reporting import ASKED, PLACE, TRAINING, Bench

from kallm_bench.records import Metric
from kallm_bench.records.statistics import median_interval
from kallm_bench.reporting import Table, build_tables

SHARED = "2 other processes compute on the GPU"


class Trainings:
    """Trainings of one arm from equal weights; each leaves weights of its own."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder)

    def trained(self, left: str, speed: float, note: str = "", *, seed: int = 0, key: str = "the same") -> None:
        metrics = [Metric("train_tokens_per_second", speed, note=note), Metric("trained_tokens", 8192)]
        metrics += [Metric("heldout_loss", 2.0 + seed, n=500), Metric("peak_vram_allocated_bytes", 1e3 * speed)]
        about = {"model": {"fingerprint": left}, "data": {"source": "chat"}, "key": f"{key} {seed}"}
        self.bench.record("train", "kan", seed, TRAINING | {"seed": seed, "weights": "base"}, metrics, **about)

    def asked(self, weights: str, right: int, seed: int = 0) -> None:
        samples = [{"task": ASKED["tasks"][n % 2], "index": n // 2, "correct": n < right} for n in range(8)]
        metrics = [Metric("accuracy", right / 8, n=8)]
        data = {"source": "procedural", "fingerprint": "q"}
        settings = ASKED | {"weights": weights}
        self.bench.record("eval-bbh", "kan", seed, settings, metrics, samples=samples, data=data)

    def profiled(self, weights: str, speed: float) -> None:
        settings = {"batch": 4, "weights": weights, **PLACE}
        self.bench.record("profile", "kan", 0, settings, [Metric("decode_tokens_per_second", speed)])

    def table(self) -> Table:
        return build_tables(self.bench.store)[0]


@pytest.fixture
def trainings(tmp_path: Path) -> Trainings:
    return Trainings(tmp_path)


def test_what_was_asked_stands_for_the_same_training_done_again(trainings: Trainings) -> None:
    trainings.trained("first", 10.0)
    trainings.asked("first", 6)
    trainings.trained("second", 20.0)
    trainings.profiled("second", 75.0)
    (row,) = [row for row in trainings.table().rows if row.seeds]
    assert row.figures["accuracy"].value == 6 / 8
    assert row.figures["decode_tokens_per_second"].value == 75.0


def test_another_training_is_another_row(trainings: Trainings) -> None:
    """Its questions are not asked yet, and those of the one before are no longer of this arm."""
    trainings.trained("first", 10.0)
    trainings.asked("first", 6)
    trainings.trained("second", 20.0, key="other")
    trainings.profiled("first", 75.0)
    (row,) = [row for row in trainings.table().rows if row.seeds]
    assert not {"accuracy", "decode_tokens_per_second"} & set(row.figures)


def test_costs_are_of_undisturbed_runs(trainings: Trainings) -> None:
    for seed in (0, 1):
        trainings.trained(f"shared{seed}", 10.0 + seed, SHARED, seed=seed)
        trainings.asked(f"shared{seed}", 6, seed)
    speed = trainings.table().rows[0].figures["train_tokens_per_second"]
    assert (speed.value, speed.interval, speed.mark) == (10.0 + 0.5, None, "§"), "others' share is no spread of seeds"
    trainings.trained("alone", 30.0)
    table = trainings.table()
    figures = table.rows[0].figures
    assert table.rows[0].seeds == 2
    assert figures["heldout_loss"].value == 2.5, "what was learned is of all seeds"
    assert figures["train_tokens_per_second"].value == 30.0
    assert figures["peak_vram_allocated_bytes"].value == 30e3
    assert not any(SHARED in note for note in table.notes)
    assert any("machine to themselves" in note and "seed 0 of kan" in note for note in table.notes)


def test_an_outlier_hardly_widens_the_interval_of_a_median() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 900.0]) == (1.0, 900.0), "of five, the range"
    many = [*range(1, 20), 900]
    assert median_interval([float(value) for value in many]) == (6.0, 15.0)
