"""KAN adapters: they add nothing at first, learn alone, stay in a checkpoint beside their layers, and can go again."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from architectures import make
from safetensors.torch import load_file
from tiny_suite import TRAINED
from torch import Tensor, nn

from kallm_bench import engine
from kallm_bench.errors import Interrupted, SpecError, TrainingError
from kallm_bench.filing import Bench, find_ref
from kallm_bench.forecast import forecast
from kallm_bench.kan import ADAPTERS, BASES, KANFeedForward, KANLinear, LowRankKAN
from kallm_bench.models import (
    KANSpec,
    complete_spec,
    load_checkpoint,
    parameters_of,
    replaced_modules,
    replaced_sites,
    retrofit,
    revert,
    save_checkpoint,
)
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.models.inspect import inspect_model
from kallm_bench.profiling import flops_per_token
from kallm_bench.records import ResultsStore
from kallm_bench.reporting.arms import variants, what_it_is
from kallm_bench.reporting.controls import Controls, missing_controls
from kallm_bench.suites import read_suite
from kallm_bench.training import (
    CurriculumSettings,
    TrainSettings,
    apply_scope,
    make_curriculum,
    merge,
    parameters_in,
    prepare,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53, 58, 9, 7]])
KINDS = ("llama", "gpt_neox", "gpt2", "opt", "bloom", "phi3", "bert")
BOTH = KANSpec((1,), "cheby2", degree=2, target="linears+attention", form="adapter", rank=4)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


@torch.no_grad()
def moved(model: Any) -> Any:
    """The model after something has been learned: its adapters' parameters lie elsewhere."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters_in(model, "replaced"):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_layers_are_what_their_formulas_say() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = moved_adapter("cheby2", "adapter-code").double()
    z = x[:, :8] @ code.encode.weight.T
    t, c = z.tanh(), code.function.coefficients  # type: ignore[union-attr]
    bent = z + c[:, 0] + c[:, 1] * 2 * t + c[:, 2] * (4 * t * t - 1)
    torch.testing.assert_close(code(x[:, :8]), bent @ code.decode.weight.T * (32 / 8))

    layers = moved_adapter("cheby2", "adapter").double()
    z = x[:, :8]
    for layer in (layers.encode, layers.decode):
        t, c = z.tanh(), layer.coefficients
        z = 2 * t @ c[:, 0].T + (4 * t * t - 1) @ c[:, 1].T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(layers(x[:, :8]), z * (32 / 16))


@torch.no_grad()
def moved_adapter(basis: str, form: str) -> LowRankKAN:
    """From 8 to 16 channels by rank 8, which every family's groups divide; nothing in it is zero."""
    adapter = LowRankKAN(8, 16, 8, basis, form=form)
    generator = torch.Generator().manual_seed(0)
    adapter.reset_parameters(generator)
    for parameter in adapter.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.parametrize("basis", BASES)
def test_gradients_are_those_of_float64_and_all_learn(basis: str, form: str) -> None:
    adapter = moved_adapter(basis, form)
    assert adapter(torch.zeros(0, 8)).shape == (0, 16)
    x, dy = (torch.randn(40, width, generator=torch.Generator().manual_seed(width)) for width in (8, 16))

    def gradients(module: LowRankKAN, dtype: torch.dtype) -> list[Tensor]:
        given = x.to(dtype).requires_grad_()
        wanted = [given, *module.to(dtype).parameters()]
        return list(torch.autograd.grad((module(given) * dy.to(dtype)).sum(), wanted))

    found, true = (gradients(copy.deepcopy(adapter), dtype) for dtype in (torch.float32, torch.float64))
    for name, mine, exact in zip(["x", *dict(adapter.named_parameters())], found, true, strict=True):
        assert exact.abs().max() > 0, name
        assert (mine - exact).abs().max() <= 1e-4 * exact.abs().max(), name


