"""The store under pressure: writers side by side, kills, a full disk, copies, stores merged in any order."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from store_writers import WRITERS, numbered
from test_reporting import MACHINE, Bench

from kallm_bench.files import LEFT_SECONDS, DiskError, write_file
from kallm_bench.records import ResultsStore
from kallm_bench.reporting import build_tables, to_csv, to_json, to_markdown


@pytest.mark.parametrize("kills", [0, 20, pytest.param(200, marks=pytest.mark.long)])
def test_eight_writers_and_kills_leave_whole_records_and_lose_none(tmp_path: Path, kills: int) -> None:
    folder = tmp_path / "results"
    program = Path(__file__).parent / "store_writers.py"
    subprocess.run([sys.executable, str(program), str(folder), str(kills), "12"], check=True)
    told = [line.split() for line in Path(f"{folder}.told").read_text().splitlines()]
    store = ResultsStore(folder)
    records = {record.id: record for record in store.records()}
    assert store.damaged == []
    assert len({id_ for id_, _ in told}) == len(told), "two writers were told that the same record is theirs"
    assert {id_ for id_, _ in told} <= set(records)
    assert all(records[id_].arm == writer for id_, writer in told)
    assert len(records) - len(told) <= kills + WRITERS, "only a killed writer can have finished without saying so"
    assert len(told) >= WRITERS * 9
    samples = {id_: store.samples(record) for id_, record in records.items()}
    assert all(len(each) == 50 for each in samples.values())
    if not kills:
        assert list(folder.rglob(".*")) == []


def test_beginnings_that_killed_writers_left_are_removed_in_time(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    first = store.write(numbered("a", "w"))
    old, new = first.parent / ".b.json.x1.partial", first.parent / ".c.json.x2.partial"
    for path in (old, new):
        path.write_text("{")
    long_ago = time.time() - LEFT_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    store.write(numbered("d", "w"))
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


@pytest.mark.parametrize("room", [0, 2_000, 20_000])
def test_a_full_disk_leaves_whole_records(tmp_path: Path, room: int) -> None:
    """A file-size limit stands in for the disk's end: writing fails half-way, in the samples or in the record."""
    program = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from store_writers import numbered
from kallm_bench.files import DiskError
from kallm_bench.records import ResultsStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = ResultsStore({str(tmp_path)!r})
store.write(numbered("before", "w"), samples=[{{"n": 1}}])
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))
import random
try:
    store.write(numbered("full", "w"), samples=[{{"n": random.random()}} for _ in range(5000)])
except DiskError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    store = ResultsStore(tmp_path)
    assert [record.id for record in store.records()] == ["before"]
    assert store.damaged == []
    assert {path.name.partition(".")[0] for path in (tmp_path / "here" / "try").iterdir()} == {"before"}


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 64 KiB, where this user may mount one."""
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        store = ResultsStore(tmp_path)

        def write_many() -> None:
            for number in range(100):
                store.write(numbered(f"r{number}", "w"), samples=[{"n": number}])

        with pytest.raises(DiskError, match="no space left"):
            write_many()
        assert len(store.records()) == len(store.written) > 5
        assert store.damaged == []
        assert not list(tmp_path.rglob("*.partial"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_name_is_given_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another process takes it between the question and the answer, and on disks without hard links."""
    path = tmp_path / "a.json"
    write_file(path, b"first", new=True)
    with pytest.raises(FileExistsError):
        write_file(path, b"second", new=True)
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(FileExistsError):
        write_file(path, b"third", new=True)
    write_file(tmp_path / "b.json", b"fourth", new=True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.json": b"first", "b.json": b"fourth"}


def test_two_records_with_one_id_are_set_aside_by_name(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    path = store.write(numbered("a", "w"))
    store.write(numbered("good", "w"))
    other = path.with_name("a (copy).json")
    other.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 2.0}))
    assert [record.id for record in store.records()] == ["good"]
    assert {each: reason.partition(":")[0] for each, reason in store.damaged} == {
        path: "its id 'a' is that of another record too",
        other: "its id 'a' is that of another record too",
    }
    assert str(other) in dict(store.damaged)[path]


def test_of_copies_one_is_kept_and_that_of_a_named_testbed(tmp_path: Path) -> None:
    """Two stores were merged of which one had named the machine since."""
    store = ResultsStore(tmp_path)
    path = store.write(numbered("a", "w"))
    named = tmp_path / "local-12" / "try" / "a.json"
    named.parent.mkdir(parents=True)
    shutil.copy(path, named)
    assert [(record.id, record.testbed) for record in store.records()] == [("a", "here")]
    assert store.damaged == [(named, f"a copy of {path}")]


def stores_of_eight_machines(folder: Path) -> list[Path]:
    """Each with two arms of two seeds; some hold what another had copied to it earlier, and one a damaged file."""
    for number in range(8):
        bench = Bench(folder / str(number), f"m{number}-")
        bench.testbed = bench.store.testbed(MACHINE | {"cores": 2 + number // 2})  # two of a kind each
        for seed in range(2):
            bench.arm("untouched", seed, None, 2.0 + number / 10, right=4)
            bench.arm("kan", seed, {"basis": "cheby2", "degree": 2}, 2.0 + number / 10, right=(number + seed) % 9)
        bench.ending("late", number % 3, "train", f"out of memory on machine {number}")
        bench.ending("well", 0, "train", "not this time" if number % 2 else "")
    shutil.copytree(folder / "3", folder / "5", dirs_exist_ok=True)
    (folder / "6" / bench.testbed / "try" / "cut.json").parent.mkdir(exist_ok=True, parents=True)
    (folder / "6" / bench.testbed / "try" / "cut.json").write_text("{")
    (folder / "6" / bench.testbed / "try" / "endings" / "cut.json").parent.mkdir(exist_ok=True)
    (folder / "6" / bench.testbed / "try" / "endings" / "cut.json").write_text("{")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("merges", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_merging_in_any_order_gives_the_same_reports(tmp_path: Path, merges: int) -> None:
    parts, generator = stores_of_eight_machines(tmp_path / "parts"), np.random.default_rng(0)
    reports = set()
    for merged in _merged(parts, tmp_path / "merged", merges, generator):
        store = ResultsStore(merged)
        tables = build_tables(store)
        reports.add((to_markdown(tables), to_csv(tables), to_json(tables), str(store.damaged)))
    assert len(reports) == 1
    text, *_, set_aside = reports.pop()
    assert len(re.findall(r"^## try on [\w-]+$", text, re.MULTILINE)) == 4  # kinds of machines
    assert text.count(": what failed\n") == 4
    assert set_aside.count("cut.json") == 2


def _merged(parts: list[Path], into: Path, times: int, generator: np.random.Generator) -> Iterator[Path]:
    """The union of all parts, again and again, copied in another order, some twice."""
    for _ in range(times):
        order = [*generator.permutation(len(parts)), *generator.integers(len(parts), size=2)]
        for number in order:
            shutil.copytree(parts[number], into, dirs_exist_ok=True, copy_function=shutil.copyfile)
        yield into
        shutil.rmtree(into)
