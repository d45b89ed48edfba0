"""Retrofits that load a block at a time: the same to the bit as with the model loaded whole, and nothing stays."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import TOKENS, make
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, LlamaConfig, OPTConfig

from kallm_bench import engine
from kallm_bench.engine import retrofitting
from kallm_bench.errors import CheckpointError
from kallm_bench.filing import Bench, find_ref
from kallm_bench.models import (
    Calibration,
    CalibrationSettings,
    KANSpec,
    Original,
    calibration,
    complete_spec,
    find_model,
    load_config,
    load_model,
    load_weights,
    open_original,
    retrofit,
    retrofit_reporting,
    weights_folder,
)
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.models.shards import SINGLE, weight_files
from kallm_bench.models.sources import load_skeleton
from kallm_bench.models.streaming import fill_buffers
from kallm_bench.records import ResultsStore

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 4, "vocab_size": 97, "max_position_embeddings": 64}  # fmt: skip
CONFIGS = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "bfloat16": LlamaConfig(**LLAMA, tie_word_embeddings=True, dtype=torch.bfloat16),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "opt": OPTConfig(vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
                     max_position_embeddings=64, word_embed_proj_dim=32),
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to start from, by name; "retrofitted" is what a retrofit has made of "tied"."""
    home = tmp_path_factory.mktemp("sources")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
        model.save_pretrained(home / name, max_shard_size="20KB" if name == "untied" else "1GB")
    model, _ = load_model(str(home / "tied"))
    retrofit(model, KANSpec("1-2", "cheby2", hidden=8))
    model.save_pretrained(home / "retrofitted")
    return {folder.name: folder for folder in home.iterdir()}


@pytest.fixture
def text() -> Calibration:
    tokens = torch.randint(3, 97, (16, 32), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens, torch.arange(32).expand(16, -1), heldout=4)


def skeleton(folder: Path) -> Original:
    source = find_model(str(folder))
    original = Original(weights_folder(source), load_skeleton(source, torch.float32))
    assert original.streams
    return original


def lent(original: Original) -> dict[str, set[str]]:
    """The names of what has values now, by the block it is in; those outside by ""."""
    place = next(name for name, each in original.model.named_modules() if each is find_blocks(original.model)) + "."
    found: dict[str, set[str]] = {}
    for name, tensor in original.model.state_dict(keep_vars=True).items():
        if tensor is not original.tensors.get(name, tensor):
            block = name.removeprefix(place).partition(".")[0] if name.startswith(place) else ""
            found.setdefault(block, set()).add(name)
    return found


def check_empty(original: Original) -> None:
    """Every tensor is the very one that the skeleton was made with, and no hook is left."""
    now = original.model.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in original.tensors.items())
    assert all(parameter.is_meta for parameter in original.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in original.model.modules())


# The same, to the bit

SPECS = {
    "lstsq": KANSpec("last:2", "cheby2", hidden=8, start="lstsq"),
    "random": KANSpec("last:2", "cheby2", hidden=8),
    "distill": KANSpec("0,2", "bspline", hidden=8, start="distill", start_steps=3),
    "inherit": KANSpec("1-2", "linear", hidden=24, start="inherit"),
    "lstsq+sequence": KANSpec("1-3", "cheby2", hidden=8, start="lstsq+sequence", start_steps=8),
    "linears": KANSpec((1,), "cheby2", target="linears", start="lstsq", degree=2),
    "attention": KANSpec((2,), "cheby2", target="attention", start="inherit+distill", start_steps=2, degree=2),
    "glu": KANSpec("1-2", "rational", form="glu", hidden=24, start="inherit"),
    "glu, distilled": KANSpec("1-2", "rational", form="glu", hidden=24, start="inherit+distill", start_steps=2),
}
STARTED = [(source, name) for source in ("tied", "gpt2", "opt", "bfloat16") for name in SPECS if "glu" not in name]
STARTED += [(source, name) for source in ("tied", "untied", "bfloat16") for name in SPECS if "glu" in name]
STARTED += [("untied", "lstsq+sequence"), ("retrofitted", "lstsq"), ("retrofitted", "lstsq+sequence")]


