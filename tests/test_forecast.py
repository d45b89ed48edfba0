"""What a retrofit would come to, against what it comes to; putting modules back; what a checkpoint's card says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from conftest import Run

from kallm_bench.errors import SpecError
from kallm_bench.forecast import forecast
from kallm_bench.models import KANSpec, load_checkpoint, replaced_modules, retrofit, revert, save_checkpoint
from kallm_bench.models.card import model_card
from kallm_bench.profiling import flops_per_token
from kallm_bench.records import Metric, RunRecord
from kallm_bench.reporting import facts_of
from kallm_bench.training import SCOPES, parameters_in

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
SPECS: list[dict[str, Any]] = [
    {"blocks": "last:2", "basis": "cheby2"},
    {"blocks": "0,2", "basis": "rational", "form": "glu", "hidden": 32},
    {"blocks": "all", "basis": "linear", "params": 9000},
    {"blocks": (1,), "basis": "drop"},
    {"blocks": (1, 3), "basis": "cheby2+rbf", "target": "linears", "params": "original"},
    {"blocks": (1,), "basis": "bspline", "target": "attention", "start": "inherit"},
]


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("settings", SPECS, ids=str)
@pytest.mark.parametrize("before", [None, {"blocks": "1-2", "basis": "legendre", "start": "random"}], ids=str)
def test_a_forecast_is_what_comes(tiny_llama: Any, settings: dict[str, Any], before: dict[str, Any] | None) -> None:
    model = tiny_llama(vocab_size=97)
    if before and settings.get("target") == "linears":
        before = {**before, "target": "attention"}
    if before:
        retrofit(model, KANSpec(**before))
    coming = forecast(model.config, KANSpec(**{"start": "random", **settings}))
    parameters, flops = count(model), flops_per_token(model)
    spec = retrofit(model, KANSpec(**{"start": "random", **settings}))
    assert coming.spec == spec
    assert coming.parameters == (parameters, count(model))
    assert coming.flops == (flops, flops_per_token(model))
    assert coming.trainable == {scope: sum(p.numel() for p in parameters_in(model, scope)) for scope in SCOPES}
    gone, come = (
        sum(each[1] for each in side) for side in zip(*((p.before, p.after) for p in coming.places), strict=True)
    )
    assert come - gone == count(model) - parameters
    assert coming.training_bytes("all") == 16 * count(model)
    assert json.loads(json.dumps(coming.to_json()))["parameters"] == count(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom", "bert", "mixtral"])
@pytest.mark.parametrize(
    "settings", [{}, {"target": "linears", "activation": "drop"}, {"target": "attention"}], ids=str
)
def test_what_was_replaced_comes_back_to_the_bit(kind: str, settings: dict[str, Any]) -> None:
    if kind == "mixtral" and settings.get("target") == "linears":
        pytest.skip("experts are no linear layers")
    model, base = make(kind, 2), make(kind, 2)
    before, own = state(model), type(model)
    with torch.no_grad():
        logits = model(TOKENS).logits
    retrofit(model, KANSpec("all", "cheby2", hidden=None if settings else 8, experts=not settings, **settings))
    assert revert(model, make(kind, 2), "1") == (1,)
    assert list(replaced_modules(model)) == [0]
    assert revert(model, base) == (0,)
    assert type(model) is own
    assert not hasattr(model.config, "kallm")
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits)


def test_two_parts_of_a_block_come_back_together(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("0-2", "cheby2"))
    retrofit(model, KANSpec("1", "cheby2", target="attention"))
    assert revert(model, tiny_llama(vocab_size=97), "1") == (1,)
    assert [spec["blocks"] for spec in model.config.kallm] == [[0, 2]]


@pytest.mark.parametrize(
    ("blocks", "base", "message"),
    [
        ("3", {}, r"nothing was replaced in blocks \[3\]; replaced blocks are \[1, 2\]"),
        ("9", {}, "the model has 4 blocks"),
        ("1", {"intermediate_size": 48}, "of another size"),
    ],
)
def test_a_refused_revert_changes_nothing(tiny_llama: Any, blocks: str, base: dict[str, Any], message: str) -> None:
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("1-2", "cheby2"))
    before, notes = state(model), list(model.config.kallm)
    with pytest.raises(SpecError, match=message):
        revert(model, tiny_llama(vocab_size=97, **base), blocks)
    assert model.config.kallm == notes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_base_that_cannot_be(tiny_llama: Any) -> None:
    model, other = tiny_llama(vocab_size=97), tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("1-2", "cheby2"))
    retrofit(other, KANSpec("2", "rbf"))
    with pytest.raises(SpecError, match=r"retrofitted in blocks \[2\] itself"):
        revert(model, other)
    with pytest.raises(SpecError, match="the base is a GPT2LMHeadModel and this model a LlamaForCausalLM"):
        revert(model, make("gpt2", 2))
    with pytest.raises(SpecError, match="nothing was replaced in this model"):
        revert(tiny_llama(vocab_size=97), model)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    return tmp_path / "base"


def test_a_dry_run_writes_nothing(folder: Path, kallm: Run) -> None:
    there = sorted(folder.parent.rglob("*"))
    code, out, _ = kallm("retrofit", "base", "--blocks", "1,3", "--dry-run")
    assert code == 0
    assert "Nothing was done" in out
    assert "KANFeedForward" in out
    code, out, _ = kallm("retrofit", "base", "--blocks", "1,3", "--target", "attention", "--dry-run", "--json")
    assert code == 0
    assert [site["name"] for site in json.loads(out)["sites"]][:2] == ["1.self_attn.q_proj", "1.self_attn.k_proj"]
    code, _, err = kallm("retrofit", "base", "--blocks", "9", "--dry-run")
    assert (code, "0-3" in err) == (1, True)
    assert sorted(folder.parent.rglob("*")) == there


def test_retrofit_and_revert_from_the_command_line(folder: Path, kallm: Run) -> None:
    before = load_checkpoint(folder)[0].state_dict()
    assert kallm("retrofit", "base", "--blocks", "1,3", "--out", "kan")[0] == 0
    assert kallm("retrofit", "kan", "--target", "attention", "--blocks", "0", "--out", "more")[0] == 0
    note = json.loads(Path("more/kallm.json").read_text())
    assert note["base"]["source"] == "base"
    assert len(note["lineage"]) == 2
    code, _, err = kallm("retrofit", "more", "--revert", "--blocks", "2")
    assert code == 1
    assert "nothing was replaced in blocks [2]" in err
    assert kallm("retrofit", "more", "--revert", "--blocks", "3", "--out", "half")[0] == 0
    half = load_checkpoint("half")[0]
    assert list(replaced_modules(half)) == [0, 1]
    assert kallm("retrofit", "half", "--revert", "--out", "whole")[0] == 0
    whole = load_checkpoint("whole")[0].state_dict()
    assert all(torch.equal(whole[name], before[name]) for name in before)

    folder.rename(folder.parent / "elsewhere")
    code, _, err = kallm("retrofit", "kan", "--revert")
    assert code == 1
    assert "kan was made of 'base', which is not here; pass --base" in err
    assert kallm("retrofit", "kan", "--revert", "--base", "elsewhere", "--out", "back")[0] == 0


def test_options_that_do_not_go_together(folder: Path, kallm: Run) -> None:
    for words in (["--revert", "--dry-run"], ["--base", "base"]):
        assert kallm("retrofit", "base", *words)[0] == 2


# --- cards ------------------------------------------------------------------------------------------------------------


def record(stage: str, data: str, *metrics: Metric, **settings: Any) -> RunRecord:
    return RunRecord(
        id=stage, stage=stage, suite="osre25", arm="kan", seed=1, testbed="t", started="", seconds=0.0, parents=(),
        settings=settings, key="", model={}, data={"source": data} if data else {}, metrics=metrics, environment={},
    )  # fmt: skip


def test_a_card_tells_where_a_model_came_from_and_what_it_scored() -> None:
    records = [
        record("retrofit", ""),
        record("train", "some/chat", Metric("heldout_loss", 2.71828, n=900), Metric("trained_tokens", 1e6)),
        record("eval-bbh", "BBH", Metric("accuracy", 0.441, n=6511), Metric("accuracy/snarks", 0.5), protocol="chat"),
        record("profile", ""),
    ]
    facts = facts_of(records)
    assert ("train: data", "some/chat") in facts
    assert ("train: heldout loss", "2.718 (n = 900)") in facts
    assert ("train: trained tokens", "1,000,000") in facts
    assert ("eval-bbh: accuracy, chat", "0.441 (n = 6,511)") in facts
    assert ("eval-bbh: arm", "kan of suite osre25, seed 1") in facts
    specs = [KANSpec((1, 2), "cheby2", degree=2, hidden=8, start="random")]
    card = model_card("LlamaForCausalLM", 1234, specs, [{"id": "r1", "key": "k", "stage": "train"}],
                      {"source": "org/model", "fingerprint": "f"}, facts)  # fmt: skip
    head, body = card.split("---\n")[1:]
    assert "base_model: org/model" in head
    assert "- feed-forward of blocks 1, 2: cheby2, form stack, degree 2, hidden 8, start random" in body
    assert "| train: heldout loss | 2.718 (n = 900) |" in body
    assert "- train: r1" in body


def test_an_evaluation_is_told_in_the_card(folder: Path, kallm: Run) -> None:
    assert kallm("retrofit", "base", "--blocks", "1", "--out", "kan")[0] == 0
    assert "accuracy" not in Path("kan/README.md").read_text()
    words = ("--source", "procedural", "--tasks", "boolean_expressions", "--limit", "2", "--max-new-tokens", "2")
    assert kallm("eval-bbh", "kan", *words)[0] == 0
    assert "| eval-bbh: accuracy, " in Path("kan/README.md").read_text()
    assert kallm("eval-bbh", "kan", *words)[0] == 0  # the card does not make it another model
    assert not (folder / "README.md").read_text().count("eval-bbh")
