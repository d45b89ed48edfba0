"""How long work tells whoever watches: one call with what is done, and of how much. Nothing here prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Watch(Protocol):
    """Called now and then with the name of the work, how much of it is done and in all, and a short note.

    A note may have several parts, the most important first, with ", " between them: where there is little room the last
    ones are left out.
    """

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None: ...


def nobody(work: str, done: int, total: int, note: str = "") -> None:
    """The Watch of whoever does not look."""


class Log(Protocol):
    """Called with figures of training, by name, and after how many steps they hold; for one step perhaps twice."""

    def __call__(self, step: int, figures: Mapping[str, float]) -> None: ...


def nowhere(step: int, figures: Mapping[str, float]) -> None:
    """The Log of whoever keeps none."""
