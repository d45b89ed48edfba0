"""Nothing is lost: a run that was killed, stopped or refused by the disk ends with the same bits; so do several
processes, up to rounding."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Launch
from safetensors.numpy import load_file

from kallm_bench.models import KANSpec, retrofit, save_checkpoint

STEPS = 6


@dataclass(frozen=True)
class Training:
    """One training command, and what it needs."""

    words: tuple[str, ...]
    environment: dict[str, str]

    def command(self, folder: Path, *more: str, **settings: Any) -> dict[str, Any]:
        """As launcher.py takes it; run in a folder of its own."""
        folder.mkdir(exist_ok=True)
        return {"words": [*self.words, *more], "folder": str(folder), "environment": self.environment, **settings}

    def ranks(self, folder: Path, *more: str, count: int = 2, last: dict[str, Any] | None = None) -> list[Any]:
        """The same as `count` processes of one run; `last` is for the last of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        commands = [self.command(folder, *more) for _ in range(count)]
        for number, command in enumerate(commands):
            own = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
            command["environment"] = self.environment | own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands[-1].update(last or {})
        return commands


@pytest.fixture(scope="session")
def training(tiny_llama: Any, bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Training of a tiny retrofitted model, for six steps, each of which is saved."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_llama()
    save_checkpoint(folder / "base", model, bundled_tokenizer)
    retrofit(model, KANSpec("2-3", "cheby2"))
    save_checkpoint(folder / "start", model, bundled_tokenizer)
    turns = [("user", "Count to {0}"), ("assistant", "One to {0}. " * 8)]
    lines = [{"messages": [{"role": role, "content": text.format(n)} for role, text in turns]} for n in range(200)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("train", str(folder / "start"), "--data", str(folder / "chat.jsonl"), "--tokens", str(STEPS * 4 * 32),
             "--row-length", "32", "--rows-per-step", "4", "--batch-size", "2", "--out", "trained")  # fmt: skip
    return Training(words, {"KALLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"})


def weights(folder: Path) -> bytes:
    return (folder / "trained" / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    """Those of the steps, and the held-out loss at the end, as the one record has them."""
    (path,) = (folder / "results").glob("*/manual/*.json")
    metrics = {metric["name"]: metric for metric in json.loads(path.read_text())["metrics"]}
    return [*metrics["train_loss"]["samples"], metrics["heldout_loss"]["value"]]


def states(folder: Path) -> dict[str, bytes]:
    """What is saved of an unfinished run."""
    return {str(path): path.read_bytes() for path in (folder / "runs" / "unfinished").rglob("state.*")}


@pytest.fixture(scope="session")
def whole(training: Training, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ((code, _, err),) = launch(training.command(folder))
    assert code == 0, err
    assert len(losses(folder)) == STEPS + 1
    return folder


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 60))])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bits(
    training: Training, whole: Path, launch: Launch, tmp_path: Path, seed: int
) -> None:
    """Killed at one random moment, and at another while it goes on: between two steps, or amid what it writes."""
    draw = random.Random(seed)
    moments = int((whole / "moments").read_text())
    assert moments > 100
    for _ in range(2):
        at = draw.randrange(1, moments)
        ((code, _, err),) = launch(training.command(tmp_path, signal_at=[at, signal.SIGKILL]))
        assert code in (-signal.SIGKILL, 0), err  # on its second way it may have fewer moments left
    ((code, _, err),) = launch(training.command(tmp_path))
    assert code == 0, err
    assert weights(tmp_path) == weights(whole)
    assert losses(tmp_path) == losses(whole)
    assert not (tmp_path / "runs" / "unfinished").exists() or not states(tmp_path)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_a_distilled_run_that_is_killed_anywhere_ends_with_the_same_bits(
    training: Training, whole: Path, launch: Launch, tmp_path: Path, seed: int
) -> None:
    draw, words = random.Random(seed), ("--distill", "0.5", "--base", str(Path(training.words[1]).parent / "base"))
    ((code, _, err),) = launch(training.command(tmp_path / "distilled", *words))
    assert code == 0, err
    assert weights(tmp_path / "distilled") != weights(whole)
    at = draw.randrange(1, int((tmp_path / "distilled" / "moments").read_text()))
    killed = training.command(tmp_path / "killed", *words, signal_at=[at, signal.SIGKILL])
    assert launch(killed)[0][0] == -signal.SIGKILL
    ((code, _, err),) = launch(training.command(tmp_path / "killed", *words))
    assert code == 0, err
    assert weights(tmp_path / "killed") == weights(tmp_path / "distilled")
    assert losses(tmp_path / "killed") == losses(tmp_path / "distilled")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_stopped_run_is_saved_and_taken_up_unless_told_otherwise(
    training: Training, whole: Path, launch: Launch, tmp_path: Path, number: int
) -> None:
    ((code, _, err),) = launch(training.command(tmp_path, signal_after=[2, number]))
    assert code == 128 + number
    assert f"Stopped: training stands at step 2 of {STEPS}" in err
    ((code, _, err),) = launch(training.command(tmp_path, signal_after=[1, number]))
    assert code == 128 + number
    assert f"goes on from step 2 of {STEPS}, saved in runs/unfinished" in err
    ((code, _, err),) = launch(training.command(tmp_path, "--no-resume"))
    assert code == 0, err
    assert "goes on from" not in err
    assert f"training 1/{STEPS}" in err
    assert weights(tmp_path) == weights(whole)


