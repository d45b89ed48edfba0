"""Rows of tokens as training takes them, read out of one long stream that stays on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

LEARN, FIRST = 1, 2
"""Flags of a token: it bears loss; it begins a document."""

IGNORE = -100
"""Target of a token that bears no loss, as in torch's cross_entropy."""


class View:
    """An array (N, T) of rows that are read out of a stream one by one; nothing is copied but the rows asked for.

    Args:
        stream: (L,), usually a memory map.
        shape: (N, T).
    """

    def __init__(self, stream: np.ndarray, shape: tuple[int, int]) -> None:
        self._stream = stream
        self.dtype = stream.dtype
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """The rows of these numbers, in memory: (B, T), or (T,) for one number. IndexError where there is no such."""
        if isinstance(numbers, slice):
            numbers = range(*numbers.indices(len(self)))
        chosen = np.asarray(numbers, dtype=np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise IndexError(f"row {numbers} of {len(self)}")
        return self._read(chosen)

    def _read(self, chosen: np.ndarray) -> np.ndarray:
        """Rows that there are: (B,) numbers -> (B, T)."""
        raise NotImplementedError


class Cut(View):
    """Some spans of a stream, one after the other, cut into full rows.

    One stream so serves rows of every length, and every part of a data set. What is left after the last full row is
    left out.

    Args:
        stream: (L,).
        begins, ends: (S,) int64, the spans: stream[begins[s]:ends[s]].
        row_length: T.
    """

    def __init__(self, stream: np.ndarray, begins: np.ndarray, ends: np.ndarray, row_length: int) -> None:
        self._ends = np.cumsum(ends - begins)  # (S,), counted within the spans alone
        self._shifts = ends - self._ends  # (S,), from a place within the spans to one in the stream
        super().__init__(stream, (int(self._ends[-1]) // row_length if len(ends) else 0, row_length))

    def _read(self, chosen: np.ndarray) -> np.ndarray:
        places = chosen[..., None] * self.shape[1] + np.arange(self.shape[1])
        rows: np.ndarray = self._stream[places + self._shifts[np.searchsorted(self._ends, places, side="right")]]
        return rows


class Apart(View):
    """Documents of a stream, each in rows of its own: as many as it fills, and zeros after its end.

    Args:
        stream: (L,).
        begins, ends: (D,) int64, the documents, none of them empty.
        row_length: T.
    """

    def __init__(self, stream: np.ndarray, begins: np.ndarray, ends: np.ndarray, row_length: int) -> None:
        rows = -(-(ends - begins) // row_length)
        self._begins, self._ends = begins, ends
        self._last = np.cumsum(rows)  # (D,), the number of the row after a document's last
        self._first = self._last - rows
        super().__init__(stream, (int(self._last[-1]) if len(ends) else 0, row_length))

    def _read(self, chosen: np.ndarray) -> np.ndarray:
        document = np.searchsorted(self._last, chosen, side="right")
        begins = self._begins[document] + (chosen - self._first[document]) * self.shape[1]
        places, ends = begins[..., None] + np.arange(self.shape[1]), self._ends[document][..., None]
        rows: np.ndarray = np.where(places < ends, self._stream[np.minimum(places, ends - 1)], 0)
        return rows.astype(self.dtype)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one data set.

    Args:
        tokens: (N, T) token ids, on the disk.
        flags: (N, T) uint8, LEARN and FIRST.
        source, fingerprint: what was packed: its name, and a sha256 over data, tokenizer and row length.
        packed: whether a row may hold several documents.
    """

    tokens: np.ndarray | View
    flags: np.ndarray | View
    source: str
    fingerprint: str
    packed: bool = field(default=True, kw_only=True)

    def __len__(self) -> int:
        return len(self.tokens)

    def bearing(self, numbers: Sequence[int] | np.ndarray) -> int:
        """How many positions of these rows bear loss."""
        return int((self.flags[numbers][:, 1:] & (LEARN | FIRST) == LEARN).sum())

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
