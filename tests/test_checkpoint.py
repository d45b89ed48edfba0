"""Checkpoints: what is saved comes back bit for bit, damage is refused in one line, nothing is left half-written."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomForCausalLM, GPT2Config, LlamaForCausalLM, MixtralForCausalLM

from kallm_bench.errors import KallmError
from kallm_bench.files import DiskError, new_folder, write_file
from kallm_bench.models import (
    KANSpec,
    find_model,
    load_checkpoint,
    load_config,
    load_model,
    read_lineage,
    replaced_modules,
    retrofit,
    save_checkpoint,
)
from kallm_bench.models.modeling import retrofitted_class, specs_of

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53, 58, 9, 7]])

HISTORIES = {  # name: the retrofits that a model went through
    "untouched": [],
    "kan": [KANSpec("last:2", "cheby2")],
    "kan, edge": [KANSpec((0,), "legendre:degree=3", form="single", constant="edge")],
    "linear": [KANSpec("1-2", "linear")],
    "narrow": [KANSpec("1-2", "linear", hidden=24)],
    "drop": [KANSpec((3,), "drop")],
    "mixed": [
        KANSpec("all", "cheby2"),
        KANSpec("1,2", "linear", hidden=24),
        KANSpec((2,), "drop"),
        KANSpec((3,), "cheby4"),
    ],
}
RETROFITTED = [name for name in HISTORIES if name != "untouched"]


@pytest.fixture
def make(tiny_llama):
    """Makes a tiny Llama that went through a history."""

    def with_history(history, **settings):
        made = tiny_llama(vocab_size=97, **settings)
        for spec in HISTORIES[history]:
            retrofit(made, spec)
        return made

    return with_history


@pytest.fixture
def model(request, make):
    """One with the history that the test asks for; "mixed" where it asks for none."""
    return make(getattr(request, "param", "mixed"))


@pytest.fixture
def folder(tmp_path, model):
    """A saved checkpoint; loadable, see the first test."""
    save_checkpoint(tmp_path / "checkpoint", model)
    return tmp_path / "checkpoint"


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def contents(folder):
    """Every file below a folder and what is in it."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# There and back


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_gives_back_the_same_logits(make, history, dtype, tmp_path):
    model = make(history, dtype=dtype)
    save_checkpoint(tmp_path / "checkpoint", model)
    loaded, tokenizer = load_checkpoint(tmp_path / "checkpoint", dtype)
    assert torch.equal(logits(loaded), logits(model))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert not loaded.training
    assert tokenizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_checkpoint_comes_in_the_dtype_asked_for(folder, model, dtype):
    loaded, _ = load_checkpoint(folder, dtype)
    for (name, mine), saved in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert mine.dtype == dtype, name
        assert torch.equal(mine, saved.to(dtype)), name


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "save", [save_checkpoint, lambda folder, model: model.save_pretrained(folder)], ids=["ours", "save_pretrained"]
)
def test_the_auto_class_loads_it(make, history, dtype, save, tmp_path):
    model = make(history, dtype=dtype)
    save(tmp_path / "checkpoint", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert isinstance(loaded, LlamaForCausalLM)
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert specs_of(loaded.config) == specs_of(model.config)
    assert list(replaced_modules(loaded)) == list(replaced_modules(model))


def test_the_auto_class_loads_it_in_a_fresh_process(folder, model, tmp_path):
    """As the model card says: `import kallm_bench`, and nothing else of ours."""
    script = f"""
import kallm_bench, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
torch.save(model(torch.tensor({TOKENS.tolist()})).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_another_architecture(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for spec in HISTORIES["mixed"]:
        retrofit(model, spec)
    save_checkpoint(tmp_path / "checkpoint", model)
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("history", HISTORIES)
def test_untied_embeddings_come_back(make, history, tmp_path):
    model = make(history, tie_word_embeddings=False)
    save_checkpoint(tmp_path / "checkpoint", model)
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_the_tokenizer_comes_back(tiny_llama, bundled_tokenizer, tmp_path):
    model = tiny_llama()
    retrofit(model, KANSpec("last:2", "cheby2"))
    save_checkpoint(tmp_path / "checkpoint", model, bundled_tokenizer)
    _, tokenizer = load_checkpoint(tmp_path / "checkpoint")
    chat = [{"role": "user", "content": "Was it 1987 or\n\n1988?"}]
    said = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer(chat[0]["content"]).input_ids == bundled_tokenizer(chat[0]["content"]).input_ids
    assert tokenizer.apply_chat_template(chat, **said) == bundled_tokenizer.apply_chat_template(chat, **said)


def test_the_generation_settings_come_back(model, tmp_path):
    model.generation_config.max_new_tokens = 7
    model.generation_config.repetition_penalty = 1.25
    save_checkpoint(tmp_path / "checkpoint", model)
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.generation_config.repetition_penalty == 1.25


@pytest.mark.parametrize("model", RETROFITTED, indirect=True)
def test_a_loaded_checkpoint_can_be_retrofitted_and_saved_again(model, folder, tmp_path):
    loaded, _ = load_checkpoint(folder)
    for each in (model, loaded):
        retrofit(each, KANSpec("0-1", "linear", seed=3))
    assert torch.equal(logits(loaded), logits(model))
    save_checkpoint(tmp_path / "second", loaded)
    again, _ = load_checkpoint(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    assert specs_of(again.config) == specs_of(model.config)


@pytest.mark.parametrize("model", ["untouched", "kan", "kan, edge", "narrow"], indirect=True)
def test_a_checkpoint_can_go_on_learning(folder):
    loaded, _ = load_checkpoint(folder)
    gradients = torch.autograd.grad(loaded.train()(TOKENS, labels=TOKENS).loss, list(loaded.parameters()))
    for (name, _), gradient in zip(loaded.named_parameters(), gradients, strict=True):
        assert gradient.any(), name


# What lies in the folder


def test_what_the_folder_holds(folder, model):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "kallm.json",
        "model.safetensors",
        "modeling_kallm.py",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "kallm"
    assert config["architectures"] == ["KallmForCausalLM"]
    assert type(model).__name__ == type(model).kallm_base.__name__
    assert config["auto_map"] == {
        "AutoConfig": "modeling_kallm.KallmConfig",
        "AutoModelForCausalLM": "modeling_kallm.KallmForCausalLM",
    }
    assert config["base_config"]["model_type"] == "llama"
    assert config["base_config"]["hidden_size"] == 32
    assert [KANSpec.from_json(entry) for entry in config["retrofits"]] == specs_of(model.config)


@pytest.mark.parametrize("model", HISTORIES, indirect=True)
def test_no_path_of_this_machine(folder, tmp_path):
    loaded, _ = load_checkpoint(folder)  # from_pretrained notes the path it read from
    retrofit(loaded, KANSpec((0,), "drop"))
    save_checkpoint(tmp_path / "second", loaded)
    for written in (folder, tmp_path / "second"):
        for path, content in contents(written).items():
            assert str(tmp_path).encode() not in content, path


@pytest.mark.parametrize("model", HISTORIES, indirect=True)
def test_the_configuration_alone(model, folder):
    config = load_config(find_model(str(folder)))
    assert config.model_type == "llama"
    assert config.hidden_size == 32
    assert specs_of(config) == specs_of(model.config)


def test_lineage(model, tmp_path):
    lineage = [{"id": "a1", "key": "k1", "stage": "retrofit"}, {"id": "b2", "key": "k2", "stage": "train"}]
    save_checkpoint(tmp_path / "checkpoint", model, lineage=lineage)
    note = json.loads((tmp_path / "checkpoint" / "kallm.json").read_text())
    assert note == {"lineage": lineage, "base": {}}
    assert read_lineage(tmp_path / "checkpoint") == lineage
    assert "b2" in (tmp_path / "checkpoint" / "README.md").read_text()


def test_the_fingerprint_is_of_the_weights(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first, copied = (find_model(str(tmp_path / name)).fingerprint for name in ("checkpoint", "copy"))
    assert first == copied
    model.model.norm.weight.data[0] += 1
    save_checkpoint(tmp_path / "changed", model)
    assert find_model(str(tmp_path / "changed")).fingerprint != first


def test_weights_in_several_files(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    assert torch.equal(logits(loaded), logits(model))


# What the ecosystem does with it

TYPICAL = [KANSpec((1,), "cheby2", scaled=True), KANSpec((2,), "rational", form="glu"), KANSpec((3,), "linear")]


@pytest.fixture
def typical(tiny_llama, tmp_path):
    """A model with a KAN, learned functions and a restart in it, and its checkpoint."""
    model = tiny_llama(vocab_size=97)
    for spec in TYPICAL:
        retrofit(model, spec)
    save_checkpoint(tmp_path / "checkpoint", model)
    return model, tmp_path / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"], ids=str)
def test_the_auto_class_takes_a_dtype(typical, dtype):
    model, folder = typical
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for (name, mine), saved in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert mine.dtype == wanted, name
        assert torch.equal(mine, saved.to(wanted)), name
    assert logits(loaded).isfinite().all()


@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_the_auto_class_takes_a_way_of_attention(typical, way):
    model, folder = typical
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=way)
    assert loaded.config._attn_implementation == way
    torch.testing.assert_close(logits(loaded), logits(model))
    other = "sdpa" if way == "eager" else "eager"
    loaded.set_attn_implementation(other)
    assert loaded.config._attn_implementation == other
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("base", [LlamaForCausalLM, MixtralForCausalLM, BloomForCausalLM])
def test_what_may_be_set_is_as_in_the_architecture(base):
    """transformers reads it off the source file of a class, which is another one here."""
    ours = retrofitted_class(base)
    assert ours._can_set_attn_implementation() == base._can_set_attn_implementation()
    assert ours._can_set_experts_implementation() == base._can_set_experts_implementation()


@pytest.mark.parametrize("place", [{"": "cpu"}, "cpu", "auto"], ids=str)
def test_the_auto_class_takes_a_device_map(typical, place):
    model, folder = typical
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=place)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded).cpu(), logits(model))


@pytest.mark.parametrize("form", ["kan", "mixed"])
def test_small_shards_give_the_same(make, form, tmp_path):
    model = make(form)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="5KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 4
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")), logits(model))


def test_the_auto_class_refuses_weights_with_a_hole(folder):
    edit_weights(lambda tensors: tensors.pop("model.layers.0.mlp.layers.0.coefficients"))(folder)
    with pytest.raises(KallmError, match=r"model\.layers\.0\.mlp\.layers\.0\.coefficients"):
        AutoModelForCausalLM.from_pretrained(folder)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == {"model.layers.0.mlp.layers.0.coefficients"}
    assert isinstance(loaded, LlamaForCausalLM)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # its name before
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(typical, reentrant):
    _, folder = typical
    plain, saving = (load_checkpoint(folder)[0].train() for _ in range(2))
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model(TOKENS, labels=TOKENS).loss.backward()
    assert any(getattr(part, "gradient_checkpointing", False) for part in saving.modules())
    for (name, mine), other in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_whole(typical, backend):
    model, folder = typical
    loaded, _ = load_checkpoint(folder)
    torch.compiler.reset()
    compiled = torch.compile(loaded, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits(model))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_peft_adds_lora(typical, tmp_path):
    """One step of training, the adapter saved, put onto the checkpoint again, and merged into it."""
    peft = pytest.importorskip("peft")
    model, folder = typical
    loaded, _ = load_checkpoint(folder)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(loaded, settings)
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(learning) == 2 * 2 * 4  # two matrices, of two projections, in four blocks
    optimizer = torch.optim.AdamW(learning, lr=0.01)
    before = adapted(TOKENS, labels=TOKENS).loss
    for _ in range(4):
        optimizer.zero_grad()
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    adapted.eval()
    assert adapted(TOKENS, labels=TOKENS).loss < before
    assert not torch.equal(logits(adapted), logits(model))
    adapted.save_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(load_checkpoint(folder)[0], tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(adapted))
    merged = again.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(logits(merged), logits(adapted))
    save_checkpoint(tmp_path / "merged", merged)
    assert torch.equal(logits(load_checkpoint(tmp_path / "merged")[0]), logits(merged))


# Damage


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def as_folder(path):
    path.unlink()
    path.mkdir()


def edit_retrofit(**fields):
    return edit_config(lambda config: config["retrofits"][0].update(fields))


CONFIG_DAMAGE = {  # name: what is done to the folder, what the message must name
    "blocks in words": (
        edit_config(lambda config: config["base_config"].update(num_hidden_layers="four")),
        "cannot load",
    ),
    "a base model that is none": (edit_config(lambda config: config.update(base_config=5)), "cannot load"),
    "config.json gone": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config.json truncated": (lambda folder: truncate(folder / "config.json"), "config.json"),
    "config.json garbage": (replace_file("config.json", b"\xff\xfe garbage"), "config.json"),
    "config.json a list": (replace_file("config.json", b"[]"), "config.json"),
    "config.json without content": (replace_file("config.json", b"{}"), "config.json"),
    "a base model unknown": (edit_config(lambda config: config["base_config"].update(model_type="llamma")), "'llamma'"),
    "no base model": (edit_config(lambda config: config.pop("base_config")), "base model"),
}


def one_value(name, value):
    def put(tensors):
        tensors[name].view(-1)[-1] = value

    return edit_weights(put)


COEFFICIENTS = "model.layers.0.mlp.layers.0.coefficients"
DAMAGE = {
    **CONFIG_DAMAGE,
    "weights truncated": (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors"),
    "weights empty": (replace_file("model.safetensors", b""), "model.safetensors"),
    "weights garbage": (replace_file("model.safetensors", b"\xff" * 1000), "model.safetensors"),
    "no heads": (edit_config(lambda config: config["base_config"].update(num_attention_heads=0)), "cannot load"),
    "weights that are a folder": (lambda folder: as_folder(folder / "model.safetensors"), "model.safetensors"),
    "weights gone": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "a tensor missing": (edit_weights(lambda tensors: tensors.pop(COEFFICIENTS)), f"lacks: {COEFFICIENTS}"),
    "a tensor too many": (edit_weights(lambda tensors: tensors.update(stray=torch.zeros(3))), "not know: stray"),
    "a tensor of another shape": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)})),
        "model.norm.weight is (5,), its config.json wants (32,)",
    ),
    "another degree": (
        edit_retrofit(degree=3),
        f"{COEFFICIENTS} is (16, 2, 32), its config.json wants (16, 3, 32)",
    ),
    "a value that is none": (one_value(COEFFICIENTS, float("nan")), f"{COEFFICIENTS} is damaged: 1 of its"),
    "an endless value": (one_value("model.embed_tokens.weight", float("-inf")), "model.embed_tokens.weight is damaged"),
    "a newer retrofit": (edit_retrofit(version=2), "version 2 of the format, by a newer kallm"),
    "a newer retrofit, and what to do": (edit_retrofit(version=2), "pip install --upgrade kallm-bench"),
    "a retrofit of no version": (edit_config(lambda config: config["retrofits"][0].pop("version")), "version None"),
    "an adapter beside it": (replace_file("adapter_config.json", b"{}"), "adapter"),
    "a retrofit without its basis": (edit_config(lambda config: config["retrofits"][0].pop("basis")), "'basis'"),
    "a retrofit with a field too many": (edit_retrofit(colour="red"), "'colour'"),
    "a retrofit of an unknown basis": (edit_retrofit(basis="cheby9"), "'cheby9'"),
    "a retrofit outside the model": (edit_retrofit(blocks=[3, 4]), "4"),
    "a retrofit of the wrong type": (edit_retrofit(hidden="wide"), "wide"),
    "a retrofit that is none": (edit_config(lambda config: config.update(retrofits=["cheby2"])), "cannot load"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder, damage, named):
    damage(folder)
    before = contents(folder)
    with pytest.raises(KallmError) as refused:
        load_checkpoint(folder)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_values_that_are_not_finite_are_refused_in_every_dtype(make, dtype, value, tmp_path):
    model = make("kan", dtype=dtype)
    model.model.layers[1].self_attn.q_proj.weight.data[3, 4] = value
    save_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(KallmError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight is damaged"):
        load_checkpoint(tmp_path / "checkpoint", dtype)


def test_a_value_near_the_end_of_its_dtype_is_finite(make, tmp_path):
    model = make("kan", dtype=torch.float64)
    model.model.norm.weight.data[0] = 1e300
    save_checkpoint(tmp_path / "checkpoint", model)
    assert load_checkpoint(tmp_path / "checkpoint", torch.float64)[0].model.norm.weight[0] == 1e300


@pytest.mark.parametrize(("damage", "named"), CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE)
def test_a_damaged_configuration_is_refused_in_one_line(folder, damage, named):
    source = find_model(str(folder))
    damage(folder)
    with pytest.raises(KallmError) as refused:
        load_config(source)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"lineage": 3}', b"\xff"])
def test_a_damaged_lineage_is_refused_in_one_line(folder, content):
    (folder / "kallm.json").write_bytes(content)
    with pytest.raises(KallmError, match=r"kallm\.json") as refused:
        read_lineage(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another safetensors file"])
def test_other_formats_are_never_read(folder, model, beside):
    (folder / "model.safetensors").rename(folder / ("other.safetensors" if beside else "other"))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(KallmError, match="safetensors") as refused:
        load_model(str(folder))
    assert "\n" not in str(refused.value)


# Whole or not at all


def test_an_existing_folder_is_left_alone(model, folder):
    before = contents(folder)
    model.model.norm.weight.data.add_(1)
    with pytest.raises(DiskError, match="exists"):
        save_checkpoint(folder, model)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


def test_an_existing_folder_is_replaced_when_asked(model, folder):
    (folder / "old.txt").write_text("old")
    model.model.norm.weight.data.add_(1)
    save_checkpoint(folder, model, replace=True)
    assert not (folder / "old.txt").exists()
    assert torch.equal(logits(load_checkpoint(folder)[0]), logits(model))
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_folder_leaves_nothing_behind(tmp_path, replace, error):
    if replace:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "old.txt").write_text("old")
    before = contents(tmp_path)

    def write():
        with new_folder(tmp_path / "folder", replace=replace) as temporary:
            (temporary / "new.txt").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == replace


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "folder") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "new.txt").write_text("new")
        assert not (tmp_path / "deep" / "folder").exists()
    assert (tmp_path / "deep" / "folder" / "inner" / "new.txt").read_text() == "new"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_no_space_for_a_folder(tmp_path):
    with pytest.raises(DiskError) as refused, new_folder(tmp_path / "folder", needed_bytes=10**18):
        pass
    assert "1000000000.00 GB" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def files_of_at_most(size):
    """The system refuses to let any file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 10_000])  # refused in config.json, in the weights
def test_a_disk_that_fills_up_while_saving(model, tmp_path, size):
    with pytest.raises(DiskError) as refused, files_of_at_most(size):
        save_checkpoint(tmp_path / "checkpoint", model)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_replacing(model, folder, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(DiskError), files_of_at_most(10_000):
        save_checkpoint(folder, model, replace=True)
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "checkpoint"):
        with pytest.raises(DiskError) as refused:
            save_checkpoint(place, model)
        assert "\n" not in str(refused.value)
    assert contents(tmp_path) == {(tmp_path / "file").relative_to(tmp_path): b"in the way"}


def test_a_file_appears_whole(tmp_path):
    write_file(tmp_path / "deep" / "file.json", b"first")
    write_file(tmp_path / "deep" / "file.json", b"second")
    with pytest.raises(DiskError), files_of_at_most(3):
        write_file(tmp_path / "deep" / "file.json", b"third")
    assert contents(tmp_path / "deep") == {(tmp_path / "file.json").relative_to(tmp_path): b"second"}
