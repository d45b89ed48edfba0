"""Conversations in, full rows of tokens out: which tokens bear loss, and where each document begins.

Every conversation is rendered by the model's own chat template and cut into tokens whole. Documents follow each other
without padding and are cut where a row ends. In a row, positions start again at each document, and documents do not see
each other. Rows are packed once, without a seed; a seed only permutes them, so one cache serves every seed.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from kallm_bench.errors import DataError
from kallm_bench.files import new_folder, sha256
from kallm_bench.hub import hub_answers

HELDOUT_EVERY = 50
"""Without a held-out file of its own, every 50th conversation is held out, and never trained on."""

LEARN, FIRST = 1, 2
"""Flags of a token: it bears loss; it begins a document."""

IGNORE = -100
"""Target of a token that bears no loss, as in torch's cross_entropy."""

FILE_ENDINGS = (".jsonl", ".gz", ".json", ".parquet", ".txt", ".csv")

Conversation = list[dict[str, str]]
Progress = Callable[[int, int], None]
"""Told how many are done, and of how many."""


@dataclass(frozen=True)
class Rows:
    """Packed rows of one data set.

    Args:
        tokens: (N, T) token ids, a memory map.
        flags: (N, T) uint8, LEARN and FIRST.
        source, fingerprint: what was packed: its name, and a sha256 over data, tokenizer and row length.
    """

    tokens: np.ndarray
    flags: np.ndarray
    source: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, numbers: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The rows of these numbers as a model wants them.

        Returns:
            input_ids, position_ids and targets, each (B, T) int64. targets[b, t] is the token after t where that one
            bears loss and belongs to the same document, else IGNORE.
        """
        tokens = torch.from_numpy(self.tokens[numbers].astype(np.int64))
        flags = torch.from_numpy(self.flags[numbers])
        first = (flags & FIRST).bool()
        first[:, 0] = True
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        positions = places - torch.where(first, places, 0).cummax(dim=1).values
        targets = torch.full_like(tokens, IGNORE)
        bears_loss = (flags[:, 1:] & LEARN).bool() & ~first[:, 1:]
        targets[:, :-1][bears_loss] = tokens[:, 1:][bears_loss]
        batch = {"input_ids": tokens, "position_ids": positions, "targets": targets}
        return {name: tensor.to(device) for name, tensor in batch.items()}


def prepare(
    source: str,
    tokenizer: Any,
    row_length: int,
    cache: Path,
    heldout: str | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Rows, Rows]:
    """Training rows and held-out rows, packed on first use and memory-mapped from then on.

    Args:
        source: "bundled", a JSONL(.gz) or parquet file, or a hub id.
        heldout: the same kinds; None holds out every 50th conversation of `source`.
        row_length: tokens in a row.
        cache: folder of packed data.

    Raises:
        DataError: missing, empty or malformed data, with the line; a chat template that cannot be used; too little data
            for one row.
    """
    if heldout is None:
        return (
            _packed(source, tokenizer, row_length, cache, "train", progress),
            _packed(source, tokenizer, row_length, cache, "heldout", progress),
        )
    return (
        _packed(source, tokenizer, row_length, cache, "all", progress),
        _packed(heldout, tokenizer, row_length, cache, "all", progress),
    )


def _packed(source: str, tokenizer: Any, row_length: int, cache: Path, part: str, progress: Progress) -> Rows:
    found = find_data(source)
    parts = [found.fingerprint, tokenizer_fingerprint(tokenizer), str(row_length), part, "packing-1"]
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    folder = cache / "rows" / fingerprint[:20]
    rows = _load_rows(folder, row_length)
    if rows is None:
        conversations = _part(found.read(), part)
        if not conversations:
            raise DataError(f"{source}: no conversations" + ("" if part == "all" else f" for the {part} part"))
        tokens, flags = _pack(conversations, tokenizer, row_length, progress)
        if len(tokens) == 0:
            raise DataError(f"{source}: the {part} part has fewer than {row_length} tokens, which do not fill a row")
        with new_folder(folder, replace=True, needed_bytes=tokens.nbytes + flags.nbytes) as temporary:
            np.save(temporary / "tokens.npy", tokens)
            np.save(temporary / "flags.npy", flags)
        rows = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "flags.npy", mmap_mode="r")
    return Rows(*rows, source, fingerprint)


def _load_rows(folder: Path, row_length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and flags as they were packed; None where they are not, or no longer whole."""
    try:
        tokens, flags = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "flags"))
    except (OSError, ValueError, EOFError):
        return None
    return (tokens, flags) if tokens.shape == flags.shape and tokens.shape[1:] == (row_length,) else None


def _part(conversations: Iterable[Conversation], part: str) -> list[Conversation]:
    if part == "all":
        return list(conversations)
    held_out = part == "heldout"
    return [one for number, one in enumerate(conversations) if (number % HELDOUT_EVERY == 0) is held_out]


# --- where conversations come from ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSource:
    """Conversations at hand: their name in tables, a fingerprint of their bytes, and a function that reads them."""

    label: str
    fingerprint: str
    read: Callable[[], Iterator[Conversation]]


def find_data(source: str) -> DataSource:
    """The data called `source`. DataError where there is none; says what to run instead."""
    if source == "bundled":
        path = _bundled_file()
        return DataSource(source, sha256(path), lambda: _read_chitchat(path))
    path = Path(source).expanduser()
    if path.is_file():
        reader = _read_parquet if path.suffix == ".parquet" else _read_jsonl
        return DataSource(path.name, sha256(path), lambda: reader(path))
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in FILE_ENDINGS:
        raise DataError(f"no data file '{source}'; data is a JSONL(.gz) or parquet file, a hub id, or 'bundled'")
    return _hub_data(source)


