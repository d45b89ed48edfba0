"""No answer is lost and none is stale: an evaluation that was killed ends with the same bytes, and so do several
processes; whatever decides an answer is in the key that it is found under."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Launch
from small_questions import QUESTIONS, make_small

from kallm_bench.bbh.decoding import Decoder
from kallm_bench.bbh.evaluate import EvalSettings, ask, prepare
from kallm_bench.bbh.samples import Unfinished
from kallm_bench.engine.questions import stage_of
from kallm_bench.filing import Bench, find_ref
from kallm_bench.models import load_model, load_tokenizer
from kallm_bench.records import ResultsStore

POINTS = 10
"""Moments that one test kills at."""


@dataclass(frozen=True)
class Asking:
    """The command that asks a tiny model these questions."""

    folder: Path

    def command(self, home: Path, protocol: str, *more: str, **settings: Any) -> dict[str, Any]:
        """As launcher.py takes it; run in a folder of its own."""
        home.mkdir(exist_ok=True)
        tasks = ",".join(QUESTIONS)
        words = ["eval-bbh", str(self.folder / "model"), "--protocol", protocol, "--source", str(self.folder / "data")]
        words += ["--tasks", tasks, "--max-new-tokens", "6", *more]
        environment = {"HF_HUB_OFFLINE": "1", "KALLM_CACHE": str(self.folder / "cache")}
        return {"words": words, "folder": str(home), "environment": environment, **settings}

    def ranks(self, home: Path, protocol: str, *more: str, last: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The same as two processes of one run; `last` is for the second."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        commands = [self.command(home, protocol, *more) for _ in range(2)]
        for number, command in enumerate(commands):
            command["environment"] |= address | {"RANK": str(number), "LOCAL_RANK": str(number)}
        commands[-1].update(last or {})
        return commands


@pytest.fixture(scope="session")
def asking(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Asking:
    folder = tmp_path_factory.mktemp("asking")
    make_small(tiny_llama, folder)
    return Asking(folder)


def result(home: Path) -> tuple[bytes, str]:
    """The bytes of the one record's samples, and its figures."""
    (path,) = (home / "results").glob("*/manual/*eval-bbh*.json")
    samples = path.with_suffix("").with_suffix("").parent / f"{path.name.removesuffix('.json')}.samples.jsonl.gz"
    return samples.read_bytes(), json.dumps(json.loads(path.read_text())["metrics"])


PROTOCOLS = ("leaderboard", "fewshot")
"""Choices compared, and replies with the likelihoods of answers beside them, each kept by itself."""


