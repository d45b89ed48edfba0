"""A checkpoint: a Hugging Face folder with safetensors, the tokenizer, and kallm.json saying where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.files import new_folder, write_file
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.card import model_card
from kallm_bench.models.modeling import original_class, specs_of
from kallm_bench.models.shards import Weights, copy_beside
from kallm_bench.models.sources import (
    COMPUTABLE,
    Source,
    find_model,
    load_model,
    load_skeleton,
    quiet_transformers,
    read_base,
    read_lineage,
    weights_folder,
)
from kallm_bench.models.spec import KANSpec
from kallm_bench.models.streaming import Lender, can_stream, streamed

LARGEST_SHARD = "4GB"
"""Weights that are more go into several files, of which a later retrofit rewrites only those it changes."""


def save_checkpoint(
    folder: Path | str,
    model: PreTrainedModel,
    tokenizer: Any | None = None,
    *,
    lineage: Sequence[Mapping[str, str]] = (),
    base: Mapping[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Writes a model so that `AutoModelForCausalLM.from_pretrained(folder)` gives it back bit for bit.

    Args:
        folder: where; whole or not at all.
        model: retrofitted or not.
        tokenizer: saved beside it; None saves none.
        lineage: {"id", "key", "stage"} of the records that led here, oldest first.
        base: {"source", "fingerprint"} of the model that was retrofitted first.
        replace: whether an existing folder may be replaced.

    Raises:
        DiskError: the folder exists, or the disk refused; nothing is left behind.
    """
    quiet_transformers()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with new_folder(Path(folder), replace=replace, needed_bytes=size) as temporary:
        model.save_pretrained(temporary, max_shard_size=LARGEST_SHARD)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _write_notes(temporary, model, lineage, base or {})


class Original:
    """What a model was made of: a folder on the disk. It lets the model be saved by what has changed since.

    Args:
        folder: where the model's weights lie.
        model: as load_model or load_skeleton made it of them, not changed yet.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder = folder
        self.model = model
        self.weights = Weights(folder)
        self.tensors = _tensors_of(model)

    @property
    def fits(self) -> bool:
        """Whether the files hold the model's tensors under its own names; transformers can load others as well.

        Of tensors that are one, such as tied embeddings, one has to be there.
        """
        stored, wanted = self.weights.tensors, self.tensors
        if any(name not in wanted or tensor.shape != tuple(wanted[name].shape) for name, tensor in stored.items()):
            return False
        return {id(wanted[name]) for name in stored} == {id(tensor) for tensor in wanted.values()}

    @property
    def streams(self) -> bool:
        """Whether `streamed` can be used: the files fit, and the model's device is known while its blocks have none."""
        return self.fits and can_stream(self.model)

    def fill(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        """Gives one module of a skeleton the values that the files hold for it, for good.

        Raises:
            CheckpointError: some are not finite.
        """
        Lender(self.folder, self.weights, self.tensors, device).lend(module.modules())

    def streamed(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Inside, a skeleton that `fits` runs forward on `device`, a block at a time. See streaming.streamed."""
        return streamed(self.model, Lender(self.folder, self.weights, self.tensors, device))

    def save_changed(
        self,
        folder: Path | str,
        *,
        lineage: Sequence[Mapping[str, str]] = (),
        base: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> None:
        """Saves the model as save_checkpoint does, but writes only what the original's files do not hold.

        Files that hold nothing replaced are linked, others are copied without it, and what is new goes into a file of
        its own. The model changes its dtype to that of the files. The tokenizer, chat templates and generation settings
        are copied byte by byte.

        Raises:
            DiskError: as save_checkpoint.
        """
        quiet_transformers()
        now, stored = _tensors_of(self.model), self.weights.tensors
        kept = {name for name, tensor in now.items() if name in stored and self.tensors.get(name) is tensor}
        held = {id(now[name]) for name in kept}
        names = {id(tensor): name for name, tensor in now.items() if id(tensor) not in held}
        self.model.to(self.weights.dtype)
        new = {name: self.model.state_dict()[name] for name in names.values()}
        size = self.weights.bytes_without(stored.keys() - kept)
        size += sum(tensor.numel() * tensor.element_size() for tensor in new.values())
        with new_folder(Path(folder), replace=replace, needed_bytes=size) as temporary:
            self.model.save_pretrained(temporary, state_dict={})  # all but the weights
            self.weights.write_changed(temporary, kept, new)
            copy_beside(self.folder, temporary)
            _write_notes(temporary, self.model, lineage, base or {})


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that a model's weights are kept in; float32 where that is none to compute in."""
    dtype = Weights(weights_folder(source)).dtype
    return dtype if dtype in COMPUTABLE else torch.float32


def open_original(
    source: Source, spec: KANSpec, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Original | None:
    """A model's skeleton and its files, with such values as a retrofit's start reads by itself; nothing else is read.

    Args:
        dtype: of the skeleton; None for that of the files.
        device: of those values.

    Returns:
        None where the files hold other tensors than the model has, so that it must be loaded whole.
    """
    original = Original(weights_folder(source), load_skeleton(source, dtype or stored_dtype(source)))
    if not original.fits:
        return None
    if {"convert", "inherit"} & set(spec.start.split("+")):
        anatomy = Anatomy.of(original.model.config, original_class(original.model))
        for path in dict.fromkeys(path for site in anatomy.sites(spec) for path in site.paths):
            original.fill(original.model.get_submodule(path), device)
    return original


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The very tensor behind every name of a model's state."""
    return model.state_dict(keep_vars=True)


def load_checkpoint(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The model and tokenizer that `save_checkpoint` wrote. Raises as load_model does."""
    return load_model(find_model(str(folder)), dtype, device)


def write_card(folder: Path, model: PreTrainedModel, facts: Sequence[tuple[str, str]]) -> None:
    """Writes a checkpoint's card anew, now that more is known of it.

    Args:
        folder: of a checkpoint of ours.
        model: what it holds.
        facts: see model_card.
    """
    write_file(folder / "README.md", _card(model, read_lineage(folder), read_base(folder), facts).encode())


def _write_notes(
    folder: Path, model: PreTrainedModel, lineage: Sequence[Mapping[str, str]], base: Mapping[str, str]
) -> None:
    note = {"lineage": [dict(entry) for entry in lineage], "base": dict(base)}
    (folder / "kallm.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(model, lineage, base), encoding="utf-8")


def _card(
    model: PreTrainedModel,
    lineage: Sequence[Mapping[str, str]],
    base: Mapping[str, str],
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model_card(original_class(model).__name__, parameters, specs_of(model.config), lineage, base, facts)
