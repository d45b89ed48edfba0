"""What followed from answers once is remembered: bootstrapping hundreds of arms anew would take minutes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kallm_bench.files import DiskError, write_file

CODE = 1
"""Raised whenever the statistics change, so that what they gave before is forgotten."""

MOST = 50_000
"""Entries beyond which the memory begins anew."""


class Memory:
    """JSON values by key, kept in `folder`. Without one, or where that cannot be read or written, none is kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = folder / f"statistics-{CODE}.json" if folder else None
        self._values: dict[str, Any] = {}
        self._grown = False
        self._put_off: dict[str, Callable[[], Any]] | None = None
        self._in_vain: set[str] = set()
        with contextlib.suppress(OSError, ValueError):
            self._values = dict(json.loads(self._path.read_text(encoding="utf-8"))) if self._path else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of `key`, computed if it is not known; None is not kept. While it is put off, None too."""
        if key not in self._values and key not in self._in_vain:
            if self._put_off is not None:
                self._put_off[key] = compute
            else:
                self._learn(key, compute())
        return self._values.get(key)

    @contextlib.contextmanager
    def ahead(self) -> Iterator[Mapping[str, Callable[[], Any]]]:
        """While inside, what is not known is put off; in the end it is computed, on all processors at once.

        Yields what was put off. Threads do: drawing random numbers, which takes most of the time, leaves Python to
        others.
        """
        missing: dict[str, Callable[[], Any]] = {}
        self._put_off = missing
        try:
            yield missing
        finally:
            self._put_off = None
        if missing:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = pool.map(lambda compute: compute(), missing.values())
                for key, value in zip(missing, found, strict=True):
                    self._learn(key, value)

    def _learn(self, key: str, value: Any) -> None:
        if value is None:
            self._in_vain.add(key)
            return
        self._values[key] = value
        self._grown = True

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