@pytest.fixture(scope="session")
def whole(asking: Asking, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Protocol -> folder of a run that nothing disturbed."""
    homes = {protocol: tmp_path_factory.mktemp("runs") / protocol for protocol in PROTOCOLS}
    for protocol, home in homes.items():
        ((code, _, err),) = launch(asking.command(home, protocol, "--batch-size", "4"))
        assert code == 0, err
    return homes


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_evaluation_that_is_killed_anywhere_ends_with_the_same_bytes(
    asking: Asking, whole: dict[str, Path], launch: Launch, tmp_path: Path, protocol: str, seed: int
) -> None:
    """Killed at random moments, between two answers or amid what it writes, and taken up with another batch size."""
    draw = random.Random(seed)
    moments = int((whole[protocol] / "moments").read_text())
    assert moments > sum(QUESTIONS.values())
    homes = [tmp_path / str(point) for point in range(POINTS)]
    kills = [{"signal_at": [draw.randrange(1, moments), signal.SIGKILL]} for _ in homes]
    killed = launch(
        *(asking.command(home, protocol, "--batch-size", "4", **kill) for home, kill in zip(homes, kills, strict=True))
    )
    assert {code for code, _, _ in killed} == {-signal.SIGKILL}, killed
    sizes = [str(draw.choice([1, 3, 16])) for _ in homes]
    ended = launch(
        *(asking.command(home, protocol, "--batch-size", size) for home, size in zip(homes, sizes, strict=True))
    )
    assert {code for code, _, _ in ended} == {0}, ended
    for home in homes:
        assert result(home) == result(whole[protocol])
        assert not list(home.glob("runs/**/*.jsonl"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_processes_end_with_the_bytes_of_one_also_after_one_was_killed(
    asking: Asking, whole: dict[str, Path], launch: Launch, tmp_path: Path, protocol: str
) -> None:
    """Two in one go; two of which one is killed, then one alone; one that is killed, then two."""
    first, second = launch(*asking.ranks(tmp_path / "two", protocol))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")  # the first one speaks
    kill = {"signal_at": [int((whole[protocol] / "moments").read_text()) // 4, signal.SIGKILL]}
    first, second = launch(*asking.ranks(tmp_path / "left", protocol, last=kill))
    assert second[0] == -signal.SIGKILL
    assert first[0] == 1, first[2]
    assert "another process of this run has ended" in " ".join(first[2].split())
    ((alone, *_),) = launch(asking.command(tmp_path / "right", protocol, **kill))
    assert alone == -signal.SIGKILL
    ((code, _, err),) = launch(asking.command(tmp_path / "left", protocol, "--batch-size", "2"))
    assert code == 0, err
    assert [code for code, *_ in launch(*asking.ranks(tmp_path / "right", protocol))] == [0, 0]
    for name in ("two", "left", "right"):
        assert result(tmp_path / name) == result(whole[protocol]), name
        assert not (tmp_path / name / "runs").exists()


@pytest.mark.long
def test_torchrun_as_a_user_types_it(asking: Asking, whole: dict[str, Path], tmp_path: Path) -> None:
    command = asking.command(tmp_path, "leaderboard")
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kallm_bench.cli"]
    environment = os.environ | command["environment"]
    subprocess.run([*program, *command["words"]], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert result(tmp_path) == result(whole["leaderboard"])


@pytest.mark.parametrize("stopped_after", [1, 6, 13, 20])
def test_a_run_that_goes_on_asks_at_most_one_batch_again(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """Counted where questions go into the model, over the run that is stopped and the one that goes on."""
    model, tokenizer = load_model(str(asking.folder / "model"))
    asked = []
    admit = Decoder.admit
    monkeypatch.setattr(Decoder, "admit", lambda self, new: asked.append(len(new)) or admit(self, new))
    settings = EvalSettings("cot-fewshot", str(asking.folder / "data"), tuple(QUESTIONS), max_new_tokens=6)
    exam, batch_size, checks = prepare(settings), 4, 2 * 2  # a comparison with the model's own logits, of two prompts

    def stop(work: str, done: int, total: int, note: str = "") -> None:
        if done == stopped_after and note:
            raise KeyboardInterrupt

    unfinished = Unfinished(tmp_path / "kept.jsonl")
    with pytest.raises(KeyboardInterrupt):
        ask(model, tokenizer, exam, unfinished, batch_size=batch_size, watch=stop)
    assert len(unfinished.read()) == stopped_after
    assert len(ask(model, tokenizer, exam, unfinished, batch_size=batch_size)) == len(exam.prompts)
    assert len(exam.prompts) <= sum(asked) - checks <= len(exam.prompts) + batch_size


def of_model(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes a JSON file of the model's folder."""

    def changing(folder: Path) -> None:
        path = folder / "model" / name
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content))

    return changing