@pytest.mark.parametrize(("source", "name"), STARTED)
def test_streaming_finds_what_whole_loading_finds(
    sources: dict[str, Path], text: Calibration, source: str, name: str, tmp_path: Path
) -> None:
    found, written = find_model(str(sources[source])), {}
    model, _ = load_model(found)
    spec = complete_spec(load_config(found), SPECS[name])
    whole, streaming = Original(found.folder, model), open_original(found, spec, torch.float32)
    assert streaming is not None
    for how, original in (("whole", whole), ("streamed", streaming)):
        context = original.streamed("cpu") if how == "streamed" else contextlib.nullcontext()
        with context:
            _, report = retrofit_reporting(original.model, spec, text, device="cpu")
        original.save_changed(tmp_path / how)
        files = [path for path in sorted((tmp_path / how).iterdir()) if path.suffix != ".safetensors"]
        tensors = {path.name: load_file(path) for path in weight_files(tmp_path / how)}
        written[how] = report, {path.name: path.read_bytes() for path in files}, tensors
    assert written["whole"][:2] == written["streamed"][:2]
    assert written["whole"][2].keys() == written["streamed"][2].keys()
    for file, tensors in written["whole"][2].items():
        assert tensors.keys() == written["streamed"][2][file].keys()
        for tensor in tensors:
            assert torch.equal(tensors[tensor], written["streamed"][2][file][tensor]), tensor


