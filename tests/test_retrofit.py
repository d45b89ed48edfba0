"""Retrofits: which blocks, what is refused, what changes, and that nothing else does."""

import json
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    Qwen2Config,
    Qwen2MoeConfig,
)

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, FORMS, KANFeedForward
from kallm_bench.models import KANSpec, replaced_modules, retrofit
from kallm_bench.models.sites import intermediate_size
from kallm_bench.models.spec import NOT_BASES, read_blocks

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 32, "n_inner": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
BLOOM_SIZES = {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4}
MPT_SIZES = {"vocab_size": 97, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64}

FAMILIES = {  # name: configuration, its settings, where the feed-forward of a block is
    "llama": (LlamaConfig, SIZES, "model.layers.{}.mlp."),
    "qwen2": (Qwen2Config, SIZES, "model.layers.{}.mlp."),
    "gpt_neox": (GPTNeoXConfig, SIZES, "gpt_neox.layers.{}.mlp."),
    "gpt2": (GPT2Config, GPT2_SIZES, "transformer.h.{}.mlp."),  # its linear layers are Conv1D
}
ODD_FAMILIES = {  # whose feed-forward is none, several, or more than a function of the hidden states
    "bert": (BertConfig, {**SIZES, "is_decoder": True}),
    "bloom": (BloomConfig, BLOOM_SIZES),
    "mixtral": (MixtralConfig, SIZES),
    "mpt": (MptConfig, MPT_SIZES),
    "opt": (OPTConfig, {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "qwen2_moe": (Qwen2MoeConfig, {**SIZES, "num_experts": 4, "moe_intermediate_size": 16}),
}

SPECS = {  # a spec of every kind, without its blocks
    "cheby2": {"basis": "cheby2"},
    "single": {"basis": "legendre:degree=3", "form": "single", "constant": "edge"},
    "linear": {"basis": "linear"},
    "narrow": {"basis": "linear", "hidden": 24},
    "drop": {"basis": "drop"},
}

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53, 58, 9, 7]])


def make(config_class, settings, seed=0):
    torch.manual_seed(seed)
    config = config_class(**{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(first, second):
    assert list(first) == list(second)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("25-29", (25, 26, 27, 28, 29)),
        ("0,3,5-7", (0, 3, 5, 6, 7)),
        ("7,2", (7, 2)),
        ("3-3", (3,)),
        ("29", (29,)),
        ("last:5", (25, 26, 27, 28, 29)),
        ("last:30", tuple(range(30))),
        ("all", tuple(range(30))),
    ],
)
def test_blocks(text, blocks):
    assert read_blocks(text, 30) == blocks
    assert KANSpec(text, "cheby2").resolved(30).blocks == blocks
    assert KANSpec(blocks, "cheby2").resolved(30).blocks == blocks


MALFORMED = ["", ",", "x", "5-", "-5", "1-2-3", "3,,4", "1;2", "2.5", "last", "last:", "last:x", "first:3", "9" * 5000]
OUT_OF_RANGE = ["30", "28-30", "0,31", "last:31", "1000000000000000000000"]
DOUBLED = ["2,2", "1-3,2", "5,1-6"]
REVERSED = ["29-25", "7,6-5"]
NONE = ["last:0", "last:-1"]
HUGE = ["0-99999999999999", "99999999999998-99999999999999", "last:99999999999999"]  # too many to write out


@pytest.mark.parametrize("text", MALFORMED + OUT_OF_RANGE + DOUBLED + REVERSED + NONE + HUGE)
def test_blocks_that_cannot_be(text):
    with pytest.raises(SpecError) as refused:
        read_blocks(text, 30)
    message = str(refused.value)
    assert "0-29" in message, f"does not say which blocks there are: {message[:200]}"
    assert "\n" not in message


@pytest.mark.parametrize("blocks", [(), (30,), (-1,), (3, 4, 3)], ids=str)
def test_block_numbers_that_cannot_be(blocks):
    with pytest.raises(SpecError, match="0-29"):
        KANSpec(blocks, "cheby2").resolved(30)


