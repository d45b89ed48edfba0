"""What training is foreseen to take, against records of an H100 that predicted nothing, and by trying."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import CHAT, write_chat

from kallm_bench import budget
from kallm_bench.budget import Wanted, foresee, try_run
from kallm_bench.engine.cells import config_of, spec_of
from kallm_bench.filing import find_ref
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.progress import nobody
from kallm_bench.records import Metric, ResultsStore, RunRecord
from kallm_bench.suites import find_suite, read_suite
from kallm_bench.teaching import Taught
from kallm_bench.training import Forward, TrainSettings, apply_scope, prepare

RESULTS = Path(__file__).parent.parent / "results"

H100_PRODUCT_RATE = 670e12
"""FLOP/s of 16,384 × 4,096 by 4,096 in bfloat16, of `results/h100/kernels`."""


@pytest.fixture(scope="module")
def h100() -> list[RunRecord]:
    """What trained in the runs that the estimates were fitted to; later ones had other company on the GPU."""
    trained = [each for each in ResultsStore(RESULTS).records("osre25", "h100") if each.value("train_seconds")]
    return [each for each in trained if each.started < "2026-11-23T11:30"]


@pytest.fixture
def on_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "product_rate", lambda device, dtype: H100_PRODUCT_RATE)


def wanted(suite: str, arm: str, **others: Any) -> Wanted:
    """An arm's training as a run on a GPU would want it."""
    (cell,) = read_suite(find_suite(suite), only=[arm], seeds=[0], device="cuda").cells
    ref = find_ref(cell.model)
    config = config_of(cell, ref)
    taught = Taught(cell.curriculum, cell.distillation)
    given = {"settings": cell.train, "rows_at_once": 32, "fast": True, "taught": taught} | others
    device = torch.device("cuda")
    return Wanted(suite, arm, config, spec_of(cell, ref, config), device=device, dtype=torch.bfloat16, **given)


ARMS = ["finetune", "drop", "linear", "linear-matched", "kan", "linear-published", "kan-published", "kan-warm"]


@pytest.mark.parametrize("arm", ARMS)
def test_memory_of_a_gpu_is_known_roughly_without_a_record(arm: str, h100: list[RunRecord], on_h100: None) -> None:
    true = next(each for each in h100 if each.arm == arm)
    coming = foresee(wanted("osre25", arm), [])
    assert coming.source == "an estimate"
    assert set(coming.peaks) == {"peak_vram_allocated_bytes", "peak_vram_reserved_bytes"}
    for name, value in coming.peaks.items():
        assert value == pytest.approx(true.value(name), rel=0.3)


def test_speed_of_a_gpu_is_known_roughly_without_a_record(on_h100: None) -> None:
    profiles = (each for each in ResultsStore(RESULTS).records("training", "h100") if each.stage == "profile")
    true = next(each for each in profiles if each.arm == "linear")
    tokens = [TrainSettings(tokens=n * 32 * 1024, scope="tail", tail_from=25) for n in (100, 1100)]
    few, many = (foresee(wanted("osre25", "linear", settings=each), []).seconds for each in tokens)
    assert 1000 * 32 * 1024 / (many - few) == pytest.approx(true.value("train_tokens_per_second"), rel=0.2)
    assert few > budget.USUAL_COMPILING_SECONDS


@pytest.mark.parametrize("arm", ARMS[:-1])  # the last one's records were made in two ways
def test_a_seed_tells_what_the_next_one_takes(arm: str, h100: list[RunRecord]) -> None:
    known = [each for each in h100 if each.seed == 0]
    others = [each for each in h100 if each.arm == arm and each.seed]
    coming = foresee(wanted("osre25", arm), known)
    assert others
    for record in others:
        assert coming.seconds == pytest.approx(record.value("train_seconds"), rel=0.2)
        for name, value in coming.peaks.items():
            assert value == pytest.approx(record.value(name), rel=0.2)


def trained(model: Any, settings: dict[str, Any], arm: str = "a", **figures: float) -> RunRecord:
    """A record of training a model on a CPU."""
    figures = {"train_tokens_per_second": 64.0, "train_flops_per_token": 1e9, "train_seconds": 1.0} | figures
    return RunRecord(
        id="r", stage="train", suite="s", arm=arm, seed=0, testbed="t", started="", seconds=1.0, parents=(),
        settings={"device": "cpu", "dtype": "float32"} | settings, key="", data={}, environment={},
        model={"parameters": sum(each.numel() for each in model.parameters()), "trainable_parameters": 1000},
        metrics=tuple(Metric(name, value) for name, value in figures.items()),
    )  # fmt: skip


def test_what_comes_once_does_not_grow_with_the_tokens(tiny_llama: Any) -> None:
    settings = TrainSettings(tokens=10 * 64, row_length=32, rows_per_step=2, scope="all", heldout_rows=1)
    model = tiny_llama(vocab_size=97)

    def record(seconds: float) -> RunRecord:
        return trained(model, settings.described(), train_seconds=seconds)

    asked = Wanted("s", "a", model.config, None, settings, torch.device("cpu"), torch.float32, 2)
    assert foresee(asked, [record(40.0)]).seconds - foresee(asked, [record(10.0)]).seconds == pytest.approx(
        30, rel=0.01
    )
    assert foresee(asked, [record(1.0)]).seconds == foresee(asked, [record(9.0)]).seconds


@pytest.fixture(scope="module")
def rows(bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("foreseen")
    return prepare(write_chat(folder / "chat.jsonl", CHAT * 40), bundled_tokenizer, 32, folder / "cache")


def retrofitted(tiny_llama: Any) -> Any:
    model = tiny_llama(vocab_size=49152)
    retrofit(model, KANSpec("last:1", "cheby2", hidden=8))
    return model


def test_a_trial_reads_what_is_kept_whole_and_leaves_the_rest_alone(
    tiny_llama: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, heldout = rows
    settings = TrainSettings(tokens=4 * 2 * 32, row_length=32, rows_per_step=2, heldout_rows=4)
    ways = {"autocast": None, "batch_rows": 2, "cache": tmp_path}
    given = []
    own = budget.train
    monkeypatch.setattr(budget, "train", lambda *a, **named: [given.append(named["cache"]), own(*a, **named)][1])
    for filled, cache in ((0, None), (7, None), (8, tmp_path)):
        model = retrofitted(tiny_llama)
        apply_scope(model, "tail")
        if filled:
            with Forward(model) as forward:
                forward.keep(tmp_path, {train: 8, heldout: 4})
                for which, count in ((train, filled), (heldout, min(4, len(heldout)))):
                    forward.fill(forward.batch(which, list(range(count))))
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        try_run(model, train, heldout, settings, ways, nobody)
        assert given.pop() == cache
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