KINDS = ("bloom", "diffllama", "falcon_h1", "gemma2", "gptj", "llama4_text", "modernbert-decoder", "mpt", "xlnet")
"""Among them: buffers that initialisation fills, parameters that do not begin on meta, experts, no positions at all."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_skeleton_runs_as_the_model_does(kind: str, tmp_path: Path) -> None:
    try:
        make(kind, 2).save_pretrained(tmp_path)
    except Exception:
        pytest.skip("no tiny model of it can be made")
    original, (whole, _) = skeleton(tmp_path), load_model(str(tmp_path))
    with original.streamed("cpu"):
        for name, buffer in whole.named_non_persistent_buffers():
            assert torch.equal(original.model.get_buffer(name), buffer), name
            assert original.model.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(original.model(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits)
    now = original.model.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in original.tensors.items())


def test_what_is_there_already_is_not_made_anew(sources: dict[str, Path]) -> None:
    original = skeleton(sources["tied"])
    feedforward = original.model.model.layers[1].mlp
    original.fill(feedforward)
    before = {name: tensor.clone() for name, tensor in feedforward.state_dict().items()}
    fill_buffers(original.model, "cpu")
    with original.streamed("cpu"):
        original.model(input_ids=TOKENS)
    for name, tensor in feedforward.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_model_that_tells_its_device_by_a_block_is_loaded_whole(tmp_path: Path) -> None:
    make("cpmant", 2).save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    original = Original(weights_folder(source), load_skeleton(source, torch.float32))
    assert original.fits
    assert not original.streams


# Memory


@pytest.mark.parametrize("source", ["tied", "untied", "gpt2", "opt", "retrofitted"])
@torch.no_grad()
def test_no_more_than_one_block_has_values_at_a_time(sources: dict[str, Path], source: str) -> None:
    """Looked at whenever a module is called; each block has all of its values in its turn."""
    original = skeleton(sources[source])
    place = next(name for name, module in original.model.named_modules() if module is find_blocks(original.model))
    outside = {name for name in original.tensors if not name.startswith(f"{place}.")}
    turns: list[str] = []

    def look(module: nn.Module, inputs: Any) -> None:
        there = lent(original)
        assert there.pop("") == outside
        assert len(there) <= 1
        for block, names in there.items():
            assert names == {name for name in original.tensors if name.startswith(f"{place}.{block}.")}
            if turns[-1:] != [block]:
                turns.append(block)

    with original.streamed("cpu"):
        assert lent(original) == {"": outside}
        for module in original.model.modules():
            module.register_forward_pre_hook(look)
        original.model(input_ids=TOKENS)
        assert turns == ["0", "1", "2", "3"]
        assert lent(original) == {"": outside}


@torch.no_grad()
def test_a_part_that_is_called_by_itself_has_its_own_values(sources: dict[str, Path]) -> None:
    """Even where another stands in its place, as starts ask the original what it would have said."""
    original, (whole, _) = skeleton(sources["tied"]), load_model(str(sources["tied"]))
    feedforward, x = original.model.model.layers[2].mlp, torch.randn(5, 32)
    seen = []
    feedforward.act_fn.register_forward_pre_hook(lambda module, inputs: seen.append(lent(original)))
    with original.streamed("cpu"):
        assert torch.equal(feedforward(x), whole.model.layers[2].mlp(x))
        assert {name.split(".")[3] for name in seen[0]["2"]} == {"mlp"}
        original.model.model.layers[2].mlp = nn.Linear(32, 32)
        assert torch.equal(feedforward(x), whole.model.layers[2].mlp(x))
        original.model.model.layers[2].mlp = feedforward
    feedforward.act_fn._forward_pre_hooks.clear()
    check_empty(original)


@torch.no_grad()
def test_tied_tensors_stay_one(sources: dict[str, Path]) -> None:
    original = skeleton(sources["tied"])
    with original.streamed("cpu"):
        assert original.model.lm_head.weight is original.model.model.embed_tokens.weight
        assert not original.model.lm_head.weight.is_meta
    assert original.model.lm_head.weight is original.model.model.embed_tokens.weight


def test_what_has_values_of_its_own_keeps_them(sources: dict[str, Path], text: Calibration) -> None:
    """A replacement whose parameters are called as those were that it replaces."""
    source = find_model(str(sources["tied"]))
    spec = complete_spec(load_config(source), SPECS["inherit"])
    original = open_original(source, spec, torch.float32)
    assert original is not None
    with original.streamed("cpu"):
        retrofit_reporting(original.model, spec, text, device="cpu")
        new = {name: each.clone() for name, each in original.model.model.layers[1].mlp.state_dict().items()}
        with torch.no_grad():
            original.model(input_ids=TOKENS)
    for name, tensor in original.model.model.layers[1].mlp.state_dict().items():
        assert torch.equal(tensor, new[name])


# Whatever ends it


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["in front of a block", "inside", "behind", "as values are put in"])
@torch.no_grad()
def test_what_is_interrupted_leaves_a_skeleton(
    sources: dict[str, Path], error: type[BaseException], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        monkeypatch.undo()
        raise error("stopped")

    original = skeleton(sources["tied"])
    block = original.model.model.layers[2]

    def run() -> None:
        with original.streamed("cpu"), contextlib.ExitStack() as stack:
            if place == "in front of a block":
                stack.callback(block.register_forward_pre_hook(stop).remove)
            elif place == "inside":
                stack.callback(block.mlp.up_proj.register_forward_hook(stop).remove)
            elif place == "behind":
                stack.callback(block.register_forward_hook(stop).remove)
            else:
                monkeypatch.setattr(type(block.input_layernorm), "__setattr__", stop, raising=False)
            original.model(input_ids=TOKENS)

    with pytest.raises(error, match="stopped"):
        run()
    check_empty(original)


@torch.no_grad()
def test_after_an_error_it_goes_on_inside(sources: dict[str, Path]) -> None:
    original = skeleton(sources["tied"])
    with original.streamed("cpu"):
        before, expected = lent(original), original.model(input_ids=TOKENS).logits
        with pytest.raises(IndexError):
            original.model(input_ids=TOKENS + 1000)
        with pytest.raises(RuntimeError):
            original.model.model.layers[2].mlp(torch.randn(5, 31))
        assert lent(original) == before
        assert torch.equal(original.model(input_ids=TOKENS).logits, expected)
    check_empty(original)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
@torch.no_grad()
def test_values_that_are_not_finite_are_refused_by_name(sources: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(sources["tied"], tmp_path / "damaged")
    tensors = load_file(folder / SINGLE)
    tensors[name].flatten()[3] = float("nan")
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    original = skeleton(folder)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: 1 of"), original.streamed("cpu"):
        original.model(input_ids=TOKENS)
    check_empty(original)


# What a command does


def test_a_command_streams(
    bundled_tokenizer: Any, tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its record is what it was when models were loaded whole, but for the time it took."""
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    bundled_tokenizer.save_pretrained(tmp_path / "source")
    said = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three. " * 30}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 100)
    text = CalibrationSettings(str(tmp_path / "chat.jsonl"), tokens=512, row_length=64, heldout_tokens=128)
    loaded = []

    def noted(*args: Any) -> Any:
        loaded.append(args)
        return load_weights(*args)

    monkeypatch.setattr(retrofitting, "load_weights", noted)
    values, weights = [], []
    for streams in (True, False):
        monkeypatch.setattr(Original, "streams", streams)
        store = ResultsStore(tmp_path / f"results {streams}")
        bench = Bench(
            store, store.testbed({"cpu": "here"}), tmp_path / f"{streams}", torch.device("cpu"), torch.float32
        )
        spec = KANSpec("last:2", "cheby2", hidden=8, start="lstsq")
        record = engine.retrofit(bench, find_ref(str(tmp_path / "source")), spec, calibration=text)
        assert bool(loaded) != streams
        values.append({each.name: each.value for each in record.metrics if each.name != "start_seconds"})
        weights.append(find_model(str(Path(record.artifacts[0].path).parent)).fingerprint)
    assert values[0] == values[1]
    assert weights[0] == weights[1]


def test_a_gpu_with_room_holds_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_free_bytes", lambda device: 1000)
    assert not calibration.is_tight(torch.device("cuda"), 499)
    assert calibration.is_tight(torch.device("cuda"), 501)
    assert calibration.is_tight(torch.device("cpu"), 1)
