"""What followed from answers once is remembered: reading those of hundreds of evaluations anew would take minutes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kallm_bench.files import DiskError, write_file

CODE = 2
"""Raised whenever the statistics change, so that what they gave before is forgotten."""

MOST = 50_000
"""Entries beyond which the memory begins anew."""


class Memory:
    """JSON values by key, kept in `folder`. Without one, or where that cannot be read or written, none is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / f"statistics-{CODE}.json" if folder else None
        self._values: dict[str, Any] = {}
        self._grown = False
        with contextlib.suppress(OSError, ValueError):
            self._values = dict(json.loads(self._path.read_text(encoding="utf-8"))) if self._path else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed if it is not known; None is not kept."""
        if key not in self._values:
            value = compute()
            if value is None:
                return None
            self._values[key] = value
            self._grown = True
        return self._values[key]

    def keep(self) -> None:
        """Writes what was learned to the disk."""
        if self._grown and self._path:
            kept = self._values if len(self._values) <= MOST else {}
            with contextlib.suppress(DiskError):
                write_file(self._path, json.dumps(kept).encode())


def file_key(path: Path) -> list[str | int]:
    """What identifies a file's content as long as nobody tampers with its times; of a missing one only its name."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]
