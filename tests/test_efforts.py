"""What stages beside training are foreseen to take, against records that foresaw nothing, and in a suite."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from test_training import CHAT, write_chat
from tiny_suite import TRAINED

from kallm_bench.budget import ESTIMATE, USUAL_EFFICIENCY
from kallm_bench.efforts import FORMULAS, Speed, Work, foresee_stage
from kallm_bench.models import save_checkpoint
from kallm_bench.profiling.products import product_rate
from kallm_bench.records import ResultsStore, RunRecord

RESULTS = Path(__file__).parent.parent / "results"

SPEEDS = {
    "h100": Speed("cuda", USUAL_EFFICIENCY["cuda"] * 670e12),
    "two-cores": Speed("cpu", USUAL_EFFICIENCY["cpu"] * 400e9),
}
"""Of large products in bfloat16 and in float32, as measured on these machines."""


def records(testbed: str, stage: str) -> list[RunRecord]:
    """Those of work that was done for them, and not beside other work on one GPU."""
    found = [each for each in ResultsStore(RESULTS).records(testbed=testbed) if each.stage == stage and not each.reused]
    return [each for each in found if each.suite != "osre25" or stage != "retrofit"]


@pytest.mark.parametrize(
    ("testbed", "stage"),
    [(bed, stage) for bed in SPEEDS for stage in FORMULAS if (bed, stage) != ("two-cores", "kernels")],
)
def test_without_a_record_a_stage_is_known_within_a_factor_of_two_or_three(testbed: str, stage: str) -> None:
    misses = [FORMULAS[stage](Work.of(each), SPEEDS[testbed]) / each.seconds for each in records(testbed, stage)]
    assert 1 / 2 < statistics.median(misses) < 3
    assert sum(1 / 3 < miss < 4 for miss in misses) > 0.8 * len(misses)


def test_a_distilled_start_takes_longer_than_an_inherited_one_and_in_sequence_longest() -> None:
    found = {each.arm: Work.of(each) for each in records("h100", "retrofit") if each.suite == "starts"}
    arms = ("linear-inherit", "stack-distill", "stack-lstsq-distill-sequence")
    seconds = [FORMULAS["retrofit"](found[arm], SPEEDS["h100"]) for arm in arms]
    assert seconds == sorted(seconds)
    assert seconds[1] > 4 * seconds[0]


@pytest.mark.parametrize("stage", FORMULAS)
def test_a_record_of_the_same_is_what_is_foreseen(stage: str) -> None:
    like = records("h100", stage)[-1]
    found = foresee_stage(stage, "mine", "x", Work.of(like), SPEEDS["h100"], [like], peak_bytes=1.0)
    assert found.seconds == pytest.approx(like.seconds)
    assert found.source == f"by {like.arm} of {like.suite}"
    elsewhere = Work.of(like)._replace(settings=dict(like.settings) | {"device": "cpu"})
    if "device" in like.settings:
        assert foresee_stage(stage, like.suite, like.arm, elsewhere, SPEEDS["h100"], [like]).source == ESTIMATE


def test_the_record_of_a_layer_tells_of_a_larger_one_and_of_its_memory() -> None:
    (like, *_) = [each for each in records("h100", "kernels") if each.arm == "576-384-cheby2-degree2-16384"]
    work = Work.of(like)
    same, larger = (
        foresee_stage(
            "kernels", "mine", "x", work._replace(settings=dict(like.settings) | more), SPEEDS["h100"], [like], 7.0
        )
        for more in ({}, {"in_features": 4096, "out_features": 4096})
    )
    peaks = [metric.value for metric in like.metrics if metric.name.startswith("peak_") and metric.value]
    assert same.peak_bytes == max(peaks)
    assert larger.seconds > same.seconds
    assert larger.peak_bytes == 7.0  # of other shapes a record says nothing


@pytest.mark.parametrize("changed", [{"parameters": 1.3e9}, {"questions": 10**6}], ids=str)
def test_a_record_of_work_of_quite_another_size_tells_nothing(changed: dict[str, Any]) -> None:
    like = records("two-cores", "eval-bbh")[-1]
    same = foresee_stage("eval-bbh", like.suite, like.arm, Work.of(like), SPEEDS["two-cores"], [like])
    other = foresee_stage(
        "eval-bbh", like.suite, like.arm, Work.of(like)._replace(**changed), SPEEDS["two-cores"], [like]
    )
    assert (same.source, other.source) == ("by kan of quickstart", ESTIMATE)
    assert other.seconds > 5 * same.seconds


def test_a_slow_dtype_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def slow(left: torch.Tensor, right: torch.Tensor) -> float:
        sizes.append(len(left))
        return 1.0

    monkeypatch.setattr("kallm_bench.profiling.products._product_seconds", slow)
    product_rate.cache_clear()
    assert product_rate(torch.device("cpu"), torch.float16) == 2 * 256**3
    product_rate.cache_clear()
    assert set(sizes) == {256}


def test_a_long_wait_for_other_programs_is_not_taken_for_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def busy(left: torch.Tensor, right: torch.Tensor) -> float:
        asked.append(len(left))
        return 0.12 * bool(len(asked) % 8) + 2 * len(left) ** 3 / 1e11

    monkeypatch.setattr("kallm_bench.profiling.products._product_seconds", busy)
    product_rate.cache_clear()
    assert product_rate(torch.device("cpu"), torch.float32) == pytest.approx(1e11)
    product_rate.cache_clear()


def test_waiting_for_busy_cores_is_not_taken_for_a_slow_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(left: torch.Tensor, right: torch.Tensor) -> float:
        return 0.03 + 2 * len(left) ** 3 / 100e9

    monkeypatch.setattr("kallm_bench.profiling.products._product_seconds", busy)
    product_rate.cache_clear()
    assert 50e9 < product_rate(torch.device("cpu"), torch.float32) < 100e9
    product_rate.cache_clear()


# --- in a suite -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    write_chat(tmp_path / "chat.jsonl", CHAT * 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def cells_of(kallm: Run, *words: str) -> list[dict[str, Any]]:
    code, out, err = kallm("run", *words, "--dry-run", "--json")
    assert code == 0, err
    cells: list[dict[str, Any]] = json.loads(out)
    return cells


ARMS = """
[calibration]
data = "./chat.jsonl"
tokens = 1024
heldout_tokens = 64
row_length = 32
[eval]
source = "procedural"
tasks = ["navigate"]
limit = 2
max_new_tokens = 4
[profile]
batch = 1
length = 32
new_tokens = 4
repeats = 2
tail_from = 2
[[arm]]
name = "untouched"
train.tokens = 0
[[arm]]
name = "kan"
basis = "cheby2"
blocks = "2-3"
start = "distill"
start_steps = 2
[[arm]]
name = "longer"
basis = "cheby2"
blocks = "2-3"
start = "distill"
start_steps = 2
train.tokens = 512
"""


def test_every_stage_is_foreseen_and_what_arms_share_is_counted_once(home: Path, kallm: Run) -> None:
    top = TRAINED.replace('["retrofit", "train"]', '["retrofit", "train", "eval-bbh", "profile"]\nonce = ["profile"]')
    (home / "s.toml").write_text(top + ARMS)
    cells = cells_of(kallm, "s.toml", "--seeds", "0,1")
    stages = {(cell["arm"], cell["seed"]): set(cell["efforts"]) for cell in cells}
    after = {"train", "chat eval-bbh"}
    assert stages == {
        ("untouched", "0"): after | {"profile"},
        ("kan", "0"): after | {"retrofit", "profile"},
        ("longer", "0"): after | {"profile"},
        ("untouched", "1"): set(),
        ("kan", "1"): after | {"retrofit"},
        ("longer", "1"): after,
    }
    assert all(effort["source"] == ESTIMATE for cell in cells for effort in cell["efforts"].values())
    assert all(effort["peak_bytes"] for cell in cells[:2] for effort in cell["efforts"].values())
    assert not [cell["trouble"] for cell in cells if cell["trouble"]]
    assert not (home / "results").exists()
    assert kallm("run", "s.toml", "--only", "kan", "--seeds", "0")[0] == 0
    by_arm = {cell["arm"]: cell for cell in cells_of(kallm, "s.toml", "--seeds", "0")}
    assert {effort["source"] for effort in by_arm["kan"]["efforts"].values()} == {"by kan of s"}
    assert [cell["filed"] for cell in by_arm.values()] == [False, True, False]
    told = {each.stage: each.seconds for each in ResultsStore(home / "results").records("s")}
    assert by_arm["kan"]["efforts"]["profile"]["seconds"] == pytest.approx(told["profile"])
    assert by_arm["kan"]["efforts"]["retrofit"]["seconds"] == pytest.approx(told["retrofit"])


LESSONS = {
    "distilled": "distillation = {weight = 0.5}",
    "annealed": 'curriculum = {anneal = "linear", anneal_over = 1.0}',
    "staged": 'curriculum = {stages = "backwards"}',
}


def test_a_teacher_and_a_curriculum_are_foreseen(home: Path, kallm: Run) -> None:
    arms = [f'[[arm]]\nname = "{name}"\nbasis = "cheby2"\nblocks = "2-3"\n' for name in ("plain", *LESSONS)]
    text = "\n".join(arm + lesson for arm, lesson in zip(arms, ("\n", *LESSONS.values()), strict=True))
    (home / "s.toml").write_text(TRAINED + text)
    cells = {cell["arm"]: cell for cell in cells_of(kallm, "s.toml")}
    assert not [cell["trouble"] for cell in cells.values() if cell["trouble"]]
    plain = cells["plain"]["budget"]
    assert all(cells[name]["budget"]["seconds"] > plain["seconds"] for name in ("distilled", "annealed"))
    assert cells["staged"]["budget"]["seconds"] != plain["seconds"]
    assert kallm("run", "s.toml", "--only", "plain", "--seeds", "0")[0] == 0
    cells = {cell["arm"]: cell for cell in cells_of(kallm, "s.toml")}
    plain, heard = (cells[name]["budget"] for name in ("plain", "distilled"))
    assert {plain["source"], heard["source"]} == {"by plain of s"}
    assert heard["seconds"] > plain["seconds"]


def test_what_an_arm_starts_after_counts_where_it_is_not_run_by_itself(home: Path, kallm: Run) -> None:
    text = '[[arm]]\nname = "kan"\nbasis = "cheby2"\nblocks = "2-3"\n[[arm]]\nname = "on"\nafter = "kan"\n'
    (home / "s.toml").write_text(TRAINED + text)
    both, alone = cells_of(kallm, "s.toml"), cells_of(kallm, "s.toml", "--only", "on")
    assert [set(cell["efforts"]) for cell in both] == [{"retrofit", "train"}, {"train"}]
    assert alone[0]["seconds"] == pytest.approx(sum(cell["seconds"] for cell in both), rel=0.01)


def test_a_dry_run_says_once_why_a_suite_would_be_refused_and_what_it_would_take(home: Path, kallm: Run) -> None:
    top = TRAINED.replace("./chat.jsonl", "../none/chat.jsonl").replace("[train]", '[train]\nscope = "all"')
    (home / "s.toml").write_text(top + '[[arm]]\nname = "a"\n[[arm]]\nname = "b"\n')
    code, out, err = kallm("run", "s.toml", "--dry-run")
    assert code == 1, "as the run itself would end"
    assert "an estimate" in out
    assert err.count("would be refused") == 1
    assert "--data" in err
    code, _, err = kallm("run", "s.toml")
    assert code == 1
    assert "--data" in err


def test_layers_alone_are_foreseen(home: Path, kallm: Run) -> None:
    (home / "k.toml").write_text(
        '[[kernels]]\nshapes = [[32, 16]]\ntokens = 64\ncontenders = ["reference", "linear"]\n'
    )
    (cell,) = cells_of(kallm, "k.toml")
    assert cell["seconds"] > 0
    assert cell["peak_bytes"] > 0