def test_a_full_disk_stops_with_a_line_and_the_last_state_intact(
    training: Training, whole: Path, launch: Launch, tmp_path: Path
) -> None:
    launch(training.command(tmp_path, signal_after=[3, signal.SIGTERM]))
    before = states(tmp_path)
    assert len(before) == 2
    ((code, _, err),) = launch(training.command(tmp_path, largest_file=10_000))
    assert code == 1
    assert "error: cannot write" in err.replace("\n", " ")
    assert "Traceback" not in err
    assert states(tmp_path) == before
    ((code, _, err),) = launch(training.command(tmp_path))
    assert code == 0, err
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["copies", "split"])
def test_two_processes_have_the_loss_curve_of_one(
    training: Training, whole: Path, launch: Launch, tmp_path: Path, more: tuple[str, ...]
) -> None:
    first, second = launch(*training.ranks(tmp_path, *more))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")  # the first one speaks
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    ours, theirs = (load_file(folder / "trained" / "model.safetensors") for folder in (tmp_path, whole))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2,), (1,)),
        ((1,), (2, "--shard")),
        pytest.param((1,), (2,), marks=pytest.mark.long),
        pytest.param((2, "--shard"), (2,), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_goes_on_with_another_number_of_processes(
    training: Training, whole: Path, launch: Launch, tmp_path: Path, before: tuple[Any, ...], after: tuple[Any, ...]
) -> None:
    """A signal to one process stops all, after the same step."""
    at = {"signal_after": [3, signal.SIGTERM]}
    codes = [code for code, _, _ in launch(*training.ranks(tmp_path, *before[1:], count=before[0], last=at))]
    assert codes == [128 + signal.SIGTERM] * before[0]
    assert len(states(tmp_path)) == 2
    answers = launch(*training.ranks(tmp_path, *after[1:], count=after[0]))
    assert [code for code, _, _ in answers] == [0] * after[0], answers
    done = 4 if "--shard" in before else 3  # with split weights a step is left by all or by none
    assert f"goes on from step {done} of {STEPS}" in answers[0][2]
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("more", [(), pytest.param(("--shard",), marks=pytest.mark.long)], ids=["copies", "split"])
def test_a_killed_process_does_not_hang_the_other(
    training: Training, launch: Launch, tmp_path: Path, more: tuple[str, ...]
) -> None:
    last = {"signal_after": [3, signal.SIGKILL]}
    (first, second) = launch(*training.ranks(tmp_path, *more, last=last))
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1, first[2]
    assert "another process of this run has ended" in " ".join(first[2].split())
    assert "Traceback" not in first[2]


def test_what_the_first_process_refuses_is_said_once(training: Training, launch: Launch, tmp_path: Path) -> None:
    first, second = launch(*training.ranks(tmp_path, "--data", "gone.jsonl"))
    assert (first[0], second[0]) == (1, 1)
    assert "no data file 'gone.jsonl'" in first[2]
    assert second[1:] == ("", "")


def test_split_weights_need_several_processes(training: Training, launch: Launch, tmp_path: Path) -> None:
    ((code, _, err),) = launch(training.command(tmp_path, "--shard"))
    assert code == 1
    assert "start them by torchrun" in " ".join(err.split())


@pytest.mark.long
def test_torchrun_as_a_user_types_it(training: Training, whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kallm_bench.cli"]
    environment = os.environ | training.environment
    subprocess.run([*command, *training.words], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