def test_no_text_of_blocks_breaks_the_reader():
    """Random scribbles are read or refused, never anything else; what is read are different blocks of the model."""
    scribble = random.Random(0)
    for _ in range(5000):
        text = "".join(scribble.choice("0123579-,: al") for _ in range(scribble.randrange(8)))
        try:
            blocks = read_blocks(text, 30)
        except SpecError:
            continue
        assert blocks
        assert len(set(blocks)) == len(blocks)
        assert set(blocks) <= set(range(30))


# Specs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"basis": "chebby2"}, "no basis 'chebby2'. Did you mean 'cheby2'?"),
        ({"basis": "lineer"}, "Did you mean 'linear'?"),
        ({"basis": "zzzz"}, "drop"),
        ({"basis": "cheby2", "degree": 0}, "degree must be"),
        ({"basis": "cheby2", "degree": 99}, "99"),
        ({"basis": "cheby2:degree=3", "degree": 4}, "twice"),
        ({"basis": "linear", "degree": 2}, "'linear' has no degree"),
        ({"basis": "drop", "degree": 2}, "'drop' has no degree"),
        ({"basis": "drop", "hidden": 8}, "'drop' has no hidden"),
        ({"basis": "cheby2", "form": "single", "hidden": 8}, "'single' is one layer"),
        ({"basis": "cheby2", "form": "stak"}, "Did you mean 'stack'?"),
        ({"basis": "cheby2", "constant": "edges"}, "Did you mean 'edge'?"),
        ({"basis": "linear", "form": "stak"}, "Did you mean 'stack'?"),
        ({"basis": "linear", "constant": "edges"}, "Did you mean 'edge'?"),
        ({"basis": "cheby2", "hidden": 0}, "hidden must be at least 1, got 0"),
        ({"basis": "linear", "hidden": -3}, "hidden must be at least 1, got -3"),
    ],
    ids=str,
)
def test_specs_that_cannot_be(settings, message):
    with pytest.raises(SpecError) as refused:
        KANSpec("all", **settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("blocks", ["last:2", (1, 3)], ids=str)
def test_a_spec_survives_json(settings, blocks):
    spec = KANSpec(blocks, **settings, seed=7)
    assert KANSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(version=data["version"] + 1),
        lambda data: data.pop("version"),
        lambda data: data.pop("blocks"),
        lambda data: data.update(colour="red"),
        lambda data: data.update(basis="chebby2"),
    ],
    ids=["newer", "no version", "field missing", "field unknown", "basis unknown"],
)
def test_json_that_is_no_spec(change):
    data = KANSpec("all", "cheby2").to_json()
    change(data)
    with pytest.raises(SpecError):
        KANSpec.from_json(data)


def test_a_field_that_came_later_takes_its_default():
    data = KANSpec("all", "cheby2").to_json()
    del data["seed"]
    assert KANSpec.from_json(data) == KANSpec("all", "cheby2")


# Surgery


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_only_the_named_blocks_change(family, settings):
    config_class, sizes, place = FAMILIES[family]
    model = make(config_class, sizes)
    kind, before, logits_before = type(model), copy_of(model), logits(model)
    spec = retrofit(model, KANSpec("1,3", **settings))

    places = tuple(place.format(block) for block in (1, 3))
    after = model.state_dict()
    kept = {name for name in before if not name.startswith(places)}
    assert kept == {name for name in after if not name.startswith(places)}
    for name in kept:
        assert torch.equal(after[name], before[name]), name

    assert isinstance(model, kind)
    assert spec.blocks == (1, 3)
    assert list(replaced_modules(model)) == [1, 3]
    assert model.config.kallm == [spec.to_json()]
    changed = logits(model)
    assert changed.shape == logits_before.shape
    assert changed.isfinite().all()
    assert not torch.equal(changed, logits_before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_generation_with_and_without_the_cache(family, settings):
    config_class, sizes, _ = FAMILIES[family]
    model = make(config_class, {**sizes, "eos_token_id": None})
    retrofit(model, KANSpec("1,3", **settings))
    how = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(TOKENS, use_cache=True, **how)
    assert cached.shape == (2, TOKENS.shape[1] + 6)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **how))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_no_token_sees_a_later_one(family, settings):
    config_class, sizes, _ = FAMILIES[family]
    model = make(config_class, sizes)
    retrofit(model, KANSpec("all", **settings))
    before = logits(model)
    for changed in (0, 4, TOKENS.shape[1] - 1):
        tokens = TOKENS.clone()
        tokens[:, changed] = 50
        after = logits(model, tokens)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert not torch.equal(after[:, changed:], before[:, changed:])


