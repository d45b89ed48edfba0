"""A folder's weights as files: what lies where in them, linked or trimmed into another folder without reading a tensor.

A safetensors file is the length of its header in 8 bytes, the header in JSON, and the tensors' bytes, one after the
other with no gap. So a tensor is dropped by writing a shorter header and copying the ranges of bytes that remain, which
the system does by itself; and a file that keeps all its tensors needs no copy at all: a hard link gives it a second
name. Links are safe because weights are written once: kallm makes folders beside their place and renames them into it,
and safetensors does the same with single files, so whoever saves anew into a folder gives its name to a new file and
leaves ours as it was.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kallm_bench.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
"""The dtypes of safetensors that we can say the size of."""

LONGEST_HEADER = 100_000_000
"""In bytes: what safetensors itself reads at most."""

UNLINKED = {
    errno.EXDEV,  # another disk
    errno.EPERM,  # somebody else's file, or a file system without links
    errno.EACCES,
    errno.EMLINK,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}
"""What the system answers where it will not link but may well copy."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes are [start, end) of what follows the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file whose header fits its bytes.

    Args:
        path: the file.
        data: where the header ends.
        tensors: in the order of their bytes.
        metadata: text that the header carries beside them.
    """

    path: Path
    data: int
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Reads a file's header, and nothing else of it.

        Raises:
            CheckpointError: the file is cut short, or its header is no header, or does not fit the bytes behind it.
        """
        try:
            length, size, header = _read_header(path)
            metadata = header.pop("__metadata__", {})
            stored = {name: _stored(name, entry) for name, entry in header.items()}
            tensors = dict(sorted(stored.items(), key=lambda each: (each[1].start, each[1].end)))
            _check_order(tensors, size - 8 - length)
            if not isinstance(metadata, dict):
                raise _HeaderError("its __metadata__ is no JSON object")
        except _HeaderError as damage:
            raise CheckpointError(f"{path} is damaged: {damage}") from damage
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        return cls(path, 8 + length, tensors, {str(key): str(value) for key, value in metadata.items()})

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of its tensors, on the CPU."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def copy(self, target: Path, kept: Collection[str]) -> None:
        """Makes `target` the same file with the tensors `kept` alone, byte for byte."""
        remaining = [(name, self.tensors[name]) for name in self.tensors if name in kept]
        remaining.sort(key=lambda entry: -DTYPES[entry[1].dtype].itemsize)  # so that each begins at a multiple of it
        header: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        ranges: list[tuple[int, int]] = []
        end = 0
        for name, stored in remaining:
            size = stored.end - stored.start
            header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [end, end + size]}
            end += size
            if ranges and ranges[-1][1] == stored.start:
                ranges[-1] = (ranges[-1][0], stored.end)
            else:
                ranges.append((stored.start, stored.end))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self.path.open("rb") as source, target.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            for start, stop in ranges:
                _copy_bytes(source.fileno(), file.fileno(), self.data + start, stop - start)

    def link(self, target: Path) -> None:
        """Gives the file a second name; a copy where the system refuses, which shares its blocks where that can be."""
        whole = self.path.resolve()  # the hub's cache is full of symbolic links
        try:
            os.link(whole, target)
        except OSError as error:
            if error.errno not in UNLINKED:
                raise
            with whole.open("rb") as source, target.open("wb") as file:
                _copy_bytes(source.fileno(), file.fileno(), 0, os.fstat(source.fileno()).st_size)


class _HeaderError(Exception):
    """What is wrong with a file, in words that go on from its name."""


def _read_header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """The header's length, the file's size, and what the header says."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _HeaderError(f"a header of {length:,} bytes does not fit into the {size:,} bytes of the file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _HeaderError("its header is no JSON") from error
    if not isinstance(header, dict):
        raise _HeaderError("its header is no JSON object")
    return length, size, header


def _stored(name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"what its header says of {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _HeaderError(f"{name} is of the dtype {dtype!r}; this program reads {', '.join(DTYPES)}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise _HeaderError(f"{name} has the shape {shape!r} and the bytes {offsets!r}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise _HeaderError(
            f"{name} is {tuple(shape)} in {dtype}, which is {size:,} bytes, not {offsets[1] - offsets[0]:,}"
        )
    return Stored(dtype, tuple(shape), *offsets)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def _check_order(tensors: Mapping[str, Stored], size: int) -> None:
    """Refuses tensors that overlap, leave gaps, or are not all of the file's `size` bytes after the header."""
    end = 0
    for name, stored in tensors.items():
        if stored.start != end:
            what = "overlaps the tensor before it" if stored.start < end else "leaves a gap before it"
            raise _HeaderError(f"{name} begins at byte {stored.start:,} and {what}")
        end = stored.end
    if end != size:
        raise _HeaderError(f"its tensors should have {end:,} bytes and {size:,} are there")