def test_gradients_are_the_slopes() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for form in ADAPTERS:
        adapter = moved_adapter("cheby2", form).double()
        names, parameters = zip(*adapter.named_parameters(), strict=True)

        def answer(x: Tensor, *values: Tensor, adapter=adapter, names=names) -> Tensor:
            return torch.func.functional_call(adapter, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(answer, (x, *parameters))


@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.parametrize("basis", BASES)
def test_every_family_begins_as_the_layer_alone(basis: str, form: str) -> None:
    layer, adapter = nn.Linear(8, 16), LowRankKAN(8, 16, 8, basis, form=form)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    adapted = AdaptedLinear(layer, adapter)
    assert torch.equal(adapted(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert adapted(x).dtype == layer(x).dtype == torch.bfloat16
        assert torch.equal(adapted(x), layer(x))
    adapted(x).sum().backward()  # as LoRA: what takes the code learns first
    assert all(parameter.grad.abs().max() > 0 for parameter in [next(adapter.decode.parameters())])


@pytest.mark.parametrize(("kind", "form"), [*((kind, "adapter") for kind in KINDS), ("gpt2", "adapter-code")])
def test_a_model_begins_as_it_was_and_comes_back_from_disk_and_from_the_adapters(
    kind: str, form: str, tmp_path: Path
) -> None:
    model, untouched = make(kind, 2), make(kind, 2)
    before = logits(model)
    spec = retrofit(model, dataclasses.replace(BOTH, form=form))
    assert torch.equal(logits(model), before)
    sites = replaced_sites(model)
    assert {site.block for site in sites} == {1}
    single = (KANSpec((1,), "cheby2", target=target) for target in ("attention", "linears"))
    assert [site.path for site in sites] == [site.path for each in single for site in _sites(make(kind, 2), each)]
    now, was = model.state_dict(), untouched.state_dict()
    assert all(torch.equal(now[name], was[name]) for name in was)  # under their own names

    new = {id(parameter) for name, parameter in model.named_parameters() if ".adapter." in name}
    assert {id(parameter) for parameter in parameters_in(model, "replaced")} == new
    count = sum(parameter.numel() for parameter in parameters_in(model, "replaced"))
    assert parameters_of(make(kind, 2).config, spec) == count
    assert count == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in untouched.parameters())
    weights = [p for name, p in model.named_parameters() if ".adapter." in name and "function" not in name]
    products = sum(parameter.numel() for parameter in weights if parameter.ndim > 1)
    assert flops_per_token(model) == flops_per_token(untouched) + 2 * products

    moved(model)
    assert (logits(model) - before).abs().max() > 0.01
    how = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **how), model.generate(TOKENS, use_cache=False, **how))
    save_checkpoint(tmp_path / "saved", model)
    loaded, _ = load_checkpoint(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert list(replaced_sites(loaded)) == list(sites)
    revert(loaded, untouched)
    assert not hasattr(loaded.config, "kallm")
    assert torch.equal(logits(loaded), before)


def _sites(model: Any, spec: KANSpec) -> Any:
    retrofit(model, spec)
    return replaced_sites(model)


def test_adapters_follow_adapters_and_whole_feedforwards_but_no_other_layers() -> None:
    model = make("llama", 2)
    before = logits(model)
    retrofit(model, BOTH)
    moved(model)
    retrofit(model, dataclasses.replace(BOTH, form="adapter-code", basis="rational", degree=None, rank=8))
    assert torch.equal(logits(model), before)  # the first ones are gone
    assert all(module.function is not None for module in replaced_sites(model).values())
    retrofit(model, KANSpec((1,), "cheby2"))
    assert [type(module) for module in replaced_sites(model).values()] == [*[LowRankKAN] * 4, KANFeedForward]
    retrofit(model, dataclasses.replace(BOTH, blocks=(0,)))
    assert {block: len(list(module)) for block, module in replaced_modules(model).items()} == {0: 7, 1: 5}
    with pytest.raises(SpecError, match=r"block 1 holds no linear layers any more.*--revert"):
        retrofit(model, BOTH)
    with pytest.raises(SpecError, match=r"block 0 holds other layers than the model's own.*--revert"):
        retrofit(_with(KANSpec((0,), "cheby2", target="attention")), dataclasses.replace(BOTH, blocks=(0,)))


def _with(spec: KANSpec) -> Any:
    model = make("llama", 2)
    retrofit(model, spec)
    return model


def test_plain_kan_layers_take_both_parts_too_and_replace_adapters() -> None:
    model = _with(BOTH)
    retrofit(model, KANSpec((1,), "legendre", target="linears+attention"))
    assert [type(module) for module in replaced_sites(model).values()] == [KANLinear] * 7
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "adaptor"}, "Did you mean 'adapter'?"),
        ({"target": "feedforward"}, "take target linears, attention or both"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"form": "stack", "target": "linears"}, "rank is for the forms adapter and adapter-code"),
        ({"basis": "cheby2+rbf", "degree": None}, "is a mix"),
        ({"basis": "linear", "degree": None}, "is no KAN"),
        ({"start": "inherit"}, "begins at zero"),
        ({"hidden": 8, "target": "linears"}, "give rank, not hidden"),
        ({"scaled": True}, "give rank, not hidden"),
        ({"form": "adapter-code", "linear": True}, "leave linear and constant out"),
        ({"form": "adapter-code", "constant": "edge"}, "leave linear and constant out"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=None) as refused:
        dataclasses.replace(BOTH, **settings)
    assert message in str(refused.value)