@pytest.mark.parametrize("basis", sorted([*BASES, *NOT_BASES]))
def test_everything_that_may_stand_in_a_block(tiny_llama, basis):
    model = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("last:2", basis))
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_models_of_any_depth(tiny_llama, depth, form):
    """Also those as deep as a replacement has layers: which list holds the blocks must not be in doubt."""
    model = tiny_llama(vocab_size=97, num_hidden_layers=depth)
    retrofit(model, KANSpec("all", "cheby2", form=form))
    assert list(replaced_modules(model)) == list(range(depth))
    retrofit(model, KANSpec((0,), "linear"))
    assert not isinstance(replaced_modules(model)[0], KANFeedForward)


@pytest.mark.parametrize("family", ODD_FAMILIES)
@pytest.mark.parametrize("basis", ["cheby2", "linear", "drop"])
def test_an_odd_model_is_refused_or_runs(family, basis):
    model = make(*ODD_FAMILIES[family])
    before = copy_of(model)
    refusal = None
    try:
        retrofit(model, KANSpec("all", basis))
    except SpecError as error:
        refusal = str(error)
    if refusal is None:
        assert logits(model).isfinite().all()
    else:
        assert "\n" not in refusal
        assert_equal_states(model.state_dict(), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": "3-4", "basis": "cheby2"},
        {"blocks": "3,3", "basis": "linear"},
        {"blocks": "all", "basis": "linear"},  # blocks 2 and 3 route to experts, for which no start is known
    ],
    ids=str,
)
@pytest.mark.parametrize("already", [False, True], ids=["untouched", "retrofitted before"])
def test_a_refused_retrofit_changes_nothing(settings, already):
    model = make(Qwen2MoeConfig, {**ODD_FAMILIES["qwen2_moe"][1], "mlp_only_layers": [0, 1]})
    if already:
        retrofit(model, KANSpec((0,), "drop"))
    kind, notes, before, logits_before = (
        type(model),
        getattr(model.config, "kallm", None),
        copy_of(model),
        logits(model),
    )
    with pytest.raises(SpecError):
        retrofit(model, KANSpec(**settings))
    assert type(model) is kind
    assert getattr(model.config, "kallm", None) == notes
    assert_equal_states(model.state_dict(), before)
    assert torch.equal(logits(model), logits_before)


@pytest.mark.parametrize("settings", [SPECS[name] for name in SPECS if name != "drop"], ids=[*SPECS][:-1])
def test_the_seed_decides(tiny_llama, settings):
    first, same, other = (tiny_llama(vocab_size=97, seed=model_seed) for model_seed in (0, 1, 0))
    for model, seed in ((first, 5), (same, 5), (other, 6)):
        torch.manual_seed(seed + 100)  # nothing may come from the global generator
        retrofit(model, KANSpec("1,3", **settings, seed=seed))
    drawn = [replaced_modules(model)[block].state_dict() for model in (first, same, other) for block in (1, 3)]
    assert_equal_states(drawn[0], drawn[2])
    assert_equal_states(drawn[1], drawn[3])
    for name, tensor in drawn[0].items():
        if tensor.any():  # biases start at zero
            assert not torch.equal(tensor, drawn[1][name]), "equal in both blocks"
            assert not torch.equal(tensor, drawn[4][name]), "equal for both seeds"