def _copy_bytes(source: int, target: int, start: int, count: int) -> None:
    """Appends `count` bytes of one open file to another, inside the system where it can do that."""
    end = start + count
    copy = getattr(os, "copy_file_range", None)  # Linux alone has it
    while start < end:
        copied = 0
        if copy:
            try:
                copied = copy(source, target, end - start, start)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
        if not copied:
            copy = None
            copied = os.write(target, os.pread(source, min(end - start, 2**22), start))
            if not copied:
                raise CheckpointError("a file of weights grew shorter while it was copied")
        start += copied


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a folder's model; as transformers chooses them.

    Raises:
        CheckpointError: there is none, or the index is damaged, names a file that is missing, or one that is none of
            the folder's safetensors files.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise CheckpointError(f"'{folder}' holds no safetensors file called {SINGLE}; other formats are never read")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged: it is no JSON object with a 'weight_map'") from error
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index} names '{name}', which is no safetensors file of this folder; never read")
        if not (folder / name).is_file():
            raise CheckpointError(f"'{folder}' is not whole: {name} is missing, which {INDEX} names")
    return [folder / name for name in names]


class Weights:
    """The weights of a folder, as they lie on the disk.

    Raises:
        CheckpointError: see weight_files and Shard.open; also a tensor that two files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.shards: Sequence[Shard] = [Shard.open(path) for path in weight_files(folder)]
        self.tensors: dict[str, Stored] = {}
        for shard in self.shards:
            if twice := self.tensors.keys() & shard.tensors.keys():
                raise CheckpointError(f"{shard.path} is damaged: another file of its folder holds {min(twice)} too")
            self.tensors |= shard.tensors

    @property
    def dtype(self) -> torch.dtype:
        """What most of its values are kept in."""
        sizes: dict[str, int] = {}
        for stored in self.tensors.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + math.prod(stored.shape)
        return DTYPES[max(sizes, key=lambda name: sizes[name])] if sizes else torch.float32

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some tensors, on the CPU."""
        found = {}
        for shard in self.shards:
            if here := shard.tensors.keys() & set(names):
                found.update(shard.read(here))
        return found

    def bytes_without(self, dropped: Collection[str]) -> int:
        """How many bytes have to be written for a folder without some tensors: those of files that hold some."""
        return sum(shard.path.stat().st_size for shard in self.shards if shard.tensors.keys() & set(dropped))

    def write_changed(self, folder: Path, kept: Collection[str], new: Mapping[str, Tensor]) -> None:
        """Writes the tensors `kept` of these and the `new` ones into an empty folder, with an index.

        A file that keeps all it has is linked, one that keeps some is copied without the others, and the new tensors
        go into a file of their own.
        """
        shards = [shard for shard in self.shards if shard.tensors.keys() & set(kept)]
        count = len(shards) + bool(new)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        places: dict[str, str] = {}
        for shard, name in zip(shards, names, strict=False):
            if shard.tensors.keys() <= set(kept):
                shard.link(folder / name)
            else:
                shard.copy(folder / name, kept)
            places |= dict.fromkeys(shard.tensors.keys() & set(kept), name)
        if new:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in new.items()}
            save_file(tensors, folder / names[-1], metadata={"format": "pt"})
            places |= dict.fromkeys(new, names[-1])
        sizes = {name: self.tensors[name].end - self.tensors[name].start for name in kept}
        sizes |= {name: tensor.numel() * tensor.element_size() for name, tensor in new.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
"""What stands beside a model's weights and says how to use it: the tokenizer, chat templates, generation settings."""


def copy_beside(source: Path, target: Path) -> None:
    """Copies tokenizer, chat templates and generation settings into another folder, byte by byte."""
    for pattern in BESIDE:
        for path in filter(Path.is_file, source.glob(pattern)):
            (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))
