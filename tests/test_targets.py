"""Retrofits of single linear layers, in feed-forwards and in attention, and of feed-forwards of other shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward, KANLinear
from kallm_bench.models import (
    Calibration,
    KANSpec,
    complete_spec,
    parameters_of,
    replaced_modules,
    retrofit,
    retrofit_reporting,
    save_checkpoint,
)
from kallm_bench.models.anatomy import Anatomy, find_blocks, is_activation
from kallm_bench.models.inspect import inspect_model
from kallm_bench.models.retrofit import replaced_sites
from kallm_bench.training.scope import parameters_in

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53, 58, 9, 7]])

LAYERS = {  # linear layers in the feed-forward, and in the attention, of a block
    "llama": (["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], 4),
    "gpt2": (["mlp.c_fc", "mlp.c_proj"], 2),  # Conv1D
    "phi3": (["mlp.gate_up_proj", "mlp.down_proj"], 2),  # two paths in one matrix
    "opt": (["fc1", "fc2"], 4),  # called by the block itself
    "bloom": (["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"], 2),  # adds the residual
    "bert": (["intermediate.dense", "output.dense"], 4),  # in two modules
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def text(rows: int = 12) -> Calibration:
    tokens = torch.randint(3, 96, (rows, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens, torch.arange(32).expand(rows, 32), 3)


@pytest.mark.parametrize("target", ["linears", "attention"])
@pytest.mark.parametrize("kind", LAYERS)
def test_single_layers_are_replaced_and_come_back(kind: str, target: str, tmp_path: Path) -> None:
    model = make(kind, 2)
    before = copy_of(model)
    spec = retrofit(model, KANSpec((1,), "cheby2", target=target))
    sites = replaced_sites(model)
    assert {site.block for site in sites} == {1}
    if target == "linears":
        assert [site.label for site in sites] == LAYERS[kind][0]
    assert len(sites) == (len(LAYERS[kind][0]) if target == "linears" else LAYERS[kind][1])
    assert all(isinstance(module, KANLinear) for module in sites.values())
    replaced = tuple(f"{site.path}." for site in sites)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith(replaced))

    count = sum(parameter.numel() for module in sites.values() for parameter in module.parameters())
    assert parameters_of(make(kind, 2).config, spec) == count
    learning = {id(parameter) for parameter in parameters_in(model, "replaced")}
    assert learning == {id(parameter) for module in sites.values() for parameter in module.parameters()}

    how = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **how), model.generate(TOKENS, use_cache=False, **how))
    save_checkpoint(tmp_path / "saved", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits(loaded), logits(model))
    assert list(replaced_sites(loaded)) == list(sites)


@pytest.mark.parametrize("target", ["linears", "attention"])
@pytest.mark.parametrize("basis", ["cheby2", "bspline", "cheby2+rbf"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_inherit_compute_what_the_matrices_did(kind: str, basis: str, target: str) -> None:
    model = make(kind, 2)
    before = logits(model)
    spec = retrofit(model, KANSpec("all", basis, target=target, start="inherit"))
    assert spec.linear
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model(TOKENS, labels=TOKENS).loss.backward()
    for module in replaced_modules(model).values():
        assert all(parameter.grad.any() for name, parameter in module.named_parameters() if "coefficients" in name)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_number_of_parameters_can_be_matched(kind: str) -> None:
    model = make(kind, 2)
    wanted = sum(p.numel() for p in Anatomy(model).feedforward(1).parameters())
    spec = retrofit(model, KANSpec((1,), "cheby2", target="linears", params="original"))
    count = sum(parameter.numel() for module in replaced_modules(model).values() for parameter in module.parameters())
    assert count == pytest.approx(wanted, rel=0.03)
    assert spec.hidden is not None
    assert logits(model).isfinite().all()


def test_activations_are_dropped_and_put_back() -> None:
    for kind in LAYERS:
        model = make(kind, 2)
        own = [type(module) for module in model.modules() if is_activation(module)]
        retrofit(model, KANSpec("all", "cheby2", target="linears", activation="drop"))
        assert sum(isinstance(module, nn.Identity) for module in model.modules()) == 2, kind
        retrofit(model, KANSpec("all", "cheby2", target="linears", start="random"))
        assert not any(isinstance(module, nn.Identity) for module in model.modules())
        assert [type(module) for module in model.modules() if is_activation(module)] == own


def test_feedforward_and_attention_of_a_block_are_two_places(tmp_path: Path) -> None:
    model = make("llama", 2)
    retrofit(model, KANSpec((1,), "cheby2", target="attention"))
    attention = copy_of(replaced_modules(model)[1])
    retrofit(model, KANSpec((1,), "rbf"))
    assert [type(module) for module in replaced_sites(model).values()] == [*[KANLinear] * 4, KANFeedForward]
    assert_same(attention, copy_of(replaced_modules(model)[1][:4]))
    save_checkpoint(tmp_path / "saved", model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    retrofit(model, KANSpec((1,), "linear", target="attention"))
    assert [type(module) for module in replaced_sites(model).values()] == [*[nn.Linear] * 4, KANFeedForward]


def test_a_whole_feedforward_may_follow_single_layers_but_not_the_other_way() -> None:
    for kind in LAYERS:
        model = make(kind, 2)
        retrofit(model, KANSpec((0,), "cheby2", target="linears", activation="drop"))
        retrofit(model, KANSpec((0,), "cheby2"))
        assert [type(module) for module in replaced_sites(model).values()] == [KANFeedForward]
        before, out = copy_of(model), logits(model)
        with pytest.raises(SpecError, match=r"block 0 holds no linear layers any more.*--revert"):
            retrofit(model, KANSpec("all", "cheby2", target="linears"))
        assert_same(before, copy_of(model))
        assert torch.equal(logits(model), out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("start", ["lstsq", "distill", "random", "inherit+distill"])
def test_calibrated_starts_of_single_layers(kind: str, start: str) -> None:
    model = make(kind, 2)
    spec = KANSpec((1,), "cheby2", target="linears", start=start, start_steps=20)
    completed, report = retrofit_reporting(model, spec, text(40))
    assert list(report.r2) == [f"1.{label}" for label in LAYERS[kind][0]]
    if start in ("lstsq", "inherit+distill"):
        assert min(report.r2.values()) > 0.9, report.r2
    assert completed.scaled == (start != "random")


@pytest.mark.parametrize("kind", ["opt", "bloom", "bert", "mixtral", "gpt_oss"])
def test_calibrated_starts_of_feedforwards_of_other_shapes(kind: str) -> None:
    """Least squares answers as what stood there did, wherever the residual is added and whatever is called inline."""
    model, untouched = make(kind, 2), make(kind, 2)
    spec = KANSpec((1,), "cheby2", hidden=24, experts=True, start="lstsq", linear=True)
    report = retrofit_reporting(model, spec, text(60))[1]
    assert report.r2["1"] > 0.4
    random = make(kind, 2)
    retrofit(random, KANSpec((1,), "cheby2", hidden=24, experts=True))
    true = logits(untouched)
    assert (logits(model) - true).square().mean() < 0.5 * (logits(random) - true).square().mean()


@pytest.mark.parametrize("kind", ["opt", "bloom", "mpt", "bert"])
@pytest.mark.parametrize("basis", ["linear", "drop"])
def test_controls_of_feedforwards_of_other_shapes(kind: str, basis: str, tmp_path: Path) -> None:
    model = make(kind, 2)
    retrofit(model, KANSpec("all", basis))
    if basis == "drop":
        silent = make(kind, 2)
        for block in range(2):
            for parameter in list(Anatomy(silent).feedforward(block).children())[-1].parameters():
                parameter.data.zero_()
        torch.testing.assert_close(logits(model), logits(silent))
    save_checkpoint(tmp_path / "saved", model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_basis_of_single_layers_is_changed_without_loss() -> None:
    model = make("llama", 2)
    retrofit(model, KANSpec("all", "cheby2", target="linears"))
    before = logits(model)
    spec, report = retrofit_reporting(model, KANSpec("all", "legendre:degree=3", target="linears"))
    assert spec.start == "convert"
    assert report.conversion_error is not None
    assert report.conversion_error < 1e-9
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-5)


def test_the_functions_of_single_layers_are_inspected() -> None:
    model = make("llama", 2)
    retrofit(model, KANSpec((0,), "cheby2", target="attention"))
    facts, _ = inspect_model(model)
    assert [fact.layer for fact in facts] == [f"self_attn.{name}_proj" for name in "qkvo"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "linear"}, "Did you mean 'linears'?"),
        ({"target": "attention", "hidden": 8}, "leave hidden and params out"),
        ({"target": "attention", "params": "original"}, "leave hidden and params out"),
        ({"target": "linears", "basis": "drop"}, "no drop"),
        ({"target": "linears", "basis": "cheby2>rbf"}, "sequential mix"),
        ({"target": "linears", "form": "glu"}, "form"),
        ({"target": "linears", "basis": "linear", "start": "inherit"}, "would be the old one"),
        ({"activation": "drop"}, "has no activation to drop"),
        ({"target": "linears", "activation": "dropped"}, "Did you mean 'drop'?"),
        ({"experts": 1}, "true or false"),
    ],
    ids=str,
)
def test_specs_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=None) as refused:
        KANSpec("all", **{"basis": "cheby2", **settings})
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mixtral", {}, "routes to experts; --experts replaces them as a whole"),
        ("mixtral", {"target": "linears"}, "routes to experts"),
        ("bitnet", {"target": "linears", "hidden": 8}, "more than linear layers"),
        ("bitnet", {"basis": "linear", "hidden": 8}, "more than linear layers"),
        ("mamba", {}, "block 0 has no feed-forward that can be replaced; its parts are norm"),
        ("mamba", {"target": "attention"}, "no attention with linear layers"),
    ],
    ids=str,
)
def test_a_refused_retrofit_changes_nothing(kind: str, settings: dict[str, Any], message: str) -> None:
    model = make(kind, 2)
    before, out = copy_of(model), logits(model)
    with pytest.raises(SpecError, match=None) as refused:
        retrofit(model, KANSpec("all", **{"basis": "cheby2", **settings}))
    assert message in str(refused.value)
    assert_same(before, copy_of(model))
    assert torch.equal(logits(model), out)


def test_blocks_without_a_feedforward_are_named_and_others_replaced() -> None:
    model = make("deepseek_v3", 4)  # one dense block, then experts
    with pytest.raises(SpecError, match=r"block \d routes to experts.*Blocks that can be replaced: 0"):
        retrofit(model, KANSpec("all", "cheby2"))
    dense = [int(block) for block in range(4) if not Anatomy(model).covered()[block].experts]  # type: ignore[union-attr]
    assert retrofit(model, KANSpec(tuple(dense), "cheby2")).blocks == tuple(dense)


class Fused(nn.Module):
    """A block whose attention and feed-forward share their matrices, as in PaLM's parallel form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 5 * width), nn.Linear(3 * width, width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        return hidden_states


def test_fused_attention_and_feedforward_are_refused() -> None:
    model = make("llama", 2)
    blocks = find_blocks(model)
    for number in range(2):
        blocks[number] = Fused(32)
    assert all("no feed-forward" in str(place) for place in Anatomy(model).covered())


def test_conv1d_is_restarted_as_what_it_is() -> None:
    model = make("gpt2", 2)
    retrofit(model, KANSpec("all", "linear", target="linears", hidden=20))
    assert {type(module) for module in replaced_sites(model).values()} == {Conv1D}
    assert complete_spec(make("gpt2", 2).config, KANSpec("all", "linear", target="linears", hidden=20)).hidden == 20
