"""Every conversation cut into tokens once, into files that are mapped into memory from then on.

The files hold the documents of a data set in their order, one after the other. Data and tokenizer alone decide them:
rows of any length, and the part that is held out, are cut from them later. They are written piece by piece beside their
place, which they take when they are whole; so memory is bounded, and nothing half-written is ever read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from kallm_bench.errors import DataError
from kallm_bench.files import new_folder, only_one
from kallm_bench.training.conversations import Conversation, DataSource
from kallm_bench.training.rows import FIRST, LEARN
from kallm_bench.training.template import Template, tokenizer_fingerprint

VERSION = 1
"""Raised whenever the same data and tokenizer become other tokens."""

CHARACTERS, CONVERSATIONS = 2**20, 1024
"""What is cut at one time, at most: so much text, and so many conversations."""

Progress = Callable[[int, int], None]
"""Told how many are done, and of how many at most; a total of 0 says that another process does the work."""


@dataclass(frozen=True)
class Documents:
    """All documents of a data set, memory-mapped.

    Args:
        tokens: (L,) token ids, uint16 where the vocabulary allows it, else uint32.
        flags: (L,) uint8, LEARN and FIRST.
        starts: (D + 1,) int64, where each document begins, and L.
    """

    tokens: np.ndarray
    flags: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def tokens_key(source: DataSource, tokenizer: Any) -> str:
    """sha256 over everything that decides which tokens a data set becomes. DataError where there is no tokenizer."""
    special = json.dumps(tokenizer.special_tokens_map if tokenizer else {}, sort_keys=True, default=str)
    parts = [source.fingerprint, tokenizer_fingerprint(tokenizer), special, f"tokens-{VERSION}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def tokenised(
    source: DataSource, tokenizer: Any, cache: Path, progress: Progress = lambda done, total: None
) -> Documents:
    """The documents of `source`, cut into tokens now or earlier. Of two processes one works and the other waits.

    Raises:
        DataError: malformed data, with the line; none at all; a chat template that cannot be used.
        DiskError: no space, or no permission, in `cache`; nothing is left there then.
    """
    folder = cache / "tokens" / tokens_key(source, tokenizer)[:20]

    def wait() -> None:
        progress(0, 0)
        time.sleep(0.5)

    documents = _load(folder)
    if documents is None:
        with only_one(folder.with_suffix(".lock"), wait):
            documents = _load(folder)  # another process may have made it meanwhile
            if documents is None:
                with new_folder(folder, replace=True) as temporary:
                    _write(temporary, source, tokenizer, progress)
                documents = _load(folder)
                assert documents is not None
    return documents


def _load(folder: Path) -> Documents | None:
    """The documents as they were written; None where they are not, or no longer whole."""
    try:
        note = json.loads((folder / "note.json").read_text(encoding="ascii"))
        kinds = {"tokens": np.dtype(note["kind"]), "flags": np.dtype(np.uint8), "starts": np.dtype(np.int64)}
        lengths = {"tokens": note["tokens"], "flags": note["tokens"], "starts": note["documents"] + 1}
        if any((folder / name).stat().st_size != lengths[name] * kind.itemsize for name, kind in kinds.items()):
            return None
        return Documents(**{name: np.asarray(np.memmap(folder / name, kind, "r")) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, source: DataSource, tokenizer: Any, progress: Progress) -> None:
    """Writes the documents of `source` into the empty folder, a piece at a time."""
    kind = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    total, count, end = source.count(), 0, 0
    with (
        (folder / "tokens").open("wb") as tokens,
        (folder / "flags").open("wb") as flags,
        (folder / "starts").open("wb") as starts,
    ):
        starts.write(np.int64(0).tobytes())
        for piece in _cut(source.read(), tokenizer):
            for ids, learn in piece:
                tokens.write(np.array(ids, dtype=kind).tobytes())
                flags.write(learn.tobytes())
                end += len(ids)
                starts.write(np.int64(end).tobytes())
            count += len(piece)
            progress(count, max(count, total))
    if count == 0:
        raise DataError(f"{source.label}: no conversations")
    note = {"tokens": end, "documents": count, "kind": kind.name}
    (folder / "note.json").write_text(json.dumps(note), encoding="ascii")
    progress(count, count)


def _cut(conversations: Iterator[Conversation], tokenizer: Any) -> Iterator[list[tuple[list[int], np.ndarray]]]:
    """Documents as token ids and flags, in order, a piece at a time; the next is rendered while one is cut."""
    template = Template(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # the model's own stays as it is
    backend.no_truncation()
    backend.no_padding()
    with ThreadPoolExecutor(1) as beside:
        waiting: tuple[list[Rendered], Future[list[Encoding]]] | None = None
        for piece in _pieces(conversations, template):
            coming = beside.submit(backend.encode_batch, [text for text, _ in piece], add_special_tokens=False)
            if waiting:
                yield _flagged(waiting[0], waiting[1].result())
            waiting = piece, coming
        if waiting:
            yield _flagged(waiting[0], waiting[1].result())


Rendered = tuple[str, list[tuple[int, int]]]
"""What Template.spans gives."""


def _pieces(conversations: Iterator[Conversation], template: Template) -> Iterator[list[Rendered]]:
    piece: list[Rendered] = []
    characters = 0
    for conversation in conversations:
        try:
            piece.append(template.spans(conversation.messages, conversation.tools))
        except DataError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        characters += len(piece[-1][0])
        if characters >= CHARACTERS or len(piece) == CONVERSATIONS:
            yield piece
            piece, characters = [], 0
    if piece:
        yield piece


def _flagged(piece: list[Rendered], cut: list[Encoding]) -> list[tuple[list[int], np.ndarray]]:
    documents = []
    for (_, spans), document in zip(piece, cut, strict=True):
        ids = document.ids
        learn = np.zeros(len(ids), dtype=np.uint8)
        for first, last in spans:
            begin = _token_from(document, first, last)
            if begin is not None:
                learn[begin : _token_after(document, first, last)] = LEARN
        learn[:1] |= FIRST
        documents.append((ids, learn))
    return documents


def _token_from(document: Encoding, first: int, last: int) -> int | None:
    """The first token that begins within the characters [first, last): one that began before them is not learned."""
    for character in range(first, last):  # a normaliser may have dropped some
        token: int | None = document.char_to_token(character)
        if token is not None:
            return token + (_begins_at(document, token) < first)
    return None


def _token_after(document: Encoding, first: int, last: int) -> int:
    """One behind the last token that begins within the characters [first, last)."""
    for character in range(last - 1, first - 1, -1):
        token: int | None = document.char_to_token(character)
        if token is not None:
            return next(n for n in itertools.count(token + 1) if n == len(document) or _begins_at(document, n) >= last)
    return 0


def _begins_at(document: Encoding, token: int) -> int:
    """The character that the token begins at."""
    characters = document.token_to_chars(token)
    assert characters is not None  # every token of a text without a pair has some
    return characters[0]