def test_a_layer_that_does_more_than_its_matrix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make("llama", 2)
    monkeypatch.setattr("transformers.models.llama.modeling_llama.nn.Linear", Doubled)
    with pytest.raises(SpecError, match="a Doubled computes more than a matrix product"):
        retrofit(model, BOTH)


def test_a_rank_is_written_out_and_old_keys_hold() -> None:
    config = make("llama", 2).config
    assert complete_spec(config, dataclasses.replace(BOTH, rank=None)).rank == 16
    assert KANSpec.from_json(BOTH.to_json()) == dataclasses.replace(BOTH, start="auto")
    assert "rank" not in KANSpec((1,), "cheby2").to_json()


@pytest.mark.parametrize("form", ADAPTERS)
def test_blocks_compile_whole(form: str) -> None:
    model = moved(_with(dataclasses.replace(BOTH, form=form)))
    adapted = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    x = torch.randn(6, adapted.in_features, requires_grad=True)
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), adapted(x))
    compiled(x).sum().backward()
    assert x.grad is not None


def test_what_learned_is_told_and_drawn() -> None:
    model = moved(_with(BOTH))
    facts, _ = inspect_model(model)
    assert [fact.layer for fact in facts][:2] == ["self_attn.q_proj.encode", "self_attn.q_proj.decode"]
    coming = forecast(make("llama", 2).config, BOTH)
    assert coming.trainable["replaced"] == sum(p.numel() for p in parameters_in(model, "replaced"))
    assert coming.parameters[1] == sum(p.numel() for p in model.parameters())
    assert {place.after[0] for place in coming.places} == {"AdaptedLinear"}
    assert all(place.after[1] > place.before[1] for place in coming.places)


def test_it_takes_no_turns_with_the_original_but_its_degree_may_rise(tiny_llama: Any) -> None:
    model, base = tiny_llama(vocab_size=97), tiny_llama(vocab_size=97)
    retrofit(model, dataclasses.replace(BOTH, degree=3))
    settings = TrainSettings(tokens=1024, row_length=64, rows_per_step=1, scope="replaced")
    with pytest.raises(TrainingError, match="begins as the original"):
        make_curriculum(model, CurriculumSettings(anneal="linear"), settings, base)
    rising = make_curriculum(model, CurriculumSettings(start_degree=1), settings)
    assert rising is not None
    assert (rising.degree(0), rising.degree(15)) == (1, 3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_lora_beside_an_adapter_is_for_the_matrix_and_becomes_a_part_of_it(kind: str) -> None:
    model = make(kind, 2)
    retrofit(model, BOTH)
    moved(model)
    before, names = logits(model), list(model.state_dict())
    expected = sum(parameter.numel() for parameter in parameters_in(model, "lora"))
    learning = apply_scope(model, "lora")
    assert sum(parameter.numel() for parameter in learning) == expected
    assert not any(".adapter." in name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(logits(model), before)
    for parameter in learning:
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    apart = logits(model)
    assert (apart - before).abs().max() > 0.02
    merge(model, "lora")
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), apart, rtol=1e-4, atol=1e-5)


