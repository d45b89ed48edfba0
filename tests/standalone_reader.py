"""Run by test_standalone.py in a process of its own: loads checkpoints where kallm_bench cannot be imported.

Takes the path of a JSON file {name: folder} and of a file to write; see `facts` for what is written for each.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79], [31, 41, 59, 26, 53, 58, 9, 7]])


def load(folder: str, **wishes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **wishes).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(TOKENS).logits


def facts(folder: str) -> dict[str, Any]:
    """What every checkpoint must do: the logits in two dtypes."""
    models = {str(dtype): load(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {
        "class": type(models["torch.float32"]).__name__,
        "logits": {name: logits(model) for name, model in models.items()},
        "dtypes": {name: {str(parameter.dtype) for parameter in model.parameters()} for name, model in models.items()},
    }


def refusal(folder: str) -> str:
    """What is said to a checkpoint that lacks a tensor."""
    broken = Path(shutil.copytree(folder, f"{folder}-broken"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.layers.0.coefficients"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    try:
        load(str(broken))
    except Exception as error:  # of a class that only the modelling file has; the test reads its name
        return f"{type(error).__name__}: {error}"
    return "it was loaded"


def more_facts(folder: str) -> dict[str, Any]:
    """What one checkpoint must do besides."""
    model = load(folder)
    model.save_pretrained(f"{folder}-again", max_shard_size="20KB")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    learning = load(folder).train()
    learning.gradient_checkpointing_enable()
    learning(TOKENS, labels=TOKENS).loss.backward()
    return {
        "hole": refusal(folder),
        "config": (type(config).__name__, config.model_type, config.base_config["model_type"]),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "generated": model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0),
        "again": logits(load(f"{folder}-again")),
        "gradients": {name: parameter.grad for name, parameter in learning.named_parameters()},
        "placed": {str(place): logits(load(folder, device_map=place)) for place in ({"": "cpu"}, "auto")},
        "attention": {
            way: (each.config._attn_implementation, logits(each))
            for way in ("eager", "sdpa")
            for each in [load(folder, attn_implementation=way)]
        },
    }


def main(asked: str, written: str) -> None:
    assert "kallm_bench" not in sys.modules
    sys.modules["kallm_bench"] = None  # importing it is an ImportError now
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    folders = json.loads(Path(asked).read_text())
    found = {name: facts(folder) for name, folder in folders.items()}
    found["stack"] |= more_facts(folders["stack"])
    torch.save(found, written)


if __name__ == "__main__":
    main(*sys.argv[1:])
