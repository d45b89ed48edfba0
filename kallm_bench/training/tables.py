"""Data as rows of named values: JSONL(.gz), JSON and parquet files and hub sets, read a row at a time."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kallm_bench.errors import DataError
from kallm_bench.files import sha256
from kallm_bench.hub import hub_answers

FILE_ENDINGS = (".jsonl", ".gz", ".json", ".parquet", ".txt", ".csv")

AT_ONCE = 1024
"""Rows of a parquet file that are Python objects at one time."""


@dataclass(frozen=True)
class Columns:
    """What is read of a table: other columns are left where they are. Rows of JSON come whole.

    Args:
        needed, also: names of those that must be there, and of those that may.
        instead: what to do where one is missing.
    """

    needed: tuple[str, ...]
    also: tuple[str, ...] = ()
    instead: str = ""

    def among(self, there: Iterable[str], where: str) -> list[str]:
        """The columns to read. DataError where one that is needed is not among those that are there."""
        names = list(there)
        for name in self.needed:
            if name not in names:
                raise DataError(f"{where}: no column '{name}'; it has {listed(names)}. {self.instead}")
        return [name for name in (*self.needed, *self.also) if name in names]


@dataclass(frozen=True)
class DataTable:
    """Rows at hand.

    Args:
        label: its name in reports.
        fingerprint: of the content: a sha256 of the file, or the hub's own.
        read: gives each row, as parsed, and where it stands: the source and the line, row or entry, counted from 1.
        count: how many there are at most, found without parsing them.
    """

    label: str
    fingerprint: str
    read: Callable[[], Iterator[tuple[Any, str]]]
    count: Callable[[], int]


def find_table(source: str, columns: Columns) -> DataTable:
    """The table called `source`: a JSONL(.gz), JSON or parquet file, or a hub id (name[:config][:split]).

    Raises:
        DataError: there is none, or it lacks a column; says what to give instead.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".parquet":
            return DataTable(
                path.name, sha256(path), lambda: _read_parquet(path, columns), lambda: _open_parquet(path)[1]
            )
        return DataTable(path.name, sha256(path), lambda: _read_json(path), lambda: _count_lines(path))
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")) or path.suffix in FILE_ENDINGS:
        raise DataError(f"no data file '{source}'; data is a JSONL(.gz) or parquet file, a hub id, or 'bundled'")
    return _hub_table(source, columns)


def listed(names: Iterable[Any]) -> str:
    """The first of some names, for an error."""
    shown = ", ".join(f"'{name}'" for name in itertools.islice(names, 12))
    return shown or "nothing"


# --- JSON, a line a row or one list -----------------------------------------------------------------------------------


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _count_lines(path: Path) -> int:
    with damage_told(path), _open_bytes(path) as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(2**20), b"")) + 1


def _read_json(path: Path) -> Iterator[tuple[Any, str]]:
    if ".json" in path.suffixes and _is_list(path):
        yield from _read_list(path)
        return
    with damage_told(path), _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield parsed(line, where, "; a line should be one JSON object"), where


def _is_list(path: Path) -> bool:
    with damage_told(path), _open_text(path) as text:
        return text.read(1000).lstrip().startswith("[")


def _read_list(path: Path) -> Iterator[tuple[Any, str]]:
    """One JSON list, which has to be in memory whole; JSON a line has not."""
    with damage_told(path), _open_text(path) as text:
        entries = parsed(text.read(), str(path))
    for number, entry in enumerate(entries, 1):
        yield entry, f"{path}, entry {number}"


def parsed(text: str, where: str, wanted: str = "") -> Any:
    """The value of JSON. DataError where it is none, which ends in what is `wanted`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}){wanted}") from error


# --- tables -----------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> tuple[Any, int]:
    """The opened file, and how many rows it has."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: no parquet file, or a damaged one: {str(error).splitlines()[0]}") from error
    return file, file.metadata.num_rows


def _read_parquet(path: Path, columns: Columns) -> Iterator[tuple[Any, str]]:
    import pyarrow

    file, _ = _open_parquet(path)
    names = columns.among(file.schema_arrow.names, str(path))
    number = 0
    try:
        with file:
            for batch in file.iter_batches(batch_size=AT_ONCE, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged after row {number}: {str(error).splitlines()[0]}") from error


def _hub_table(source: str, columns: Columns) -> DataTable:
    import datasets

    datasets.disable_progress_bars()
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise DataError(f"hub data '{source}' has too many parts; it is name, name:split or name:config:split")
    config, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    instead = "Take --data bundled or a JSONL file instead"
    if not hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:  # datasets' own "not found" and "offline" are of these
        reason = " ".join(str(error).split("\n\n")[0].split())
        if "onfig" in reason or "split" in reason:
            instead = "Name them so: name:split or name:config:split"
        raise DataError(f"hub data '{source}' is not on this disk and not to be had ({reason}). {instead}") from error
    names = columns.among(loaded.column_names, f"hub data '{source}'")

    def read() -> Iterator[tuple[Any, str]]:
        for number, row in enumerate(loaded.select_columns(names), 1):
            yield row, f"{source}, row {number}"

    return DataTable(source, str(loaded._fingerprint), read, lambda: len(loaded))
