"""Scope `lora`: adapters change nothing at first, learn alone, become a part of the weights; a stopped run goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.models import KANSpec, load_checkpoint, retrofit, save_checkpoint
from kallm_bench.training import Forward, TrainSettings, apply_scope, merge, parameters_in, prepare, train
from kallm_bench.training.adapters import LoraSettings

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=64),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
}
SPECS = {
    "untouched": None,
    "stack": KANSpec("2-3", "cheby2", linear=True),
    "mix": KANSpec("2-3", "cheby2+rbf"),
    "glu": KANSpec("2-3", "rational", form="glu"),
    "gated": KANSpec("2-3", "cheby2", form="gated", constant="edge"),
    "linears": KANSpec("2-3", "legendre", target="linears", activation="keep"),
}
IDS = torch.arange(24).reshape(2, 12) * 7 % 97
SMALL = TrainSettings(tokens=6 * 2 * 32, row_length=32, rows_per_step=2, scope="lora", heldout_rows=2, lora_rank=4)


def make(config: str, spec: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[config])).eval()
    if (wanted := SPECS[spec]) is not None:
        retrofit(model, wanted)
    return model


@pytest.mark.parametrize(
    ("config", "spec"),
    [(config, spec) for config in CONFIGS for spec in ("untouched", "stack", "glu")]
    + [("llama", spec) for spec in ("mix", "gated", "linears")],
)
@torch.no_grad()
def test_adapters_change_nothing_at_first_and_merged_they_compute_the_same(config: str, spec: str) -> None:
    model = make(config, spec)
    before, names = model(IDS).logits, [name for name, _ in model.named_parameters()]
    expected = sum(parameter.numel() for parameter in parameters_in(model, "lora"))
    learning = apply_scope(model, "lora")
    assert {id(p) for p in learning} == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in learning) == expected
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert torch.equal(model(IDS).logits, before)
    for parameter in learning:
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    apart = model(IDS).logits
    assert (apart - before).abs().max() > 0.05
    merge(model, "lora")
    assert [name for name, _ in model.named_parameters()] == names
    torch.testing.assert_close(model(IDS).logits, apart, rtol=1e-4, atol=1e-5)


def test_asked_for_again_there_is_still_one_adapter_a_layer() -> None:
    model = make("llama", "stack")
    first = [parameter.shape for parameter in apply_scope(model, "lora")]
    assert [parameter.shape for parameter in apply_scope(model, "lora")] == first


@pytest.mark.parametrize(("tail_from", "first"), [(None, 2), (1, 1)])
def test_only_the_tail_gets_adapters_and_the_forward_enters_there(tail_from: int | None, first: int) -> None:
    model = make("llama", "stack")
    apply_scope(model, "lora", tail_from)
    adapted = {int(name.split(".")[2]) for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == set(range(first, 4))
    with Forward(model) as forward:
        assert forward.first == first


def test_every_adapter_learns_and_targets_choose_among_layers() -> None:
    model = make("llama", "stack")
    learning = apply_scope(model, "lora", 0, LoraSettings(rank=2, targets=("q_proj", "layers")))
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "0", "1"}
    with torch.no_grad():
        for parameter in learning:
            parameter.add_(0.01)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in learning)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout is a share"),
        ({"lora_targets": (3,)}, "names of layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        TrainSettings(scope="lora", **settings)


def test_a_layer_that_is_not_there_is_refused_by_name_and_nothing_is_changed() -> None:
    model = make("llama", "untouched")
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(TrainingError, match="Did you mean 'q_proj'"):
        apply_scope(model, "lora", None, LoraSettings(targets=("qproj",)))
    assert [name for name, _ in model.named_modules()] == before


@pytest.fixture(scope="module")
def rows(bundled_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    talk = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "one two three " * 3}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 200)
    return prepare(str(folder / "chat.jsonl"), bundled_tokenizer, 32, folder / "cache")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_stopped_run_ends_with_the_same_bits(
    tiny_llama: Any, rows: Any, tmp_path: Path, bundled_tokenizer: Any, dropout: float
) -> None:
    settings = dataclasses.replace(SMALL, lora_dropout=dropout, learning_rate=1e-2)

    def run(folder: str, stop_at: int = 0) -> Any:
        def watch(what: str, done: int, total: int, note: str = "") -> None:
            if what == "training" and stop_at and done == stop_at:
                signal.raise_signal(signal.SIGINT)

        model = tiny_llama()
        retrofit(model, KANSpec("2-3", "cheby2"))
        frozen = {name: value.clone() for name, value in model.state_dict().items()}
        result = train(model, *rows, settings, tmp_path / folder, watch=watch)
        assert all(torch.equal(model.state_dict()[name], frozen[name]) for name in frozen if name in model.state_dict())
        merge(model, "lora")
        return model, result

    whole, told = run("whole")
    assert told.trainable_parameters == sum(p.numel() for p in parameters_in(whole, "lora", lora=settings.lora))
    assert told.losses[-1] < told.losses[0]
    for stop_at in (2, 4):
        with pytest.raises(Interrupted):
            run("stopped", stop_at)
    resumed, again = run("stopped")
    assert again.losses == told.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    save_checkpoint(tmp_path / "saved", whole, bundled_tokenizer)
    loaded, _ = load_checkpoint(tmp_path / "saved")
    assert torch.equal(loaded(IDS).logits, whole(IDS).logits)