def _bundled_file() -> Path:
    found = importlib.util.find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        raise DataError("the bundled data is not installed. Run: pip install chitchat-dataset==0.9.0")
    return Path(found.origin).parent / "dataset.json"


def _read_chitchat(path: Path) -> Iterator[Conversation]:
    """BYU's Chit-Chat: two people take turns; the second speaker is the one to learn from."""
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        turns = ["\n".join(part["text"] for part in turn).strip() for turn in entry["messages"]]
        turns = [turn for turn in turns if turn]
        if len(turns) >= 2:
            roles = ("user", "assistant")
            yield [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def _read_jsonl(path: Path) -> Iterator[Conversation]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _conversation(line, f"{path}, line {number}")
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is damaged: {error}") from error


def _read_parquet(path: Path) -> Iterator[Conversation]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path, columns=["messages"]).to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: cannot read the column 'messages': {str(error).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield _checked(row, f"{path}, row {number}")


def _hub_data(source: str) -> DataSource:
    import datasets

    datasets.disable_progress_bars()
    instead = "Take --data bundled or a JSONL file instead"
    if not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(source, split="train")
    except (OSError, ValueError) as error:  # datasets' own "not found" and "offline" are of these
        reason = str(error).splitlines()[0]
        raise DataError(f"hub data '{source}' is not on this disk and not to be had ({reason}). {instead}") from error

    def read() -> Iterator[Conversation]:
        for number, row in enumerate(loaded, 1):
            yield _checked(row, f"{source}, row {number}")

    return DataSource(source, str(loaded._fingerprint), read)


def _conversation(line: str, where: str) -> Conversation:
    try:
        return _checked(json.loads(line), where)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from error


def _checked(row: Any, where: str) -> Conversation:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: needs {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: a message needs a 'role' and a 'content', both text; got {str(message)[:80]}")
        if not message["content"].isprintable() and not _is_unicode(message["content"]):
            raise DataError(f"{where}: half a character, as '\\ud83d' alone is, cannot be cut into tokens")
        if message["role"] not in ("system", "user", "assistant"):
            raise DataError(f"{where}: role '{message['role']}'; roles are system, user and assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- tokens -----------------------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over everything that decides how a conversation is cut.

    Raises:
        DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer beside it; save one into its folder")
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template or ""]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Template:
    """A tokenizer's chat template, and where in a rendered conversation the assistant speaks.

    What a template writes between the messages depends on their roles alone, so it is found once for each sequence of
    roles, by rendering marks in place of the messages; and checked against the real rendering every time.

    Raises:
        DataError: no chat template, or one that rewrites what the messages say.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError("the model's tokenizer has no chat template; take an instruction-tuned model")
        self._tokenizer = tokenizer
        self._between: dict[tuple[str, ...], list[str]] = {}
        self._ending = self._pieces(("user", "assistant"))[-1].rstrip("\n")

    def _render(self, conversation: Conversation) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(conversation, tokenize=False)
        except jinja2.TemplateError as error:
            raise DataError(f"the model's chat template cannot render a conversation: {error}") from error
        return text

    def spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and (start, end) in characters of each assistant's turn, its end mark included."""
        pieces = self._pieces(tuple(message["role"] for message in conversation))
        text, spans = pieces[0], []
        for message, after in zip(conversation, pieces[1:], strict=True):
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                if not after.startswith(self._ending):
                    raise DataError(
                        f"the chat template ends a turn with {after[:20]!r} here, {self._ending!r} elsewhere"
                    )
                spans.append((start, len(text) + len(self._ending)))
            text += after
        if text != self._render(conversation):
            trimmed = [{**message, "content": message["content"].strip()} for message in conversation]
            if trimmed != conversation:
                return self.spans(trimmed)  # many templates trim; then that is what the model sees
            raise DataError(f"the chat template rewrites what a message says: {conversation[0]['content'][:60]!r} ...")
        return text, spans

    def _pieces(self, roles: tuple[str, ...]) -> list[str]:
        if roles not in self._between:
            marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
            text = self._render([{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)])
            self._between[roles] = re.split("\ue000\\d+\ue001", text)
        return self._between[roles]


def _pack(
    conversations: list[Conversation], tokenizer: Any, row_length: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """All conversations one after the other, cut into full rows; the last, unfilled row is left out."""
    kind = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    tokens: list[np.ndarray] = []
    flags: list[np.ndarray] = []
    template = Template(tokenizer)
    for start in range(0, len(conversations), 256):
        rendered = [template.spans(conversation) for conversation in conversations[start : start + 256]]
        cut = tokenizer.backend_tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for (_, spans), document in zip(rendered, cut, strict=True):
            learn = np.zeros(len(document.ids), dtype=np.uint8)
            for first, last in spans:
                begin = document.char_to_token(first)
                begin += document.token_to_chars(begin)[0] < first  # a token that began in the prompt is not learned
                learn[begin : document.char_to_token(last - 1) + 1] = LEARN
            learn[0] |= FIRST
            tokens.append(np.array(document.ids, dtype=kind))
            flags.append(learn)
        progress(min(start + 256, len(conversations)), len(conversations))
    rows = sum(map(len, tokens)) // row_length
    shape = (rows, row_length)
    return (
        np.concatenate(tokens)[: rows * row_length].reshape(shape),
        np.concatenate(flags)[: rows * row_length].reshape(shape),
    )
