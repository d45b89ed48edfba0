"""Watching training: the held-out losses on the way, the line that is shown, what records and trackers keep of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import itertools
import json
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from rich.console import Console
from test_training import CHAT, write_chat

from kallm_bench import budget, console
from kallm_bench.budget import Budget, Room, Wanted, foresee, try_run
from kallm_bench.efforts import Effort
from kallm_bench.engine import CellForecast
from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.files import DiskError
from kallm_bench.models import KANSpec, retrofit, save_checkpoint
from kallm_bench.profiling import describe_run, heldout_curve
from kallm_bench.profiling.flops import training_flops
from kallm_bench.progress import nobody
from kallm_bench.records import Metric, ResultsStore, RunRecord
from kallm_bench.training import (
    ALONE,
    DistillationSettings,
    Teacher,
    TrainResult,
    TrainSettings,
    apply_scope,
    check_trackers,
    prepare,
    trackers,
    train,
)

SETTINGS = TrainSettings(tokens=8 * 64, row_length=32, rows_per_step=2, heldout_rows=4, heldout_every=3)


@pytest.fixture(scope="session")
def rows(bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("watched")
    return prepare(write_chat(folder / "chat.jsonl", CHAT * 40), bundled_tokenizer, 32, folder / "cache")


def fresh(tiny_llama: Any) -> Any:
    model = tiny_llama()
    retrofit(model, KANSpec("2-3", "cheby2"))
    return model


# --- held-out losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "tokens", "interval"), [(0, 640, 0), (3, 640, 3), (0.25, 640, 2), (0.01, 640, 1), (1, 640, 1)]
)
def test_steps_between_heldout_losses(every: float, tokens: int, interval: int) -> None:
    settings = TrainSettings(tokens=tokens, row_length=32, rows_per_step=2, heldout_every=every)
    assert (settings.steps, settings.heldout_interval) == (10, interval)


@pytest.mark.parametrize("every", [-1, 1.5, float("nan"), float("inf")])
def test_intervals_that_cannot_be_are_refused(every: float) -> None:
    with pytest.raises(TrainingError, match="heldout_every is a whole number of steps, or a share"):
        TrainSettings(heldout_every=every)


def test_looking_on_changes_nothing(tiny_llama: Any, rows: Any) -> None:
    """With held-out losses on the way, weights, step losses and the end are the same; the curve falls between them."""
    plain, watched = fresh(tiny_llama), fresh(tiny_llama)
    quiet = train(plain, *rows, dataclasses.replace(SETTINGS, heldout_every=0), None)
    result = train(watched, *rows, SETTINGS, None)
    assert result.losses == quiet.losses
    assert (result.heldout_before, result.heldout_after) == (quiet.heldout_before, quiet.heldout_after)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in watched.state_dict().items())
    assert [step for step, _ in result.heldout] == [3, 6]
    assert quiet.heldout == ()
    # after three steps of eight the loss is that of a run that was stopped there
    half = fresh(tiny_llama)

    def stop(work: str, done: int, total: int, note: str = "") -> None:
        if done == 3 and note.startswith("held-out"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half, *rows, SETTINGS, None, watch=stop)
    again = dataclasses.replace(SETTINGS, tokens=0)
    assert train(half, *rows, again, None).heldout_before == result.heldout[0][1]


@pytest.mark.parametrize("stop_at", [(3, "loss"), (3, "held-out"), (3, "last"), (4, "loss")], ids=str)
def test_a_resumed_run_takes_no_heldout_loss_twice(
    tiny_llama: Any, rows: Any, tmp_path: Path, stop_at: tuple[int, str]
) -> None:
    expected = train(fresh(tiny_llama), *rows, SETTINGS, None)
    step, word = stop_at

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        batch, _, batches = note.rpartition(" ")[2].partition("/")
        last = note.startswith("held-out") and batch == batches
        if work == "training" and done == step and (last if word == "last" else note.startswith(word)):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(fresh(tiny_llama), *rows, SETTINGS, tmp_path, batch_rows=1, watch=interrupt)
    logged: list[tuple[int, str]] = []

    def log(step: int, figures: Any) -> None:
        logged.extend((step, name) for name in figures)

    result = train(fresh(tiny_llama), *rows, SETTINGS, tmp_path, batch_rows=1, log=log)
    assert [at for at, _ in result.heldout] == [at for at, _ in expected.heldout]
    torch.testing.assert_close(torch.tensor(result.heldout), torch.tensor(expected.heldout))
    assert len(result.step_seconds) == 8 - step
    assert [at for at, name in logged if name == "loss"] == list(range(step + 1, 9))
    missing = [at for at in (3, 6, 8) if at > step or (at == step and word != "last")]
    assert [at for at, name in logged if name == "heldout_loss"] == missing


def test_steps_in_which_nobody_answers_are_neither_fast_nor_without_loss(
    tiny_llama: Any, rows: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    asked = [[{"role": "user", "content": f"Question {number}, and then another one?"}] for number in range(80)]
    source = write_chat(tmp_path / "mostly-asked.jsonl", [*asked, *CHAT * 5])
    mostly, _ = prepare(source, bundled_tokenizer, 32, tmp_path / "cache", heldout=source)
    settings = dataclasses.replace(SETTINGS, tokens=len(mostly) // 2 * 64, heldout_every=0)
    order = np.random.default_rng(settings.seed).permutation(settings.steps * 2).reshape(-1, 2)
    bears = [mostly.bearing(numbers) > 0 for numbers in order]
    assert not bears[0]
    assert any(bears)
    logged: dict[int, Any] = {}
    result = train(fresh(tiny_llama), mostly, rows[1], settings, None, log=lambda at, told: logged.update({at: told}))
    assert len(result.step_seconds) == sum(bears)
    assert ["tokens_per_second" in logged[step] for step in range(1, settings.steps)] == bears[:-1]
    assert result.losses[0] == result.heldout_before


# --- records and reports ----------------------------------------------------------------------------------------------


def result_of(seconds: tuple[float, ...], steps: int) -> TrainResult:
    first = steps - len(seconds)
    return TrainResult((3.0,) * steps, 4.0, 2.5, 10, 5, ((3, 2.25), (6, 2.75)), first, seconds, 9.0, 2)


@pytest.mark.parametrize(
    ("seconds", "speed", "note"),
    [
        ((9.0, 1.0, 1.0, 1.0, 1.0, 2.0, 0.5, 1.0), 64.0, ""),  # the first compiles
        ((2.0, 2.0, 4.0), 32.0, "of steps 6 to 8 alone, the run was resumed"),
        ((), None, "every step that bore loss was done before the run was resumed"),
    ],
)
def test_speed_is_of_the_steps_that_were_done_here(
    tiny_llama: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], speed: float, note: str
) -> None:
    model = fresh(tiny_llama)

    def figures(*surroundings: str) -> dict[str, Any]:
        found = describe_run(model, rows[0], SETTINGS, result_of(seconds, 8), torch.float32, ALONE, surroundings)
        return {metric.name: metric for metric in found}

    told = figures("others compute", "heat")["train_tokens_per_second"].note
    assert told == "; ".join([*([note] if note else []), "others compute", "heat"])
    metrics = figures()
    assert metrics["train_tokens_per_second"].value == speed
    assert metrics["train_tokens_per_second"].note == note
    assert metrics["train_seconds"].value == 9.0
    assert metrics["train_mfu"].value is None
    assert "CPU" in metrics["train_mfu"].note
    bearing = rows[0].bearing(range(len(rows[0]))) / (len(rows[0]) * 32)
    assert metrics["bearing_share"].value == pytest.approx(bearing)
    flops = training_flops(model, bearing)
    assert metrics["train_flops_per_token"].value == pytest.approx(flops)
    monkeypatch.setattr("kallm_bench.profiling.runs.peak_flops", lambda device, dtype: 1e9)
    if speed:
        assert figures()["train_mfu"].value == pytest.approx(flops * speed / 1e9)


def test_the_curve_holds_both_ends() -> None:
    (curve,) = heldout_curve(SETTINGS, result_of((), 8))
    assert list(curve.samples) == [4.0, 2.25, 2.75, 2.5]
    assert curve.value == 2.25
    assert "after step 3" in curve.note


@pytest.fixture(scope="session")
def start(tiny_llama: Any, bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save_checkpoint(folder / "kan", fresh(tiny_llama), bundled_tokenizer)
    write_chat(folder / "chat.jsonl", CHAT * 40)
    return folder


@pytest.fixture
def home(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(start / "cache"))
    for name in ("kan", "chat.jsonl"):
        Path(name).symlink_to(start / name)
    return tmp_path


WORDS = ("train", "kan", "--data", "chat.jsonl", "--tokens", "512", "--row-length", "32", "--rows-per-step", "2")


def test_a_record_has_speed_memory_and_curve_and_reports_show_them(home: Path, kallm: Run) -> None:
    code, out, err = kallm(*WORDS, "--heldout-every", "0.5", "--json")
    assert code == 0, err
    (record,) = json.loads(out)
    metrics = {metric["name"]: metric for metric in record["metrics"]}
    assert len(metrics["train_tokens_per_second"]["samples"]) == 8
    assert len(metrics["heldout_curve"]["samples"]) == 3
    assert metrics["peak_resident_bytes"]["value"] > 1e8
    assert record["settings"]["heldout_every"] == 0.5
    assert kallm("profile", "kan", "--length", "32", "--batch", "1", "--repeats", "2")[0] == 0
    code, out, _ = kallm("report", "--format", "json")
    figures = [row["figures"] for table in json.loads(out)["tables"] for row in table["rows"]]
    trained = next(each for each in figures if "train_tokens_per_second" in each)
    ten_digits = float(f"{metrics['train_tokens_per_second']['value']:.10g}")
    assert trained["train_tokens_per_second"]["value"] == ten_digits
    profiled = next(each for each in figures if "train_tokens_per_second/profile" in each)
    assert profiled["train_tokens_per_second/profile"]["unit"] == "tokens/s"


def test_few_heldout_rows_are_scored_where_few_are_asked_for(home: Path, kallm: Run) -> None:
    counts = []
    write_chat(home / "own.jsonl", CHAT * 20)
    for rows in ("2", "4"):
        code, out, err = kallm(*WORDS, "--heldout", "own.jsonl", "--heldout-rows", rows, "--json")
        assert code == 0, err
        (record,) = json.loads(out)
        assert record["settings"]["heldout_rows"] == int(rows)
        counts.append({metric["name"]: metric["n"] for metric in record["metrics"]}["heldout_loss"])
    assert 0 < counts[0] < counts[1]


def test_a_setting_that_is_not_used_leaves_the_key_alone(home: Path, kallm: Run) -> None:
    (record,) = json.loads(kallm(*WORDS, "--json")[1])
    assert "heldout_every" not in record["settings"]


# --- what is shown ----------------------------------------------------------------------------------------------------

NOTE = "loss 2.345, held-out 2.312, 12,345 tokens/s, 1.9 GiB"


def test_a_narrow_terminal_is_told_what_matters_most(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for width in range(20, 160, 4):
        err = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr(console.streams, "err", err)
        lines = console.Lines()
        lines.add_task("training", total=281, completed=100, note=NOTE)
        err.print(lines.make_tasks_table(lines.tasks))
        (shown[width],) = err.file.getvalue().splitlines()  # type: ignore[attr-defined]
    words = ("loss 2.345", "left", "held-out 2.312", "12,345 tokens/s", "1.9 GiB", "━")
    least = [min(width for width, line in shown.items() if word in line) for word in words]
    assert least == sorted(least)
    assert len(set(least)) == len(words)
    for width, word in itertools.product(shown, words):
        assert (word in shown[width]) == (width >= least[words.index(word)])
    assert all("training" in line and "100/281" in line for line in shown.values())


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    err, now = Console(file=io.StringIO(), width=200), [0.0]
    monkeypatch.setattr(console.streams, "err", err)
    monkeypatch.setattr(console.display.time, "monotonic", lambda: now[0])
    with console.Display() as display:
        for step in range(1, 101):
            now[0] += 1.0
            display("training", step, 100, NOTE)
    lines = err.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == f"training 1/100, {NOTE}"
    assert lines[1] == f"training 16/100, {NOTE}, about 1:24 left"
    assert lines[-1] == f"training 100/100, {NOTE}"
    assert len(lines) == 8


def test_the_line_has_loss_heldout_loss_speed_and_memory(tiny_llama: Any, rows: Any) -> None:
    notes: list[str] = []
    train(fresh(tiny_llama), *rows, SETTINGS, None, watch=lambda work, done, total, note="": notes.append(note))
    last = notes[-2].split(", ") if "held-out" in notes[-2] else notes[-3].split(", ")
    assert [part.split()[0] for part in last[:2]] == ["loss", "held-out"]
    assert last[2].endswith(" tokens/s")
    assert last[3].endswith(" GiB")


# --- trackers ---------------------------------------------------------------------------------------------------------


def test_trackers_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="pip install wandb"):
        check_trackers(["wandb"])
    with pytest.raises(TrainingError, match="Did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_accelerate_takes_what_its_trackers_are_given(name: str, tmp_path: Path) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    run = trackers._Run("suite-arm-s0", tmp_path, {"learning_rate": 1.0}, 0)
    assert LOGGER_TYPE_TO_CLASS[name](**trackers.TRACKERS[name](run)).name == name


def test_tensorboard_is_told_of_every_step_once(home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = console.Display.__call__

    def stop(self: Any, work: str, done: int, total: int, note: str = "") -> None:
        shown(self, work, done, total, note)
        if work == "training" and done == 5 and note.startswith("loss"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(console.Display, "__call__", stop)
    words = (*WORDS, "--heldout-every", "4", "--track", "tensorboard")
    assert kallm(*words)[0] == 128 + signal.SIGTERM
    monkeypatch.setattr(console.Display, "__call__", shown)
    code, _, err = kallm(*words)
    assert code == 0, err
    (folder,) = (home / "runs" / "tracking").iterdir()
    log = EventAccumulator(str(folder))
    log.Reload()
    steps = {name: [event.step for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    assert steps == {
        **{name: list(range(1, 9)) for name in ("loss", "learning_rate", "tokens_per_second")},
        "heldout_loss": [0, 4, 8],
    }
    (record,) = ResultsStore("results").records()
    losses = next(metric.samples for metric in record.metrics if metric.name == "train_loss")
    assert [event.value for event in log.Scalars("loss")] == pytest.approx(list(losses), rel=1e-6)


def test_a_tracker_that_the_disk_refuses_stops_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hook = threading.excepthook

    def write() -> None:
        with trackers.tracking(["tensorboard"], "run", tmp_path, {}, on_cpu=True) as log:
            for step in range(1000):
                log(step, {"loss": 1.0})

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(DiskError, match=f"cannot write {tmp_path}: the file would be larger than allowed"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == ""
    assert threading.excepthook is hook


@pytest.mark.parametrize("when", ["start", "log"])
def test_a_tracker_that_fails_stops_with_a_line(
    home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(*words: Any, **named: Any) -> None:
        raise RuntimeError("No API key configured.\nMore of it.")

    monkeypatch.setattr(TensorBoardTracker, when, fail)
    code, out, err = kallm(*WORDS, "--track", "tensorboard")
    assert (code, out) == (1, "")
    assert err.endswith("\nerror: --track tensorboard: No API key configured.\n")
    assert "Traceback" not in err


def test_nothing_is_imported_that_was_not_asked_for(home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)  # importing it would fail
    assert kallm(*WORDS)[0] == 0


# --- what it would take -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "told"), [(10**5, True), (10**12, False)])
def test_a_disk_that_may_be_too_small_is_told_before_the_work(
    home: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch, free: int, told: bool
) -> None:
    monkeypatch.setattr(Room, "of", lambda device, folder: Room(2**40, free))
    code, _, err = kallm(*WORDS, "--json")
    assert code == 0
    assert ("the disk has 0.00 GB free" in " ".join(err.split())) == told


def test_a_dry_run_of_training_counts_what_training_does(home: Path, kallm: Run) -> None:
    code, out, err = kallm(*WORDS, "--dry-run", "--json")
    assert code == 0, err
    coming = json.loads(out)
    assert {path.name for path in home.iterdir()} == {"kan", "chat.jsonl"}
    (record,) = json.loads(kallm(*WORDS, "--out", "trained", "--json")[1])
    metrics = {metric["name"]: metric["value"] for metric in record["metrics"]}
    assert (coming["steps"], coming["tokens"]) == (8, metrics["trained_tokens"])
    assert coming["trainable_parameters"] == metrics["trainable_parameters"]
    assert coming["parameters"] == record["model"]["parameters"]
    size = (home / "trained" / "model.safetensors").stat().st_size
    assert coming["checkpoint_bytes"] == pytest.approx(size, rel=0.01)
    assert set(coming["peaks"]) == {name for name in metrics if name.startswith("peak_")}
    assert coming["seconds"] > 0
    code, _, err = kallm(*WORDS[:4], "--tokens", "999999", "--row-length", "32", "--dry-run")
    assert (code, "take at most" in err) == (1, True)


def test_a_trial_has_the_teacher_that_training_would_have(
    home: Path, kallm: Run, tiny_llama: Any, bundled_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(home / "base", tiny_llama(), bundled_tokenizer)
    given = []
    own = budget.train
    monkeypatch.setattr(budget, "train", lambda *a, **named: [given.append(named["teaching"]), own(*a, **named)][1])
    assert kallm(*WORDS, "--dry-run", "--json")[0] == 0
    assert not any(given)
    code, _, err = kallm(*WORDS, "--distill", "0.5", "--base", "base", "--dry-run", "--json")
    assert code == 0, err
    assert given[-1].func is Teacher
    assert given[-1].keywords["settings"] == DistillationSettings(0.5)


def test_what_it_would_take_is_shown_with_whether_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.streams, "out", Console(width=250))
    monkeypatch.setattr(console.streams, "err", Console(width=250, stderr=True))
    coming = Budget(10, 640, 10**9, 10**6, 75.0, {"peak_resident_bytes": 3 * 2**30}, "measured", rows_at_once=4)
    assert coming.disk_bytes == 4 * 10**9 + 12 * 10**6
    console.show_training(coming, Room(2 * 2**30, 2**40), as_json=False)
    shown = capsys.readouterr()
    assert "about 1:15" in shown.out
    assert "memory: 3.00 GiB of 2.00 GiB: does not fit" in shown.err
    assert "disk: 3.74 GiB of 1024.00 GiB: fits" in shown.err
    efforts = {"train": Effort(75.0, 3 * 2**30, "measured"), "chat eval-bbh": Effort(30.0, 2**40, "an estimate")}
    cells = [
        CellForecast("kan", "0", "cheby2", parameters=10**9, budget=coming, efforts=efforts),
        CellForecast("bad", "0", "linear", trouble="why"),
        CellForecast("bad", "1", "linear", trouble="why"),
    ]
    console.show_cells(cells, Room(2**40, 2**30), as_json=False)
    shown = capsys.readouterr()
    assert "1.00M" in shown.out
    assert "measured; an estimate" in shown.out
    assert "About 1:45 in all: training 1:15, questions 0:30." in shown.out
    assert "memory: 1024.00 GiB of 1024.00 GiB: fits" in shown.err
    assert "disk: 3.74 GiB of 1.00 GiB: does not fit" in shown.err
    assert shown.err.count("would be refused: arm 'bad': why") == 1
    assert "profile" not in shown.out  # no cell has any


@pytest.mark.parametrize("width", [50, 90, 500])
def test_a_table_of_many_arms_is_readable_on_any_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.streams, "out", Console(file=(file := io.StringIO()), width=width))
    coming = Budget(10, 640, 10**9, 10**6, 7500.0, {}, "measured", rows_at_once=4)
    efforts = {"train": Effort(7500.0, None, "measured")}
    cells = [CellForecast(f"arm-{n}", str(n), "cheby2", budget=coming, efforts=efforts) for n in range(12)]
    console.show_cells(cells, Room(2**40, 2**40), as_json=False)
    shown = file.getvalue()
    assert all(f" {cell.arm} " in shown for cell in cells)
    assert shown.count(" 2 h ") == 24  # of training, and of the cell
    assert max(map(len, shown.splitlines())) <= width


@pytest.mark.parametrize("rank", [2, 8])
def test_what_adapters_would_learn_is_foreseen(tiny_llama: Any, tmp_path: Path, rank: int) -> None:
    settings = TrainSettings(tokens=256, row_length=32, rows_per_step=2, scope="lora", lora_rank=rank)
    model = tiny_llama()
    wanted = Wanted("s", "a", model.config, None, settings, torch.device("cpu"), torch.float32, 2)
    assert foresee(wanted, []).trainable_parameters == sum(
        each.numel() for each in apply_scope(model, "lora", lora=settings.lora)
    )


def test_trying_moves_no_weight(tiny_llama: Any, rows: Any) -> None:
    model = fresh(tiny_llama)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ways = {"autocast": None, "batch_rows": 1}
    settings = TrainSettings(tokens=5 * 8 * 32, row_length=32, rows_per_step=8, heldout_rows=4)
    coming = try_run(model, *rows, settings, ways, nobody)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)
    assert coming.cache_bytes == (5 * 8 + len(rows[1])) * 32 * 32 * 4


def test_time_is_that_of_every_step_and_every_look() -> None:
    settings = TrainSettings(tokens=10 * 64, row_length=32, rows_per_step=2, heldout_every=4)
    speed = budget._Speed(step=2.0, batch=0.5, once=3.0)
    state = int(budget.DISK_BYTES_PER_SECOND)
    assert budget._seconds(settings, speed, 6, state) == 3 + 10 * 2 + (1 + 2 + 1) * 6 * 0.5 + 1
    assert budget._seconds(TrainSettings(tokens=0), speed, 6, 0) == 3 + 6 * 0.5


def test_a_suite_is_foreseen_from_records_of_this_machine(home: Path, kallm: Run) -> None:
    (home / "s.toml").write_text(
        'model = "kan"\nstages = ["train"]\n[train]\ndata = "chat.jsonl"\ntokens = 512\nrow_length = 32\n'
        'rows_per_step = 2\n[[arm]]\nname = "same"\n[[arm]]\nname = "longer"\ntrain.tokens = 5120\n'
        '[[arm]]\nname = "wrong"\ntrain.scope = "tial"\n'
    )
    words = ("run", "s.toml", "--dry-run", "--json")
    code, out, err = kallm(*words)
    assert code == 1, err  # for one of them
    first = {cell["arm"]: cell for cell in json.loads(out)}
    assert first["same"]["budget"]["source"].startswith("an estimate")
    assert "Did you mean 'tail'" in first["wrong"]["trouble"]
    assert not (home / "results").exists()
    (record,) = json.loads(kallm(*WORDS, "--json")[1])
    metrics = {metric["name"]: metric["value"] for metric in record["metrics"]}
    cells = {cell["arm"]: cell["budget"] for cell in json.loads(kallm(*words)[1])}
    assert cells["same"]["source"] == f"by {record['arm']} of manual"
    assert cells["same"]["peaks"]["peak_resident_bytes"] == pytest.approx(metrics["peak_resident_bytes"])
    assert cells["same"]["trainable_parameters"] == metrics["trainable_parameters"]
    steps = (cells["longer"]["seconds"] - cells["same"]["seconds"]) * metrics["train_tokens_per_second"]
    assert steps == pytest.approx(5120 - 512, rel=0.02)


def test_the_nearest_record_is_taken(tiny_llama: Any) -> None:
    parameters = sum(each.numel() for each in tiny_llama(vocab_size=97).parameters())

    def record(arm: str, started: str, size: int = parameters, **settings: Any) -> RunRecord:
        figures = (Metric("train_tokens_per_second", 100.0), Metric("train_flops_per_token", 1e6),
                   Metric("peak_resident_bytes", 1e9))  # fmt: skip
        place = {"device": "cpu", "dtype": "float32", "row_length": 1024, "rows_per_step": 32, "scope": "all"}
        return RunRecord(
            id=arm, stage="train", suite="s", arm=arm, seed=0, testbed="t", started=started, seconds=1.0, parents=(),
            settings=place | settings, key="", model={"parameters": size, "trainable_parameters": 1}, data={},
            metrics=figures, environment={},
        )  # fmt: skip

    settings, cpu = TrainSettings(scope="all"), torch.device("cpu")
    wanted = Wanted("s", "mine", tiny_llama(vocab_size=97).config, None, settings, cpu, torch.float32, 4)
    known = [record("mine", "1", row_length=32), record("like", "2"), record("new", "3", rows_per_step=1)]
    known += [record("gpu", "4", device="cuda"), record("large", "5", size=9 * parameters)]
    for taken in ("mine", "like", "new"):
        assert foresee(wanted, known).source == f"by {taken} of s"
        known = [each for each in known if each.arm != taken]
    assert foresee(wanted, known).source.startswith("an estimate")
