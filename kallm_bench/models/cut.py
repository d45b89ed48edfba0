"""A smaller model out of a larger one: its first blocks, and the part of its vocabulary that some text needs.

The midterm's way to screen many bases in little time. What stays is as it was: the blocks' weights, the rows of the
embedding, and how the text is cut into tokens.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from kallm_bench.errors import ModelError, SpecError
from kallm_bench.models.modeling import original_class, specs_of

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class CutSettings:
    """What is left of a model.

    Args:
        blocks: how many, the first ones; None keeps all.
        data: labelled texts, whose tokens stay; None keeps all tokens.

    Raises:
        SpecError: no block is left.
    """

    blocks: int | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and self.blocks < 1:
            raise SpecError(f"at least one block has to stay, got {self.blocks}")

    @property
    def cuts(self) -> bool:
        """Whether anything goes."""
        return self.blocks is not None or self.data is not None


def cut_config(config: PreTrainedConfig, blocks: int | None, kept: Collection[int] | None = None) -> PreTrainedConfig:
    """The configuration of a model of the first blocks, and of the tokens of these ids alone, numbered anew.

    Raises:
        SpecError: fewer blocks than that, or replaced ones.
    """
    if specs_of(config):
        raise SpecError("cut the model before its blocks are replaced: this one has replaced blocks")
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    there = text.num_hidden_layers
    if blocks is not None:
        if blocks > there:
            raise SpecError(f"{blocks} blocks cannot stay: the model has {there}")
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == there:  # such as layer_types
                setattr(text, name, value[:blocks])
        text.num_hidden_layers = blocks
    if kept is not None:
        new = {old: number for number, old in enumerate(sorted(kept))}
        text.vocab_size = len(new)
        for each in (config, text):
            _renumber(each, new)
    return config


def cut(
    model: PreTrainedModel, tokenizer: Any, blocks: int | None, used: Collection[int] | None
) -> tuple[PreTrainedModel, Any]:
    """A model of the first blocks and its tokenizer; what was given stays as it is.

    Args:
        used: ids of the tokens that have to stay. What they are merged from stays too, and so do single characters or
            bytes and all special tokens, so that any text can still be written. None keeps all.

    Raises:
        SpecError: fewer blocks than that, or replaced ones, or blocks of other shapes than the configuration tells.
        ModelError: a tokenizer that cannot be cut.
    """
    kept = None
    if used is not None:
        kept = sorted(kept_tokens(_described(tokenizer), used))
    config = cut_config(model.config, blocks, kept)
    smaller = original_class(model)._from_config(config, dtype=model.dtype)
    there, wanted = model.state_dict(), smaller.state_dict()
    values = {}
    for name, like in wanted.items():
        value = there.get(name)
        if value is not None and kept is not None and value.shape[1:] == like.shape[1:] and len(like) == len(kept):
            value = value[torch.tensor(kept)] if len(value) != len(like) else value
        if value is None or value.shape != like.shape:
            raise SpecError(f"{type(model).__name__} cannot be cut: its {name} does not follow from its configuration")
        values[name] = value
    smaller.load_state_dict(values)
    smaller.tie_weights()
    if model.can_generate():
        smaller.generation_config = copy.deepcopy(model.generation_config)
        if kept is not None:
            _renumber(smaller.generation_config, {old: number for number, old in enumerate(kept)})
    return smaller.eval().to(model.device), tokenizer if kept is None else _cut_tokenizer(tokenizer, kept)


def kept_tokens(described: Mapping[str, Any], used: Collection[int]) -> set[int]:
    """The ids that stay where `used` do.

    A merge that was made in the text leads to one of its tokens, by merges of which all parts stay here; and none is
    added. So the text is cut as before.
    """
    ids = _vocabulary(described)
    made: dict[str, list[tuple[str, str]]] = {}
    for left, right in _merges(described):
        made.setdefault(left + right, []).append((left, right))
    names = {number: name for name, number in ids.items()}
    waiting = [names[each] for each in used if each in names]
    stays: set[str] = set()
    while waiting:
        if (name := waiting.pop()) not in stays:
            stays.add(name)
            waiting += [part for pair in made.get(name, ()) for part in pair]
    stays |= {name for name in ids if len(name.removeprefix("##")) == 1 or BYTE.fullmatch(name)}
    if isinstance(unknown := described["model"].get("unk_token"), str):
        stays.add(unknown)
    if (number := described["model"].get("unk_id")) is not None:
        stays.add(names[number])
    special = {entry["id"] for entry in described["added_tokens"]}
    return {ids[name] for name in stays if name in ids} | special


def _described(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"a {type(tokenizer).__name__} has no tokenizer.json, and its vocabulary cannot be cut")
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] not in ("BPE", "Unigram", "WordPiece", "WordLevel"):
        raise ModelError(f"a tokenizer of the type {described['model']['type']} cannot be cut")
    return described


def _vocabulary(described: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return dict(vocabulary)
    return {name: number for number, (name, _) in enumerate(vocabulary)}


def _merges(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = described["model"].get("merges", [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in pairs]


def _cut_tokenizer(tokenizer: Any, kept: list[int]) -> Any:
    """A tokenizer of these tokens alone, numbered anew in their order."""
    described, new = _described(tokenizer), {old: number for number, old in enumerate(kept)}
    model, ids = described["model"], _vocabulary(described)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name: new[number] for name, number in ids.items() if number in new}
    else:
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    if "merges" in model:
        stay = {name for name, number in ids.items() if number in new}
        model["merges"] = [list(each) for each in _merges(described) if {*each, "".join(each)} <= stay]
    for entry in described["added_tokens"]:
        entry["id"] = new[entry["id"]]
    _renumber_in(described.get("post_processor"), new)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).iterdir():
            if path.name not in ("tokenizer.json", "tokenizer_config.json") and path.suffix != ".jinja":
                path.unlink()  # vocabularies in older forms
        Tokenizer.from_str(json.dumps(described)).save(str(Path(folder) / "tokenizer.json"))
        config = Path(folder) / "tokenizer_config.json"
        said = json.loads(config.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in said:
            said["added_tokens_decoder"] = {
                str(new[int(old)]): entry for old, entry in said["added_tokens_decoder"].items() if int(old) in new
            }
        config.write_text(json.dumps(said, indent=2), encoding="utf-8")
        smaller = AutoTokenizer.from_pretrained(folder)
    if len(smaller) != len(kept):
        raise ModelError(f"a {type(tokenizer).__name__} cannot be cut: it comes back with other tokens")
    smaller.name_or_path = ""
    return smaller


def _renumber(config: Any, new: Mapping[int, int]) -> None:
    """Changes the token ids in a configuration; one that is gone becomes None."""
    for name, value in list(vars(config).items()):
        if not name.endswith("_token_id") or value is None:
            continue
        if isinstance(value, list):
            setattr(config, name, [new[each] for each in value if each in new])
        else:
            setattr(config, name, new.get(int(value)))


def _renumber_in(processor: Any, new: Mapping[int, int]) -> None:
    """Changes the ids in what a tokenizer puts around a text: {"ids": [1]} and {"sep": ["</s>", 2]}, wherever."""
    if isinstance(processor, list):
        for each in processor:
            _renumber_in(each, new)
    elif isinstance(processor, dict):
        for name, value in processor.items():
            if name == "ids":
                processor[name] = [new[each] for each in value]
            elif name in ("sep", "cls"):
                processor[name] = [value[0], new[value[1]]]
            else:
                _renumber_in(value, new)