def of_weights(number: int) -> Callable[[Path], None]:
    """Turns one bit of one value: the smallest step that training could take."""

    def changing(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        at = start + (len(content) - start) * number // 16 // 4 * 4
        content[at] ^= 1
        path.write_bytes(content)

    return changing


def of_file(name: str, old: str, new: str) -> Callable[[Path], None]:
    def changing(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text, name
        path.write_text(text.replace(old, new, 1))

    return changing


def of_order(name: str) -> Callable[[Path], None]:
    def changing(folder: Path) -> None:
        path = folder / "data" / "bbh" / name
        path.write_text(json.dumps({"examples": json.loads(path.read_text())["examples"][::-1]}))

    return changing


MUTATIONS: dict[str, Callable[[Path], None]] = {
    **{f"weight {number}": of_weights(number) for number in range(16)},
    "epsilon": of_model("config.json", lambda c: c.update(rms_norm_eps=2e-6)),
    "rotary base": of_model("config.json", lambda c: c["rope_parameters"].update(rope_theta=20000.0)),
    "context": of_model("config.json", lambda c: c.update(max_position_embeddings=1024)),
    "activation": of_model("config.json", lambda c: c.update(hidden_act="gelu")),
    "heads": of_model("config.json", lambda c: c.update(num_attention_heads=2, num_key_value_heads=1, head_dim=16)),
    "end of a reply": of_model("generation_config.json", lambda c: c.update(eos_token_id=[0, 17])),
    "padding": of_model("generation_config.json", lambda c: c.update(pad_token_id=3)),
    "repetition": of_model("generation_config.json", lambda c: c.update(repetition_penalty=1.5)),
    "a merge": of_model("tokenizer.json", lambda c: c["model"]["merges"].pop()),
    "order of merges": of_model("tokenizer.json", lambda c: c["model"]["merges"].reverse()),
    "number of a token": of_model(
        "tokenizer.json",
        lambda c: c["model"]["vocab"].update(A=c["model"]["vocab"]["B"], B=c["model"]["vocab"]["A"]),
    ),
    "how words are split": of_model("tokenizer.json", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
    "normalised": of_model("tokenizer.json", lambda c: c.update(normalizer={"type": "Lowercase"})),
    "another end": of_model("tokenizer_config.json", lambda c: c.update(eos_token="!")),
    "a beginning": of_model("tokenizer_config.json", lambda c: c.update(bos_token="#")),
    **{f"question of {task}": of_file(f"data/bbh/{task}.json", '"input": "', '"input": "Well, ') for task in QUESTIONS},
    **{f"target of {task}": of_file(f"data/bbh/{task}.json", '"target": "', '"target": "x') for task in QUESTIONS},
    **{f"order of {task}": of_order(f"{task}.json") for task in QUESTIONS},
    **{
        f"worked example of {task}": of_file(f"data/cot-prompts/{task}.txt", "It is so.", "It was so.")
        for task in QUESTIONS
    },
    "description": of_file("data/cot-prompts/navigate.txt", "Given a series", "For a series"),
    "answer of an example": of_file("data/cot-prompts/web_of_lies.txt", "So the answer is ", "So the answer is not "),
}
"""Name -> what is changed on the disk below a folder with `model` and `data`."""

SETTINGS: dict[str, dict[str, Any]] = {
    "protocol": {"protocol": "fewshot"},
    "plain protocol": {"protocol": "zeroshot"},
    "choices": {"protocol": "leaderboard"},
    "no likelihoods": {"protocol": "fewshot", "likelihoods": False},
    "reading": {"reading": "lm-eval"},
    "length": {"max_new_tokens": 7},
    "limit": {"limit": 2},
    "tasks": {"tasks": ("navigate", "web_of_lies")},
    "order of tasks": {"tasks": ("web_of_lies", "object_counting", "navigate")},
    "batch-invariant": {"batch_invariant": True},
    "fresh questions": {"source": "procedural"},
}


def key_at(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any) -> str:
    """The key that the questions in a folder to the model in it are found under, as engine.eval_bbh finds it."""
    asked = {"protocol": "cot-fewshot", "source": str(folder / "data"), "tasks": tuple(QUESTIONS), "max_new_tokens": 6}
    wanted = EvalSettings(**asked | settings)
    ref = find_ref(str(folder / "model"))
    tokenizer = load_tokenizer(ref.open())
    bench = Bench(ResultsStore(folder), "here", folder, torch.device(device), dtype)
    return stage_of(bench, ref, wanted, prepare(wanted, tokenizer), tokenizer).key


def test_whatever_decides_an_answer_decides_the_key(
    asking: Asking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than fifty changes, at the same paths: none finds an answer that was given before it."""
    monkeypatch.setenv("KALLM_BBH_DIR", str(asking.folder / "data"))
    seen = {key_at(asking.folder): "nothing"}
    now = time.time_ns()
    for number, (name, change) in enumerate(MUTATIONS.items(), start=1):
        place = tmp_path / "same"
        shutil.copytree(asking.folder, place, ignore=shutil.ignore_patterns("cache"))
        assert seen.get(key_at(place)) == "nothing", "a copy is the same"
        change(place)
        for path in filter(Path.is_file, place.rglob("*")):
            os.utime(path, ns=(now, now + number))  # as if written one after the other: clocks may be coarse
        key = key_at(place)
        assert key not in seen, f"{name} is taken for {seen[key]}"
        seen[key] = name
        shutil.rmtree(place)
    others = {name: key_at(asking.folder, **settings) for name, settings in SETTINGS.items()}
    others |= {"dtype": key_at(asking.folder, torch.bfloat16), "device": key_at(asking.folder, device="cuda")}
    for name, key in others.items():
        assert key not in seen, f"{name} is taken for {seen[key]}"
        seen[key] = name
    assert len(seen) > 50


def test_a_retrained_checkpoint_at_the_same_path_is_asked_anew(
    asking: Asking, tmp_path: Path, launch: Launch, whole: dict[str, Path]
) -> None:
    """The whole way: the second run finds nothing of the first one, which it would if the key lacked the weights."""
    shutil.copytree(asking.folder, tmp_path / "asked", ignore=shutil.ignore_patterns("cache"))
    here = Asking(tmp_path / "asked")
    for _ in range(2):
        ((code, out, err),) = launch(here.command(tmp_path / "home", "leaderboard", "--json"))
        assert code == 0, err
    of_weights(3)(here.folder)
    ((code, changed, err),) = launch(here.command(tmp_path / "home", "leaderboard", "--json"))
    assert code == 0, err
    first, second = json.loads(out)[0], json.loads(changed)[0]
    assert first["id"] != second["id"]
    assert first["settings"] | {"weights": ""} == second["settings"] | {"weights": ""}
    assert len(list((tmp_path / "home" / "results").glob("*/manual/*eval-bbh*.json"))) == 2
