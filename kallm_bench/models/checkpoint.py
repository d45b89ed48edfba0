"""A checkpoint: a Hugging Face folder with safetensors, the tokenizer, and kallm.json saying where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.files import new_folder
from kallm_bench.models.modeling import MODELING_FILE, original_class, specs_of
from kallm_bench.models.sources import find_model, load_model, quiet_transformers
from kallm_bench.models.standalone import modeling_file


def save_checkpoint(
    folder: Path | str,
    model: PreTrainedModel,
    tokenizer: Any | None = None,
    *,
    lineage: Sequence[dict[str, str]] = (),
    replace: bool = False,
) -> None:
    """Writes a model so that `AutoModelForCausalLM.from_pretrained(folder)` gives it back bit for bit.

    Args:
        folder: where; whole or not at all.
        model: retrofitted or not.
        tokenizer: saved beside it; None saves none.
        lineage: {"id", "key", "stage"} of the records that led here, oldest first.
        replace: whether an existing folder may be replaced.

    Raises:
        DiskError: the folder exists, or the disk refused; nothing is left behind.
    """
    quiet_transformers()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with new_folder(Path(folder), replace=replace, needed_bytes=size) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        note = json.dumps({"lineage": list(lineage)}, indent=2) + "\n"
        (temporary / "kallm.json").write_text(note, encoding="utf-8")
        (temporary / "README.md").write_text(_model_card(model, lineage), encoding="utf-8")


def load_checkpoint(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The model and tokenizer that `save_checkpoint` wrote. Raises as load_model does."""
    return load_model(find_model(str(folder)), dtype, device)


def _model_card(model: PreTrainedModel, lineage: Sequence[dict[str, str]]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    retrofits = [f"- blocks {list(spec.blocks)}: {spec.basis}, form {spec.form}" for spec in specs_of(model.config)]
    records = [f"- {entry['stage']}: {entry['id']}" for entry in lineage]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [kolmogorov-arnold-network]",
            "---",
            f"# {original_class(model).__name__}, {parameters:,} parameters",
            "",
            "Feed-forward parts replaced, in order:" if retrofits else "No part was replaced.",
            *retrofits,
            "",
            "Records that led here:" if records else "",
            *records,
            "",
            "Load it with `import kallm_bench` and `AutoModelForCausalLM.from_pretrained(folder)`.",
            *_without_kallm(model),
            "",
        ]
    )


def _without_kallm(model: PreTrainedModel) -> list[str]:
    specs = specs_of(model.config)
    if not specs or modeling_file(specs) is None:
        return []
    return [
        f"Without kallm_bench: read `{MODELING_FILE}`, which holds the model's code in plain PyTorch, then",
        "`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.",
    ]
