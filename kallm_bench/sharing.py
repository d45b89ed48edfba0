"""What the cells of one process find once and share: tokenizers, packed rows, what untouched blocks say to a text."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

T = TypeVar("T")

MOST = 4
"""Things of one kind that stay; of suites whose arms start from more models, the oldest go."""


class Shared:
    """Things by kind and by all that decides them, so that it makes no difference whether one was found just now.

    What is shared is never changed by those who share it.
    """

    def __init__(self) -> None:
        self._found: dict[str, dict[Hashable, Any]] = {}

    @property
    def kinds(self) -> set[str]:
        """Of which there is something."""
        return set(self._found)

    def once(self, kind: str, key: Hashable, find: Callable[[], T], most: int = MOST) -> T:
        """What `find` returned for this key, now or earlier.

        Args:
            kind, key: what it is, and everything that decides it.
            most: how many of this kind stay; room for a new one is made before it is found.
        """
        found = self._found.setdefault(kind, {})
        if key not in found:
            while len(found) >= most:
                del found[next(iter(found))]
            found[key] = find()
        return cast(T, found[key])

    def forget(self, kind: str) -> None:
        """Lets go of everything of a kind, because it takes memory that others need."""
        self._found.pop(kind, None)
