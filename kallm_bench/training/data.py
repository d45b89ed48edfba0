"""Conversations in, full rows of tokens out: which tokens bear loss, and where each document begins.

Every conversation is rendered by the model's own chat template and cut into tokens whole (template.py, tokens.py).
Documents follow each other without padding and are cut where a row ends. In a row, positions start again at each
document, and documents do not see each other (rows.py). Rows are packed without a seed; a seed only permutes them, so
one cache serves every seed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from kallm_bench.errors import DataError
from kallm_bench.training.conversations import Conversation, DataSource, find_data
from kallm_bench.training.rows import FIRST, IGNORE, LEARN, Apart, Cut, Rows
from kallm_bench.training.template import Template, tokenizer_fingerprint
from kallm_bench.training.tokens import Documents, Progress, tokenised, tokens_key

__all__ = [
    "FIRST",
    "HELDOUT_EVERY",
    "IGNORE",
    "LEARN",
    "Conversation",
    "Cut",
    "DataSource",
    "Documents",
    "Progress",
    "Rows",
    "Template",
    "find_data",
    "prepare",
    "tokenised",
    "tokenizer_fingerprint",
]

HELDOUT_EVERY = 50
"""Without a held-out file of its own, every 50th conversation is held out, and never trained on."""


def prepare(
    source: str,
    tokenizer: Any,
    row_length: int,
    cache: Path,
    heldout: str | None = None,
    packing: bool = True,
    progress: Progress = lambda done, total: None,
) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, cut into tokens on first use and memory-mapped from then on.

    Args:
        source: "bundled", a JSONL(.gz), JSON or parquet file, or a hub id.
        heldout: the same kinds; None holds out every 50th conversation of `source`.
        row_length: tokens in a row.
        cache: folder of tokenised data.
        packing: whether documents lie one after the other in full rows, or each in rows of its own, which are not full.

    Raises:
        DataError: missing, empty or malformed data, with the line; a chat template that cannot be used; too little data
            for one row.
        DiskError: the cache cannot be written.
    """
    data = find_data(source)
    other = find_data(heldout) if heldout else data
    learned, kept = (tokenised(each, tokenizer, cache, progress) for each in (data, other))
    return (
        _rows(source, data, learned, tokenizer, row_length, "all" if heldout else "train", packing),
        _rows(heldout or source, other, kept, tokenizer, row_length, "all" if heldout else "heldout", packing),
    )


def _rows(
    source: str, data: DataSource, documents: Documents, tokenizer: Any, row_length: int, part: str, packing: bool
) -> Rows:
    begins, ends = _spans(documents, part) if packing else _singles(documents, part)
    if not len(begins):
        raise DataError(f"{source}: no conversations for the {part} part")
    view = Cut if packing else Apart
    tokens, flags = (view(stream, begins, ends, row_length) for stream in (documents.tokens, documents.flags))
    if len(tokens) == 0:
        raise DataError(
            f"{source}: the {part} part has fewer than {row_length} tokens, which do not fill a row; take shorter rows"
        )
    parts = [tokens_key(data, tokenizer), str(row_length), part, "packing-2" if packing else "apart-1"]
    return Rows(tokens, flags, source, hashlib.sha256("\n".join(parts).encode()).hexdigest(), packed=packing)


def _spans(documents: Documents, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the part's documents lie in the stream: begins and ends, each (S,). Neighbours make one span."""
    starts = documents.starts
    if part == "all":
        return starts[:1], starts[-1:]
    held_out = np.arange(0, len(documents), HELDOUT_EVERY)
    if part == "heldout":
        return starts[held_out], starts[held_out + 1]
    following = np.minimum(held_out + HELDOUT_EVERY, len(documents))
    begins, ends = starts[held_out + 1], starts[following]
    return begins[ends > begins], ends[ends > begins]


def _singles(documents: Documents, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The same part's documents one by one."""
    held_out = np.arange(len(documents)) % HELDOUT_EVERY == 0
    wanted = {"all": held_out | True, "heldout": held_out, "train": ~held_out}[part]
    return documents.starts[:-1][wanted], documents.starts[1:][wanted]
