"""What frozen blocks give for packed rows, on disk: computed once, for every arm and seed that begins with them.

A file holds (N, T, H) values, row after row, and grows as rows are met; another says which are there. Values are
written before they are said to be there, so a run that is killed loses what it computed last and nothing else. Values
are in the compute dtype, which is what the learning blocks are given in any case, so a run with the cache and one
without see the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kallm_bench.files import DiskError, check_room, explained, write_file
from kallm_bench.models import specs_of
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.training.data import Rows

WAITING = 4
"""Batches on their way to the disk at one time."""

LAST_NORMS = ("norm", "ln_f", "final_norm", "final_layernorm", "final_layer_norm")
"""What decoders call the norm after their last block, which nothing that enters a block has passed."""


def prefix_fingerprint(model: PreTrainedModel, first: int) -> str:
    """sha256 over everything that decides what enters block `first`: configuration, and values that come before.

    What was put into later blocks does not count, nor what these and the last norm have learned, so that arms and seeds
    that begin alike share what was computed.
    """
    names = ("kallm", "architectures", "transformers_version", "dtype")
    described = {
        name: value
        for name, value in model.config.get_text_config(decoder=True).to_dict().items()
        if name not in names and not name.endswith("name_or_path")
    }
    below = [
        {**spec.to_json(), "blocks": sorted(here), "seed": None}
        for spec in specs_of(model.config)
        if (here := [int(block) for block in spec.blocks if int(block) < first])
    ]
    digest = hashlib.sha256(json.dumps([described, below], sort_keys=True, default=str).encode())
    decoder = model.get_decoder()
    norms = [child for name, child in decoder.named_children() if name in LAST_NORMS]
    later = {id(each) for module in (*find_blocks(model)[first:], *norms) for each in module.parameters()}
    for name, value in decoder.named_parameters():
        if id(value) not in later:
            digest.update(name.encode())
            digest.update(value.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def place_of(
    folder: Path, model: PreTrainedModel, first: int, dtype: torch.dtype, rows: Rows, autocast: torch.dtype | None
) -> Path:
    """The folder of what enters a block for the rows of one data set; arguments as PrefixCache."""
    parts = [prefix_fingerprint(model, first), rows.fingerprint, str(first), str(dtype), str(autocast), "prefix-2"]
    return folder / "prefix" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def holds(place: Path, count: int) -> bool:
    """Whether the cache in this folder says that it has the first `count` rows. Nothing is made or changed."""
    try:
        packed = np.frombuffer((place / "there.bin").read_bytes(), dtype=np.uint8)
    except OSError:
        return False
    return bool(np.unpackbits(packed)[:count].all()) and 8 * len(packed) >= count


class PrefixCache:
    """The hidden states that enter a block, for the rows of one data set.

    Args:
        folder: where caches are kept.
        model, first, dtype: whose, before which block, in which dtype; its weights are read through once.
        autocast: what its products are computed in.
        rows, count: of which data, and how many of its rows are needed, from the first one on.

    Attributes:
        asked, found: how many rows were asked for, and how many of them could be read.

    Raises:
        DiskError: too little room for so many rows.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        first: int,
        dtype: torch.dtype,
        rows: Rows,
        count: int,
        autocast: torch.dtype | None = None,
    ) -> None:
        width = model.config.get_text_config(decoder=True).hidden_size
        self.folder = place_of(folder, model, first, dtype, rows, autocast)
        self.rows = rows.fingerprint
        count = min(count, len(rows))
        self.bytes = size_of(rows, count, width, dtype)
        self._shape, self._dtype = (rows.tokens.shape[1], width), dtype
        self._row_bytes = size_of(rows, 1, width, dtype)
        self._pinned = model.device.type == "cuda"
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / "hidden.bin", os.O_RDWR | os.O_CREAT, 0o644)
        self._there = self._load(len(rows))
        check_room(self.folder, int((~self._there[:count]).sum()) * self._row_bytes)
        self.asked = self.found = 0
        self._fresh: list[int] = []
        self._worker = ThreadPoolExecutor(1)
        self._writing: list[Future[None]] = []

    @property
    def share(self) -> float:
        """How much of it is there."""
        return float(self._there.mean())

    def read(self, numbers: Sequence[int]) -> Tensor | None:
        """(B, T, H) of these rows, ready to be sent to a GPU; None where one is not there."""
        self.asked += len(numbers)
        if not self._there[list(numbers)].all():
            return None
        hidden = torch.empty((len(numbers), *self._shape), dtype=self._dtype, pin_memory=self._pinned)
        for row, number in zip(hidden.view(torch.uint8).numpy().reshape(len(numbers), -1), numbers, strict=True):
            if os.preadv(self._file, [row.data], number * self._row_bytes) < self._row_bytes:
                return None
        self.found += len(numbers)
        return hidden

    def write(self, numbers: Sequence[int], hidden: Tensor) -> None:
        """Takes (B, T, H) of these rows, and writes them beside other work.

        Raises:
            DiskError: an earlier batch could not be written.
        """
        here = torch.empty(hidden.shape, dtype=self._dtype, pin_memory=self._pinned)
        here.copy_(hidden, non_blocking=True)
        done = torch.cuda.current_stream(hidden.device).record_event() if hidden.is_cuda else None
        while len(self._writing) >= WAITING:
            self._writing.pop(0).result()
        self._writing.append(self._worker.submit(self._put, tuple(numbers), here, done))

    def _put(self, numbers: tuple[int, ...], hidden: Tensor, done: torch.cuda.Event | None) -> None:
        if done:
            done.synchronize()
        with explained(self.folder):
            for row, number in zip(hidden.view(torch.uint8).numpy().reshape(len(numbers), -1), numbers, strict=True):
                if os.pwrite(self._file, row.data, number * self._row_bytes) < self._row_bytes:
                    raise DiskError(f"{self.folder}: the disk took less than a row")
        self._fresh.extend(numbers)

    def flush(self) -> None:
        """Waits for what is being written, and says that it is there.

        Raises:
            DiskError: it could not be written.
        """
        while self._writing:
            self._writing.pop(0).result()
        if not self._fresh:
            return
        with explained(self.folder):
            os.fsync(self._file)
        self._there |= self._load(len(self._there))  # of other processes
        self._there[self._fresh] = True
        self._fresh = []
        write_file(self.folder / "there.bin", np.packbits(self._there).tobytes())

    def close(self) -> None:
        """Flushes, and lets the file go."""
        try:
            self.flush()
        finally:
            self._worker.shutdown()
            os.close(self._file)

    def _load(self, rows: int) -> np.ndarray:
        try:
            packed = np.frombuffer((self.folder / "there.bin").read_bytes(), dtype=np.uint8)
        except OSError:
            return np.zeros(rows, dtype=bool)
        there = np.unpackbits(packed)[:rows].astype(bool)
        known = np.flatnonzero(there)
        holds = os.fstat(self._file).st_size // self._row_bytes
        if len(packed) != -(-rows // 8) or (len(known) and known[-1] >= holds):  # what it speaks of is gone
            (self.folder / "there.bin").unlink(missing_ok=True)
            return np.zeros(rows, dtype=bool)
        return there


def size_of(rows: Rows, count: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that the cache of so many rows takes."""
    values: int = count * rows.tokens.shape[1] * width
    return values * dtype.itemsize