def test_the_global_generator_is_left_alone(tiny_llama):
    model = tiny_llama(vocab_size=97)
    state = torch.get_rng_state()
    retrofit(model, KANSpec("all", "cheby2"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_restart_has_the_shape_of_the_original_and_other_values(family):
    config_class, sizes, place = FAMILIES[family]
    model = make(config_class, sizes)
    before = copy_of(model)
    retrofit(model, KANSpec((2,), "linear"))
    after = model.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    weights = [name for name in after if name.startswith(place.format(2)) and after[name].dim() == 2]
    assert weights
    for name in weights:
        assert not torch.equal(after[name], before[name])
        assert after[name].std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [1, 24, 32, 100])  # 32 is the model's own width, easily mistaken for the inner one
def test_a_linear_restart_of_another_width(family, hidden):
    config_class, sizes, _ = FAMILIES[family]
    model, original = make(config_class, sizes), make(config_class, sizes)
    for each, width in ((model, hidden), (original, 64)):
        retrofit(each, KANSpec((2,), "linear", hidden=width))
    for mine, theirs in zip(*(replaced_modules(each)[2].parameters() for each in (model, original)), strict=True):
        assert tuple(mine.shape) == tuple(hidden if size == 64 else size for size in theirs.shape)
    assert logits(model).isfinite().all()


def test_a_linear_restart_narrowed_and_widened_again(tiny_llama):
    model = tiny_llama(vocab_size=97)
    before = parameters(model)
    for hidden in (32, 64):
        retrofit(model, KANSpec((2,), "linear", hidden=hidden))
    assert parameters(model) == before


def test_default_widths(tiny_llama):
    model = tiny_llama(vocab_size=97)
    assert retrofit(model, KANSpec((0,), "cheby2")) == KANSpec((0,), "cheby2", degree=2, hidden=16, start="random")
    assert retrofit(model, KANSpec((1,), "linear")) == KANSpec((1,), "linear", start="random")
    assert retrofit(model, KANSpec((2,), "drop")) == KANSpec((2,), "drop", start="random")
    assert retrofit(model, KANSpec((3,), "legendre", form="single")).hidden is None
    # of the original, not of what stands there now
    retrofit(model, KANSpec((0,), "linear"))
    assert intermediate_size(model.model.layers[0].mlp, 32) == 64
    assert retrofit(model, KANSpec((2,), "cheby2")).hidden == 16
    assert retrofit(model, KANSpec((0,), "cheby2:degree=5", constant="edge")).degree is None
    assert replaced_modules(model)[0].layers[0].coefficients.shape == (16, 6, 32)


def test_dropping_leaves_the_attention_alone(tiny_llama):
    model = tiny_llama(vocab_size=97)
    silent = tiny_llama(vocab_size=97)
    retrofit(model, KANSpec("all", "drop"))
    for layer in silent.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    assert torch.equal(logits(model), logits(silent))
    assert parameters(model) == parameters(silent) - 4 * 3 * 32 * 64


def test_a_later_retrofit_wins_where_it_says_so(tiny_llama):
    model = tiny_llama(vocab_size=97)
    kan = retrofit(model, KANSpec("0-2", "cheby2"))
    first = copy_of(model)
    linear = retrofit(model, KANSpec((1,), "linear"))
    drop = retrofit(model, KANSpec((2,), "drop"))

    assert model.config.kallm == [spec.to_json() for spec in (kan, linear, drop)]
    modules = replaced_modules(model)
    assert list(modules) == [0, 1, 2]
    assert isinstance(modules[0], KANFeedForward)
    assert parameters(modules[1]) == 3 * 32 * 64
    assert parameters(modules[2]) == 0
    for name, tensor in modules[0].state_dict().items():
        assert torch.equal(tensor, first[f"model.layers.0.mlp.{name}"])
    fresh = tiny_llama(vocab_size=97)
    retrofit(fresh, KANSpec((1,), "linear"))
    assert_equal_states(modules[1].state_dict(), replaced_modules(fresh)[1].state_dict())
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_dtype_and_mode_are_kept(tiny_llama, settings, dtype, training):
    model = tiny_llama(vocab_size=97).to(dtype).train(training)
    retrofit(model, KANSpec("last:2", **settings))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {module.training for module in model.modules()} == {training}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("settings", SPECS.values(), ids=SPECS)
def test_the_device_is_kept(settings):
    with torch.device("meta"):
        model = make(LlamaConfig, SIZES)
    retrofit(model, KANSpec("last:2", **settings))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_untouched_model_has_nothing_replaced(tiny_llama):
    assert replaced_modules(tiny_llama(vocab_size=97)) == {}
