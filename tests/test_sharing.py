"""What arms of a suite share: found once, and to the same end, bit for bit, as if each had found it for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_suites import write_texts

from kallm_bench import engine
from kallm_bench.engine import cells, data, starting
from kallm_bench.filing import Bench
from kallm_bench.models import calibration, save_checkpoint
from kallm_bench.records import ResultsStore, RunRecord
from kallm_bench.sharing import Shared
from kallm_bench.suites import find_suite, read_suite

SUITE = """
model = "./base"
stages = ["retrofit"]
[calibration]
data = "./chat-train.jsonl"
heldout = "./chat-heldout.jsonl"
tokens = 8192
heldout_tokens = 256
row_length = 64
[train]
data = "./chat-train.jsonl"
heldout = "./chat-heldout.jsonl"
tokens = 128
row_length = 32
rows_per_step = 2
heldout_rows = 2
"""

ARMS = {
    "linear": 'basis = "linear"\nhidden = 16\nstart = "inherit"',
    "rational": 'basis = "rational"\nform = "glu"\nhidden = 16\nstart = "inherit"',
    "stack": 'basis = "cheby2"\nhidden = 16\nstart = "lstsq"',
    "sequence": 'basis = "cheby2"\nform = "gated"\nhidden = 16\nstart = "lstsq+distill+sequence"\nstart_steps = 4',
    "elsewhere": 'basis = "cheby2"\nhidden = 16\nstart = "distill"\nstart_steps = 4',
}

BLOCKS = {"elsewhere": "3"}

FASTER = "train.learning_rate = 1e-2\n"


class Alone(Shared):
    """Every stage finds everything for itself."""

    def once(self, kind: str, key: Hashable, find: Callable[[], Any], most: int = 4) -> Any:
        return find()


@pytest.fixture
def place(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of four blocks, and texts."""
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    write_texts(tmp_path)
    return tmp_path


def write_suite(folder: Path, arms: Sequence[str] = tuple(ARMS), stages: str = '"retrofit"') -> Path:
    tables = [f'[[arm]]\nname = "{name}"\nblocks = "{BLOCKS.get(name, "2-3")}"\n{ARMS[name]}\n' for name in arms]
    path = folder / "starts.toml"
    path.write_text(SUITE.replace('"retrofit"', stages) + "".join(tables))
    return path


def run(folder: Path, suite: Path, shared: Shared, name: str) -> list[RunRecord]:
    """Every record of a suite that is run in a place of its own."""
    store = ResultsStore(folder / name / "results")
    cpu = torch.device("cpu")
    bench = Bench(store, "here", folder / name / "runs", cpu, torch.float32, shared=shared)
    ran = engine.run_suite(bench, read_suite(suite))
    assert not ran.failures
    return ran.records


def counted(monkeypatch: pytest.MonkeyPatch, *places: tuple[Any, str]) -> Counter[str]:
    """How often functions are called, by name."""
    calls = Counter[str]()

    def counting(room: Any, name: str) -> None:
        does = getattr(room, name)

        def call(*given: Any, **named: Any) -> Any:
            calls[name] += 1
            return does(*given, **named)

        monkeypatch.setattr(room, name, call)

    for room, name in places:
        counting(room, name)
    return calls


def test_what_is_shared_changes_no_bit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = write_suite(place)
    calls = counted(
        monkeypatch, (calibration, "answers"), (data, "load_tokenizer"), (data, "prepare"), (starting, "_loss")
    )
    alone = run(place, suite, Alone(), "alone")
    apart = calls.copy()
    calls.clear()
    shared = run(place, suite, Shared(), "shared")
    batches, sequence = 2 + 1 + 1, 1  # to fit, decide and judge; and one that replacements are fed by each other in
    elsewhere = 2 + 1  # who only distills decides nothing
    passes = batches + sequence + elsewhere
    assert calls == {"load_tokenizer": 1, "prepare": 1, "_loss": 1 + len(ARMS), "answers": passes}
    assert apart["load_tokenizer"] >= 2 * len(ARMS)
    assert apart["prepare"] == len(ARMS)
    assert apart["_loss"] == 2 * len(ARMS)
    assert apart["answers"] == 4 * batches + sequence + elsewhere
    for one, other in zip(alone, shared, strict=True):
        assert (one.arm, one.stage, one.key) == (other.arm, other.stage, other.key)
        assert [each.sha256 for each in one.artifacts] == [each.sha256 for each in other.artifacts]
        figures = [
            {metric.name: (metric.value, metric.samples) for metric in record.metrics if metric.name != "start_seconds"}
            for record in (one, other)
        ]
        assert figures[0] == figures[1]
        folders = [Path(record.artifacts[0].path).parent for record in (one, other)]
        for path in folders[0].rglob("*"):
            if path.suffix in (".json", ".jinja", ".txt") and path.name != "kallm.json":  # that names records
                assert path.read_bytes() == (folders[1] / path.relative_to(folders[0])).read_bytes(), path.name


def test_what_takes_memory_goes_before_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, held = Shared(), []
    train = cells.train_model

    def training(*given: Any, **named: Any) -> RunRecord:
        held.append(starting.SEEN in shared.kinds)
        return train(*given, **named)

    monkeypatch.setattr(cells, "train_model", training)
    records = run(place, write_suite(place, ["linear", "rational"], '"retrofit", "train"'), shared, "trained")
    assert held == [False, False]
    assert [record.stage for record in records] == ["retrofit", "train"] * 2


def test_of_many_things_the_last_ones_stay() -> None:
    shared, found = Shared(), list[int]()

    def find(number: int) -> int:
        def note() -> int:
            found.append(number)
            return number

        return shared.once("number", number, note, most=2)

    assert [find(number) for number in (1, 1, 2, 1, 3, 2, 1)] == [1, 1, 2, 1, 3, 2, 1]
    assert found == [1, 2, 3, 1]
    shared.forget("number")
    shared.forget("number")
    assert find(1) == 1
    assert found[-1] == 1
    assert shared.kinds == {"number"}


def test_arms_with_one_retrofit_make_it_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other arms are filed as what they are: the work of the first one."""
    calls = counted(monkeypatch, (starting, "retrofit_reporting"))
    suite = write_suite(place, ["linear"], '"retrofit", "train"')
    suite.write_text(f'{suite.read_text()}[[arm]]\nname = "faster"\nblocks = "2-3"\n{ARMS["linear"]}\n{FASTER}')
    first, trained, second, faster = run(place, suite, Shared(), "twice")
    assert calls["retrofit_reporting"] == 1
    assert second.reused == first.id
    assert (second.arm, second.artifacts, second.key) == ("faster", first.artifacts, first.key)
    assert trained.value("heldout_loss_before") == faster.value("heldout_loss_before")
    assert trained.value("heldout_loss") != faster.value("heldout_loss")


def test_the_arms_of_lead_are_four_retrofits() -> None:
    """Of two families and two starts, however many ways of training are tried on each."""
    cells_of_lead = read_suite(find_suite("lead"), seeds=[0]).cells
    assert len(cells_of_lead) == 14
    assert len({(cell.spec, cell.match, cell.calibration) for cell in cells_of_lead}) == 4


def test_arms_of_lead_come_in_pairs() -> None:
    """So that a run that is cut off has tried both families alike."""
    arms = read_suite(find_suite("lead")).arms
    assert [arm.replace("linear", "rational") for arm in arms[::2]] == list(arms[1::2])
    assert all(arm.startswith("linear") for arm in arms[::2])
