"""Tiny random models of every causal-LM architecture that the installed transformers has, and what a retrofit makes of
them: the table in kallm_bench/models/ARCHITECTURES.md.

Run it: python tests/architectures.py
"""

from __future__ import annotations

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kallm_bench.errors import SpecError
from kallm_bench.models import KANSpec, replaced_modules, retrofit, save_checkpoint
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.sites import Site

TABLE = Path(__file__).parent.parent / "kallm_bench" / "models" / "ARCHITECTURES.md"

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""The model_type of every architecture."""

SIZES = {
    "vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "moe_intermediate_size": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "n_head": 4, "n_heads": 4, "attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "head_dim": 8, "rotary_dim": 4,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "mamba_n_heads": 8, "mamba_d_head": 8,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
}  # fmt: skip
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu")
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **{kind: {"num_key_value_heads": 4} for kind in LATENT},
}
"""What some need beside sizes; those of LATENT have as many keys as queries."""

MOST_PARAMETERS = 30_000_000
TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture: "covered" and how, "refused" or "not tried" and why."""

    status: str
    text: str


class NoTinyModelError(Exception):
    """The architecture takes more than a few sizes to be made small, or does not run when it is."""


@functools.cache
def examine(kind: str) -> Outcome:
    """Retrofits one block, and has the model learn, generate, and be saved and loaded.

    Raises:
        AssertionError: something of this went wrong that goes well without the retrofit.
    """
    reason = ""
    for depth in (2, 4):  # some hybrids need four blocks to have one of each sort
        try:
            return _examine(kind, depth)
        except NoTinyModelError as error:
            reason = str(error)
    return Outcome("not tried", reason)


def _examine(kind: str, depth: int) -> Outcome:
    model = make(kind, depth)
    try:
        places = Anatomy(model).covered()
    except SpecError as error:
        return Outcome("refused", str(error).partition(": ")[2])
    blocks = [number for number, place in enumerate(places) if isinstance(place, Site)]
    if not blocks:
        return Outcome("refused", f"a block {places[0]}")
    first = places[blocks[0]]
    assert isinstance(first, Site)
    described = _describe(model, first, len(blocks), len(places))
    spec = KANSpec((blocks[-1],), "cheby2", hidden=8, experts=True)
    try:
        retrofit(model, spec)
        exercise(model)
    except Exception as error:  # someone else's model may fail in any way; is it the retrofit that does?
        try:
            exercise(make(kind, depth))
        except Exception as own:  # no: the untouched model fails too
            raise NoTinyModelError(f"made small it fails by itself, with {type(own).__name__}") from own
        raise AssertionError(f"{kind}: {error!r}") from error
    return Outcome("covered", described)


def make(kind: str, depth: int) -> PreTrainedModel:
    """A random one of width 32. NoTinyModelError where these sizes do not make one."""
    try:
        known = set(CONFIG_MAPPING[kind]().to_dict()) | set(CONFIG_MAPPING[kind].attribute_map)
        sizes = SIZES | dict.fromkeys(DEPTHS, depth)
        config = CONFIG_MAPPING[kind](**{name: sizes[name] for name in known & set(sizes)} | SPECIAL.get(kind, {}))
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in architecture._from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise NoTinyModelError("a model of several parts, whose sizes lie deeper")
        torch.manual_seed(0)
        return architecture._from_config(config).eval()
    except NoTinyModelError:
        raise
    except Exception as error:  # whatever a configuration of someone else's does not like
        raise NoTinyModelError(f"these sizes make none, with {type(error).__name__}") from error


def made(kind: str, depth: int) -> PreTrainedModel | None:
    """The same, or None."""
    try:
        return make(kind, depth)
    except NoTinyModelError:
        return None


def exercise(model: PreTrainedModel) -> None:
    """One training step, greedy tokens with and without the cache, and what is saved comes back."""
    model.train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for module in replaced_modules(model).values():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    torch.optim.SGD(model.parameters(), 1e-4).step()
    model.eval()
    how = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False}
    cached = model.generate(TOKENS, use_cache=True, **how)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **how)), "the cache changes what is generated"
    round_trip(model)


@torch.no_grad()
def round_trip(model: PreTrainedModel) -> None:
    """Saves, loads, and compares the logits bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(f"{folder}/saved", model)
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/saved").eval()
        assert torch.equal(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits), "other logits when loaded"


def _describe(model: PreTrainedModel, site: Site, covered: int, blocks: int) -> str:
    block = next(name for name, module in model.named_modules() if module is Anatomy(model).blocks[site.block])
    inner = [path.removeprefix(f"{block}.") for path in site.chain]
    if site.adds:
        how = f"`{site.path.removeprefix(f'{block}.')}`, which adds the residual"
    elif inner:
        how = f"`{inner[0]}` to `{inner[-1]}`, called inline"
    else:
        how = f"`{site.path.removeprefix(f'{block}.')}`" + (", experts and router as a whole" if site.experts else "")
    return how if covered == blocks else f"{how}; in {covered} of {blocks} blocks"


def row(kind: str) -> str:
    """The table's line for an architecture."""
    found = examine(kind)
    return f"| {kind} | {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]} | {found.status} | {found.text} |"


def table() -> str:
    """The whole page."""
    rows = [row(kind) for kind in KINDS]
    covered = sum(examine(kind).status == "covered" for kind in KINDS)
    return (
        f"""# Architectures

What `kallm retrofit` can replace in each of the {len(KINDS)} causal-LM architectures of transformers \
{transformers.__version__}: {covered} are
covered. For each, a tiny random model was retrofitted in one block, trained for a step, had tokens generated with and
without its cache, was saved, loaded, and gave the same logits to the bit. Written by `python tests/architectures.py`;
`tests/test_architectures.py` holds it against what happens. "Not tried" says that a handful of sizes does not make the
architecture small, nothing about retrofits: sites are found by structure, so it may well be covered.

| model_type | class | | what is replaced, or why not |
| --- | --- | --- | --- |
"""
        + "\n".join(rows)
        + "\n"
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    TABLE.write_text(table(), encoding="utf-8")
    sys.stdout.write(f"wrote {TABLE}\n")
