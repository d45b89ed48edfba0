"""How long work tells whoever watches: one call with what is done, and of how much. Nothing here prints."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """Called now and then with the name of the work, how much of it is done and in all, and a short note."""

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None: ...


def nobody(work: str, done: int, total: int, note: str = "") -> None:
    """The Watch of whoever does not look."""