# Training


def count(folder: Path) -> str:
    """A file of conversations."""
    talk = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two three " * 3}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 200)
    return str(folder / "chat.jsonl")


@pytest.fixture(scope="module")
def rows(bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    return prepare(count(folder), bundled_tokenizer, 32, folder / "cache")


@pytest.mark.parametrize(("kind", "form"), [("llama", "adapter"), ("gpt_neox", "adapter-code")])
def test_it_learns_alone_and_a_stopped_run_ends_with_the_same_bits(
    kind: str, form: str, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(architectures.SIZES, "vocab_size", 49152)
    settings = TrainSettings(
        tokens=6 * 2 * 32, row_length=32, rows_per_step=2, scope="replaced", heldout_rows=2, learning_rate=1e-2
    )

    def run(folder: str, stop_at: int = 0) -> Any:
        def watch(what: str, done: int, total: int, note: str = "") -> None:
            if what == "training" and stop_at and done == stop_at:
                signal.raise_signal(signal.SIGINT)

        model = make(kind, 2)
        retrofit(model, dataclasses.replace(BOTH, form=form))
        began = {name: value.clone() for name, value in model.state_dict().items()}
        result = train(model, *rows, settings, tmp_path / folder, watch=watch)
        for name, value in model.state_dict().items():
            assert torch.equal(value, began[name]) != (".adapter." in name), name
        return model, result

    whole, told = run("whole")
    assert told.trainable_parameters == sum(p.numel() for p in parameters_in(whole, "replaced"))
    assert told.heldout_after < told.heldout_before - 0.05
    with pytest.raises(Interrupted):
        run("stopped", 3)
    resumed, again = run("stopped")
    assert again.losses == told.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


SUITE = (
    TRAINED
    + """scope = "replaced"
[[arm]]
name = "kan-adapter"
basis = "cheby2"
form = "adapter"
target = "linears+attention"
rank = 4
blocks = "2-3"
[[arm]]
name = "lora"
train = {scope = "lora", tail_from = 2, lora_rank = 8}
"""
)


def test_an_arm_is_made_trained_and_told(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    count(tmp_path)
    (tmp_path / "s.toml").write_text(SUITE)
    bench = Bench(ResultsStore(tmp_path / "results"), "here", tmp_path / "runs", torch.device("cpu"), torch.float32)
    ran = engine.run_suite(bench, read_suite(tmp_path / "s.toml"))
    assert not ran.failures
    made, trained, _ = ran.records
    assert made.value("replaced_parameters") == trained.value("trainable_parameters")
    known = {record.id: record for record in ran.records}
    (arm,), (lora,) = (variants(name, ran.records, known) for name in ("kan-adapter", "lora"))
    assert Controls([arm, lora]).of(arm) is lora
    assert list(missing_controls([arm, lora])) == []
    assert list(missing_controls([arm])) == ["LoRA with as many parameters as 'kan-adapter'"]
    assert what_it_is(arm) == (
        "cheby2 degree 2 adapter, rank 4, beside each linear layer in the attention and the feed-forward of blocks 2-3"
    )
    assert what_it_is(lora) == "LoRA of rank 8, nothing replaced"
    folder = find_ref(str(tmp_path / "base"))
    record = engine.retrofit(bench, folder, BOTH, tmp_path / "alone")
    assert record.value("replaced_parameters") == made.value("replaced_parameters") / 2  # one block of the two
    (new,) = (path for path in (tmp_path / "alone").glob("*.safetensors") if path.stat().st_nlink == 1)
    assert all(".adapter." in name for name in load_file(new))  # what was there is linked, not written again
