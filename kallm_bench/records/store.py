"""The results store: a folder of records, one folder a testbed, one below it a suite. Merging two is copying files."""

from __future__ import annotations

import gc
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kallm_bench.errors import RecordError
from kallm_bench.files import check_writable, explained, sweep_partial, write_file
from kallm_bench.records.endings import Ending
from kallm_bench.records.record import RunRecord

TESTBED_FILE = "testbed.json"

ENDINGS_FOLDER = "endings"
"""Below a suite's folder; beside the records, one would be taken for a damaged record by those who only know these."""

_Filed = TypeVar("_Filed", RunRecord, Ending)


class ResultsStore:
    """Reads and writes records below `folder`.

    Attributes:
        damaged: after `records()`, the files that were set aside and why.
        written: ids of the records that this object wrote.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.damaged: list[tuple[Path, str]] = []
        self.written: set[str] = set()

    def write(self, record: RunRecord, samples: Iterable[dict[str, Any]] | None = None) -> Path:
        """Writes a record, whole or not at all, after its samples, so that a record never lacks them.

        Raises:
            RecordError: the id exists already, or the record is malformed.
            DiskError: the disk refused; what was there before is unharmed.
        """
        path = self._folder_of(record) / f"{record.id}.json"
        text = record.to_json()
        if path.exists():
            raise RecordError(_EXISTS.format(record.id))
        sweep_partial(path.parent)
        if samples is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            write_file(self.samples_path(record), gzip.compress(lines.encode(), mtime=0))
        try:
            write_file(path, text.encode(), new=True)
        except FileExistsError:
            raise RecordError(_EXISTS.format(record.id)) from None
        self.written.add(record.id)
        return path

    def write_ending(self, ending: Ending) -> Path:
        """Writes how a cell ended, whole or not at all. Raises as `write` does."""
        path = self._folder_of(ending) / ENDINGS_FOLDER / f"{ending.id}.json"
        try:
            write_file(path, ending.to_json().encode(), new=True)
        except FileExistsError:
            raise RecordError(_EXISTS.format(ending.id)) from None
        return path

    def samples_path(self, record: RunRecord) -> Path:
        return self._folder_of(record) / f"{record.id}.samples.jsonl.gz"

    def samples(self, record: RunRecord) -> list[dict[str, Any]]:
        """The samples written with an evaluation; empty where it has none, or where they are damaged."""
        path = self.samples_path(record)
        if not path.is_file():
            return []
        try:
            lines = gzip.decompress(path.read_bytes()).decode().removesuffix("\n").split("\n")
            return [dict(each) for each in json.loads(f"[{','.join(lines)}]")]  # twice as fast as line by line
        except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
            self.damaged.append((path, f"not samples: {error}"))
            return []

    def records(self, suite: str | None = None, testbed: str | None = None) -> list[RunRecord]:
        """All readable records, oldest first, under the name their testbed has now; the others go to `damaged`.

        Those are files that are no records, records of another schema, and records whose id another file bears too. Of
        files that are copies of each other one is kept.
        """
        self.damaged = []
        records = self._read("*.json", RunRecord.from_json, suite, testbed)
        self.damaged += [
            (path, "not the description of a testbed: machines with records here may not be known again")
            for path in self.folder.glob(f"{glob.escape(testbed) if testbed else '*'}/{TESTBED_FILE}")
            if not _read_json(path)
        ]
        self.damaged.sort()
        return sorted(records, key=lambda record: (record.started, record.id))

    def endings(self, suite: str | None = None, testbed: str | None = None) -> list[Ending]:
        """All readable endings of cells that failed, oldest first; see `records`, whose `damaged` the others join."""
        depth = len(self.folder.parts) + len(("testbed", "suite", ENDINGS_FOLDER, "file"))
        self.damaged = [(path, reason) for path, reason in self.damaged if len(path.parts) != depth]
        endings = self._read(f"{ENDINGS_FOLDER}/*.json", Ending.from_json, suite, testbed)
        self.damaged.sort()
        return sorted(endings, key=lambda ending: (ending.ended, ending.id))

    def _read(
        self, files: str, parsed: Callable[[str], _Filed], suite: str | None, testbed: str | None
    ) -> list[_Filed]:
        """What can be read of the files of this pattern below a suite's folder; the others go to `damaged`."""
        where = (glob.escape(testbed) if testbed else "*", glob.escape(suite) if suite else "*", files)
        found: dict[str, list[Path]] = defaultdict(list)
        kept: dict[str, _Filed] = {}
        with collector_paused():
            for path in sorted(self.folder.glob("/".join(where)), key=self._by_testbed):
                try:
                    each = self._moved(parsed(path.read_text(encoding="utf-8")), path)
                except (RecordError, UnicodeDecodeError, OSError) as error:
                    self.damaged.append((path, str(error)))
                    continue
                found[each.id].append(path)
                kept.setdefault(each.id, each)  # the first of copies
        unclear = self._set_aside({id_: paths for id_, paths in found.items() if len(paths) > 1})
        return [each for id_, each in kept.items() if id_ not in unclear]

    def _set_aside(self, doubled: dict[str, list[Path]]) -> set[str]:
        """Names files with the same id; returns the ids of those that differ, of which none can be believed."""
        unclear = set()
        for id_, files in doubled.items():
            if len({path.read_bytes() for path in files}) == 1:
                self.damaged += [(path, f"a copy of {files[0]}") for path in files[1:]]
                continue
            unclear.add(id_)
            for path in files:
                others = ", ".join(str(other) for other in files if other != path)
                self.damaged.append((path, f"its id '{id_}' is that of another record too: {others}"))
        return unclear

    def find(self, key: str, testbed: str, suite: str = "", arm: str = "") -> RunRecord | None:
        """The newest record of this key on this testbed; of this suite and arm, if there is one of them."""
        found = [record for record in self.records(testbed=testbed) if record.key == key]
        here = [record for record in found if (record.suite, record.arm) == (suite, arm)]
        return here[-1] if here else found[-1] if found else None

    # --- testbeds -----------------------------------------------------------------------------------------------------

    def testbed(self, identity: dict[str, Any], facts: dict[str, Any] | None = None) -> str:
        """The name of the machine described by `identity`; `local-<hash>` until it is named. Made on first use.

        Args:
            facts: what is told of it beside, on first use, and may change without making it another machine.

        Raises:
            DiskError: the store cannot be written. Asked first, so that no work is done in vain.
        """
        if known := self.known_testbed(identity):
            check_writable(self.folder / known)
            return known
        fingerprint = _fingerprint(identity)
        name = f"local-{fingerprint}"
        content = {"schema": 1, "fingerprint": fingerprint, **identity, **(facts or {})}
        write_file(self.folder / name / TESTBED_FILE, (json.dumps(content, indent=1) + "\n").encode())
        return name

    def known_testbed(self, identity: dict[str, Any]) -> str:
        """The name of this machine where it has one here, else empty. Makes nothing."""
        fingerprint = _fingerprint(identity)
        for path in sorted(self.folder.glob(f"*/{TESTBED_FILE}")):
            if _read_json(path).get("fingerprint") == fingerprint:
                return path.parent.name
        return ""

    def describe(self, testbed: str) -> dict[str, Any]:
        """What testbed.json says of a machine; empty where there is none."""
        return _read_json(self.folder / testbed / TESTBED_FILE)

    def name_testbed(self, identity: dict[str, Any], name: str, facts: dict[str, Any] | None = None) -> str:
        """Gives this machine a readable name, moving what it has recorded; returns the name.

        Raises:
            RecordError: not a plain name, or another machine bears it.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name.startswith("local-"):
            raise RecordError(f"'{name}' cannot name a testbed; use a-z, 0-9, '.', '_' and '-', and not local-…")
        old = self.testbed(identity, facts)
        if name != old and (self.folder / name).exists():
            raise RecordError(f"another testbed is called '{name}' already")
        if name != old:
            with explained(self.folder / name):
                (self.folder / old).rename(self.folder / name)
        return name

    def _folder_of(self, filed: RunRecord | Ending) -> Path:
        return self.folder / filed.testbed / filed.suite

    def _testbed_of(self, path: Path) -> str:
        """The testbed that a file is filed under."""
        return path.parts[len(self.folder.parts)]

    def _by_testbed(self, path: Path) -> tuple[bool, Sequence[str]]:
        """Named testbeds first, so that of two copies that of a testbed that was named since is kept."""
        return self._testbed_of(path).startswith("local-"), path.parts

    def _moved(self, filed: _Filed, path: Path) -> _Filed:
        """What was read, as it is filed now: a testbed that has been named since keeps its records."""
        testbed = self._testbed_of(path)
        return filed if filed.testbed == testbed else type(filed)(**{**vars(filed), "testbed": testbed})


_EXISTS = "a record '{}' exists already; records are never rewritten"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keeps Python from looking for garbage: among many new records there is none, and looking takes as long again."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return data if isinstance(data, dict) else {}
