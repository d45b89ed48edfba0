"""The modelling file in a checkpoint: loads it without kallm_bench, bit for bit, and never runs where there is one."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import standalone_reader
import torch
from standalone_reader import TOKENS, logits
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, GPT2Config, MixtralConfig, OPTConfig
from transformers.dynamic_module_utils import get_imports

from kallm_bench.kan import BASES
from kallm_bench.models import KANSpec, find_model, load_checkpoint, load_model, retrofit, save_checkpoint
from kallm_bench.models.modeling import KallmConfig
from kallm_bench.models.standalone import _check, modeling_file

HISTORIES = {  # name: the retrofits that a model went through
    "stack": [KANSpec("1", "cheby2")],
    "single": [KANSpec("1", "cheby2:degree=3", form="single", constant="edge")],
    "gated": [KANSpec("1", "legendre", form="gated", linear=True, scaled=True)],
    "glu": [KANSpec("1", "rational", form="glu", up=True)],
    "glu of a shared basis": [KANSpec("1", "bspline:grid=3,order=2", form="glu", groups=4)],
    "glu of learned functions": [KANSpec("1", "morlet", form="glu", groups=4)],
    "a+b": [KANSpec("1", "cheby2+rbf:centers=4", hidden=16)],
    "a>b": [KANSpec("1", "fourier>jacobi:a=1,b=0.5>relu", hidden=16)],
    "linear": [KANSpec("1", "linear")],
    "narrow": [KANSpec("1", "linear", hidden=24)],
    "drop": [KANSpec("1", "drop")],
    "two retrofits": [KANSpec("all", "cheby2"), KANSpec("1", "mexican-hat")],
    "linear layers": [KANSpec("1", "cheby2", target="linears", hidden=24)],
    "linear layers without activation": [KANSpec("1", "rbf:centers=4", target="linears", activation="drop")],
    "attention": [KANSpec("1", "legendre", target="attention")],
    "adapters": [KANSpec("1", "cheby2", form="adapter", target="linears+attention", rank=3)],
    "gpt2": [KANSpec("0", "cheby4"), KANSpec("1", "linear", hidden=24)],
    "opt": [KANSpec("0", "cheby2"), KANSpec("1", "drop")],
    "adapters of gpt2": [KANSpec("1", "rational", form="adapter-code", target="linears", rank=8)],
    "bloom": [KANSpec("0", "cheby2"), KANSpec("1", "legendre", target="linears")],
    "mixtral": [KANSpec("1", "cheby2", hidden=16, experts=True)],
    **{f"basis {name}": [KANSpec("1", name)] for name in sorted(BASES)},
}


SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES = {  # histories of these names are of these; the others of a Llama
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1),
    "adapters of gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),  # its blocks call two layers themselves
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),  # its feed-forward adds the residual
    "mixtral": MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
}


@torch.no_grad()
def made(history, tiny_llama):
    """A tiny model that went through a history, and whose every parameter has moved since."""
    torch.manual_seed(0)
    if history in ARCHITECTURES:
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[history]).eval()
    else:
        model = tiny_llama(vocab_size=97, num_hidden_layers=2)
    for spec in HISTORIES[history]:
        retrofit(model, spec)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tiny_llama, tmp_path_factory):
    """{name: folder} of a checkpoint for each history."""
    place = tmp_path_factory.mktemp("standalone")
    for number, history in enumerate(HISTORIES):
        save_checkpoint(place / str(number), made(history, tiny_llama))
    return {history: place / str(number) for number, history in enumerate(HISTORIES)}


@pytest.fixture(scope="module")
def without(folders, tmp_path_factory):
    """{name: facts} that standalone_reader.py found in a process without kallm_bench."""
    place = tmp_path_factory.mktemp("without")
    (place / "folders.json").write_text(json.dumps({name: str(folder) for name, folder in folders.items()}))
    own = {"HF_HOME": str(place / "hf"), "HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, standalone_reader.__file__, str(place / "folders.json"), str(place / "facts.pt")]
    done = subprocess.run(program, env=os.environ | own, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(place / "facts.pt")


@pytest.mark.parametrize("history", HISTORIES)
def test_it_computes_the_same_bit_for_bit(folders, without, history):
    for dtype in (torch.float32, torch.bfloat16):
        loaded, _ = load_checkpoint(folders[history], dtype)
        assert without[history]["dtypes"][str(dtype)] == {str(dtype)}
        assert torch.equal(without[history]["logits"][str(dtype)], logits(loaded))
    assert without[history]["class"] == type(loaded).__name__


def test_it_generates_the_same(folders, without):
    loaded, _ = load_checkpoint(folders["stack"])
    said = loaded.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(without["stack"]["generated"], said)


def test_it_is_the_model_it_was(without):
    assert without["stack"]["config"] == ("KallmConfig", "kallm", "llama")
    assert without["stack"]["tied"]


def test_it_comes_where_and_how_it_is_wanted(without):
    expected = without["stack"]["logits"]["torch.float32"]
    for place, got in without["stack"]["placed"].items():
        assert torch.equal(got, expected), place
    for way, (taken, got) in without["stack"]["attention"].items():
        assert taken == way
        torch.testing.assert_close(got, expected)


def test_it_learns_with_gradient_checkpointing(folders, without):
    loaded, _ = load_checkpoint(folders["stack"])
    gradients = torch.autograd.grad(loaded.train()(TOKENS, labels=TOKENS).loss, list(loaded.parameters()))
    for (name, _), gradient in zip(loaded.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            without["stack"]["gradients"][name], gradient, msg=lambda told, n=name: f"{n} {told}"
        )


def test_it_refuses_weights_with_a_hole(without):
    assert without["stack"]["hole"].startswith("CheckpointError: ")
    assert "model.layers.1.mlp.layers.0.coefficients" in without["stack"]["hole"]


def test_it_can_be_saved_again(folders, without):
    """From there, into several shards; and read from that folder with and without kallm_bench."""
    expected = without["stack"]["logits"]["torch.float32"]
    again = Path(f"{folders['stack']}-again")
    assert torch.equal(without["stack"]["again"], expected)
    assert torch.equal(logits(load_checkpoint(again)[0]), expected)
    assert len(list(again.glob("*.safetensors"))) > 1
    for name in ("modeling_kallm.py", "config.json"):
        assert (again / name).read_text() == (folders["stack"] / name).read_text()


# What is in the file


def test_every_basis_can_be_cut_out():
    """Each alone was loaded above; here all of them in one file, whose names must not collide."""
    text = modeling_file([KANSpec("all", name) for name in BASES])
    for name in BASES:
        assert f'name="{name}"' in text
    compile(text, "modeling_kallm.py", "exec")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A = 1\nA = 2", "more than one"),
        ("import re\n\n\ndef re(): ...", "more than one"),
        ("def sum(): ...", "more than one"),
        ("import scipy", "imports"),
        ("from kallm_bench import kan", "imports"),
        ("def f():\n    import re", "inside a function"),
        ("def f(x):\n    return x.reset_parameters()", "needs reset_parameters"),
    ],
)
def test_what_cannot_be_cut_out_is_noticed(text, told):
    with pytest.raises(AssertionError, match=told):
        _check(text)


def test_it_holds_what_the_model_needs_and_no_more(folders):
    text = (folders["stack"] / "modeling_kallm.py").read_text()
    for there in ("Apache-2.0", "kallm_bench 0.", 'name="cheby2"', "class KANFeedForward", "class KallmForCausalLM"):
        assert there in text, there
    for absent in (
        '(ThreeTerm, name="legendre"',
        "triton",
        "scipy",
        "numpy",
        "lstsq(",
        "exec(",
        "eval(",
        "base64",
        "type: ignore",
    ):
        assert absent not in text, absent
    imported = set(get_imports(folders["stack"] / "modeling_kallm.py"))
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_it_reads_as_the_package_does(folders):
    """The same formatter and linter, where they are installed, find nothing in it."""
    pytest.importorskip("ruff")
    for wish in (["check", "--select", "E9,F,W"], ["format", "--check"]):
        program = [sys.executable, "-m", "ruff", *wish, "--isolated", "--line-length", "120", "--no-cache"]
        done = subprocess.run([*program, folders["a>b"] / "modeling_kallm.py"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_untouched_model_needs_none(tiny_llama, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", tiny_llama(vocab_size=97))
    assert not (tmp_path / "checkpoint" / "modeling_kallm.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text())


def test_a_basis_from_outside_has_none(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(BASES["cheby2"], "__module__", "of.a.user")
    save_checkpoint(tmp_path / "checkpoint", made("stack", tiny_llama))
    assert not (tmp_path / "checkpoint" / "modeling_kallm.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    load_checkpoint(tmp_path / "checkpoint")


# Where kallm_bench is


@pytest.fixture
def tampered(folders, tmp_path):
    """A checkpoint whose modelling file leaves a trace where it runs."""
    shutil.copytree(folders["stack"], tmp_path / "checkpoint")
    trace = f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n"
    (tmp_path / "checkpoint" / "modeling_kallm.py").write_text(trace)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("trusting", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
def test_no_code_of_the_folder_runs(folders, tampered, trusting, monkeypatch):
    def asked(*_):
        raise AssertionError("it asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)
    assert type(AutoConfig.from_pretrained(tampered, **trusting)) is KallmConfig
    loaded = AutoModelForCausalLM.from_pretrained(tampered, **trusting)
    assert torch.equal(logits(loaded), logits(load_checkpoint(folders["stack"])[0]))
    assert not (tampered.parent / "it ran").exists()


def test_the_fingerprint_does_not_depend_on_it(folders, tampered):
    expected = find_model(str(folders["stack"])).fingerprint
    assert find_model(str(tampered)).fingerprint == expected
    (tampered / "modeling_kallm.py").unlink()
    config = json.loads((tampered / "config.json").read_text())
    del config["auto_map"]
    (tampered / "config.json").write_text(json.dumps(config))
    assert find_model(str(tampered)).fingerprint == expected
    assert torch.equal(logits(load_model(str(tampered))[0]), logits(load_checkpoint(folders["stack"])[0]))
