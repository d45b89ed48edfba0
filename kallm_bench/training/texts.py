"""Texts with a class each, in full rows: what `--task classify` trains on in the place of conversations.

A text is cut into tokens, ends in the tokenizer's end token, and bears one loss: at that last token, with its class as
the target. As conversations do, texts follow each other in rows and do not see each other; but none is cut in two,
since its class is asked for where all of it has been read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kallm_bench.errors import DataError
from kallm_bench.training.rows import FIRST, IGNORE, Rows
from kallm_bench.training.tables import Columns, DataTable, find_table, listed
from kallm_bench.training.template import tokenizer_fingerprint

COLUMNS = Columns(("text", "label"), instead="Rename those that hold a text and its class")

HELDOUT_EVERY = 10
"""Without a held-out file of its own, every tenth text of a class is held out, and never trained on."""

AT_ONCE = 1024
"""Texts that are cut into tokens at one time."""


class LabelledText(NamedTuple):
    """A text, its class as the data calls it, and where it stands, for errors."""

    text: str
    label: str
    where: str


@dataclass(frozen=True, eq=False)  # one is itself: arrays neither hash nor compare as one
class LabelledRows(Rows):
    """Rows that whole texts were packed into.

    Args:
        classes: (N, T) int64, the class of a text at its last token, elsewhere IGNORE.
        names: of the classes.
        repeats: how often the rows are gone through, one time after the other, as if there were as many.
    """

    classes: np.ndarray
    names: tuple[str, ...]
    repeats: int = 1

    def __len__(self) -> int:
        return len(self.tokens) * self.repeats

    def enough_for(self, rows: int) -> LabelledRows:
        """As often as it takes to have so many rows."""
        repeats = max(1, -(-rows // len(self.tokens)))
        name = hashlib.sha256(f"{self.fingerprint} times {repeats}".encode()).hexdigest()
        return dataclasses.replace(self, repeats=repeats, fingerprint=name if repeats > 1 else self.fingerprint)

    def bearing(self, numbers: Sequence[int] | np.ndarray) -> int:
        return int((self.classes[self._own(numbers)] != IGNORE).sum())

    def batch(self, numbers: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """As of any rows, but targets are classes, each at the last token of its text."""
        own = self._own(numbers)
        batch = super().batch(own, device)
        return batch | {"targets": torch.from_numpy(self.classes[own]).to(device)}

    def _own(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.asarray(numbers, dtype=np.int64) % len(self.tokens)


def find_texts(source: str) -> DataTable:
    """The labelled texts called `source`: a JSONL(.gz), JSON or parquet file, or a hub id. DataError if none."""
    if source == "bundled":
        raise DataError(
            "the bundled data are conversations, which have no classes; --task classify needs --data with "
            '{"text": ..., "label": ...} a line'
        )
    return find_table(source, COLUMNS)


def read_texts(table: DataTable) -> Iterator[LabelledText]:
    """One text after the other; DataError at the first that is malformed, with its line."""
    for row, where in table.read():
        text, label = (row.get("text"), row.get("label")) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(label, int | str) or isinstance(label, bool):
            found = f"it has {listed(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
            if isinstance(row, dict) and {"text", "label"} <= row.keys():
                found = f"text is {str(text)[:40]!r} and label {str(label)[:40]!r}"
            raise DataError(
                f'{where}: needs {{"text": "...", "label": ...}}, a label being a number or a name; {found}'
            )
        if not text.strip():
            raise DataError(f"{where}: the text is empty")
        yield LabelledText(text, str(label), where)


def used_tokens(table: DataTable, tokenizer: Any) -> set[int]:
    """Every token that texts are cut into."""
    used: set[int] = set()
    for some in _batches(read_texts(table)):
        used.update(itertools.chain.from_iterable(tokenizer([each.text for each in some])["input_ids"]))
    return used


def prepare_texts(
    source: str, tokenizer: Any, row_length: int, heldout: str | None = None
) -> tuple[LabelledRows, LabelledRows]:
    """Training rows and held-out rows. What of a text does not fit into a row is left out.

    Args:
        source, heldout: see find_texts; None holds out every tenth text of each class of `source`, from its second on.

    Raises:
        DataError: missing, empty or malformed data, with the line; fewer than two classes; a held-out text of a class
            that no training text has.
    """
    table = find_texts(source)
    other = find_texts(heldout) if heldout else table
    learned = list(read_texts(table))
    if heldout:
        kept = list(read_texts(other))
    else:
        kept, learned = _divided(learned)
    names = tuple(
        sorted({each.label for each in learned}, key=lambda name: (len(name) if name.isdecimal() else 0, name))
    )
    if len(names) < 2:
        raise DataError(f"{source}: its texts are of {len(names)} classes; at least two are needed")
    for part, texts in (("training", learned), ("held-out", kept)):
        if not texts:
            raise DataError(f"{heldout or source}: no texts for the {part} part")
    for each in kept:
        if each.label not in names:
            raise DataError(f"{each.where}: no training text is of class '{each.label}'; they are of {listed(names)}")
    parts = [str(row_length), tokenizer_fingerprint(tokenizer), *names]
    return (
        _packed(learned, names, tokenizer, row_length, source, [table.fingerprint, str(bool(heldout)), *parts]),
        _packed(kept, names, tokenizer, row_length, heldout or source, [other.fingerprint, "kept", *parts]),
    )


def _divided(texts: list[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
    """Every tenth text of each class, and the others: of any order of classes, each has its share."""
    met: Counter[str] = Counter()
    parts: tuple[list[LabelledText], list[LabelledText]] = [], []
    for each in texts:
        parts[met[each.label] % HELDOUT_EVERY != 1].append(each)
        met[each.label] += 1
    return parts


def _packed(
    texts: list[LabelledText], names: tuple[str, ...], tokenizer: Any, row_length: int, source: str, parts: list[str]
) -> LabelledRows:
    end = tokenizer.eos_token_id
    ending = [] if end is None else [end]
    rows: list[list[list[int]]] = []
    room = 0
    for some in _batches(iter(texts)):
        for ids in tokenizer([each.text for each in some])["input_ids"]:
            ids = (ids[:-1] if ending and ids[-1] == end else ids)[: row_length - len(ending)] + ending
            if len(ids) > room:
                rows.append([])
                room = row_length
            rows[-1].append(ids)
            room -= len(ids)
    tokens = np.zeros((len(rows), row_length), dtype=np.uint32)
    flags = np.zeros((len(rows), row_length), dtype=np.uint8)
    classes = np.full((len(rows), row_length), IGNORE, dtype=np.int64)
    labels = (names.index(each.label) for each in texts)
    for row, documents in enumerate(rows):
        place = 0
        for ids in documents:
            tokens[row, place : place + len(ids)] = ids
            flags[row, place] = FIRST
            place += len(ids)
            classes[row, place - 1] = next(labels)
        flags[row, place : place + 1] = FIRST  # what is left over is a document of its own
    fingerprint = hashlib.sha256("\n".join([*parts, "texts-2"]).encode()).hexdigest()
    return LabelledRows(tokens, flags, source, fingerprint, classes, names)


def _batches(texts: Iterator[LabelledText]) -> Iterator[list[LabelledText]]:
    while some := list(itertools.islice(texts, AT_ONCE)):
        yield some
