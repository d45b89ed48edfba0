"""The results store: a folder of records, one folder a testbed, one below it a suite. Merging two is copying files."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kallm_bench.errors import RecordError
from kallm_bench.files import check_writable, explained, write_file
from kallm_bench.records.record import RunRecord

TESTBED_FILE = "testbed.json"


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
            raise RecordError(f"a record '{record.id}' exists already; records are never rewritten")
        if samples is not None:
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            write_file(self.samples_path(record), gzip.compress(lines.encode(), mtime=0))
        write_file(path, text.encode())
        self.written.add(record.id)
        return path

    def samples_path(self, record: RunRecord) -> Path:
        return self._folder_of(record) / f"{record.id}.samples.jsonl.gz"

    def samples(self, record: RunRecord) -> list[dict[str, Any]]:
        """The samples written with an evaluation; empty where it has none, or where they are damaged."""
        path = self.samples_path(record)
        if not path.is_file():
            return []
        try:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                return [dict(json.loads(line)) for line in lines]
        except (OSError, EOFError, zlib.error, ValueError, TypeError) as error:
            self.damaged.append((path, f"not samples: {error}"))
            return []

    def records(self, suite: str | None = None, testbed: str | None = None) -> list[RunRecord]:
        """All readable records, oldest first, under the name their testbed has now; unreadable ones go to `damaged`."""
        self.damaged = []
        found = []
        where = (glob.escape(testbed) if testbed else "*", glob.escape(suite) if suite else "*")
        for path in sorted(self.folder.glob("/".join((*where, "*.json")))):
            try:
                record = RunRecord.from_json(path.read_text(encoding="utf-8"))
            except (RecordError, UnicodeDecodeError, OSError) as error:
                self.damaged.append((path, str(error)))
                continue
            found.append(_moved(record, path))
        return sorted(found, key=lambda record: (record.started, record.id))

    def find(self, key: str, testbed: str, suite: str = "", arm: str = "") -> RunRecord | None:
        """The newest record of this key on this testbed; of this suite and arm, if there is one of them."""
        found = [record for record in self.records(testbed=testbed) if record.key == key]
        here = [record for record in found if (record.suite, record.arm) == (suite, arm)]
        return here[-1] if here else found[-1] if found else None

    # --- testbeds -----------------------------------------------------------------------------------------------------

    def testbed(self, identity: dict[str, Any]) -> str:
        """The name of the machine described by `identity`; `local-<hash>` until it is named. Made on first use.

        Raises:
            DiskError: the store cannot be written. Asked first, so that no work is done in vain.
        """
        if known := self.known_testbed(identity):
            check_writable(self.folder / known)
            return known
        fingerprint = _fingerprint(identity)
        name = f"local-{fingerprint}"
        self._describe(name, fingerprint, identity)
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

    def name_testbed(self, identity: dict[str, Any], name: str) -> str:
        """Gives this machine a readable name, moving what it has recorded; returns the name.

        Raises:
            RecordError: not a plain name, or another machine bears it.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or name.startswith("local-"):
            raise RecordError(f"'{name}' cannot name a testbed; use a-z, 0-9, '.', '_' and '-', and not local-…")
        old = self.testbed(identity)
        if name != old and (self.folder / name).exists():
            raise RecordError(f"another testbed is called '{name}' already")
        if name != old:
            with explained(self.folder / name):
                (self.folder / old).rename(self.folder / name)
        return name

    def _describe(self, name: str, fingerprint: str, identity: dict[str, Any]) -> None:
        content = {"schema": 1, "fingerprint": fingerprint, **identity}
        write_file(self.folder / name / TESTBED_FILE, (json.dumps(content, indent=1) + "\n").encode())

    def _folder_of(self, record: RunRecord) -> Path:
        return self.folder / record.testbed / record.suite


def _moved(record: RunRecord, path: Path) -> RunRecord:
    """The record as it is filed now: a testbed that has been named since keeps its records."""
    folder = path.parent.parent.name
    return record if record.testbed == folder else RunRecord(**{**vars(record), "testbed": folder})


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return {}
    return data if isinstance(data, dict) else {}
