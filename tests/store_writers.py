"""Eight processes that write records into one store without pause, some of which are killed: for test_store.py.

`python store_writers.py FOLDER KILLS RECORDS` kills a writer KILLS times, at random moments, and starts another in its
place; then lets eight of them write RECORDS each to the end. A writer notes in FOLDER.told each record that it has
finished. Every fourth record has an id that all writers write, of which one alone can succeed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from kallm_bench.errors import RecordError
from kallm_bench.records import Metric, ResultsStore, RunRecord

WRITERS = 8


def numbered(id_: str, writer: str) -> RunRecord:
    return RunRecord(
        id=id_,
        stage="profile",
        suite="try",
        arm=writer,
        seed=0,
        testbed="here",
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        parents=(),
        settings={},
        key=id_,
        model={},
        data={},
        metrics=(Metric("load_seconds", 0.5, n=200, samples=(0.5,) * 200),),
        environment={},
    )


def write(folder: Path, writer: str, records: int | None) -> None:
    store = ResultsStore(folder)
    told = os.open(f"{folder}.told", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in _counted(records):
        id_ = f"shared-{number}" if number % 4 == 0 else f"{writer}-{number}"
        try:
            store.write(numbered(id_, writer), samples=[{"writer": writer}] * 50)
        except RecordError:
            continue  # another was first
        os.write(told, f"{id_} {writer}\n".encode())


def _counted(records: int | None) -> Iterator[int]:
    number = 0
    while records is None or number < records:
        yield number
        number += 1


def started(folder: Path, writer: str, records: int | None = None) -> int:
    """The id of a new process that writes on its own."""
    if child := os.fork():
        return child
    write(folder, writer, records)
    os._exit(0)


def main(folder: Path, kills: int, records: int) -> None:
    chosen = random.Random(0)
    writers = [started(folder, f"w{number}") for number in range(WRITERS)] if kills else []
    for kill in range(kills):
        time.sleep(chosen.uniform(0.0, 0.03))
        victim = chosen.randrange(WRITERS)
        os.kill(writers[victim], signal.SIGKILL)
        os.waitpid(writers[victim], 0)
        writers[victim] = started(folder, f"w{WRITERS + kill}")
    for child in writers:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for child in [started(folder, f"last{number}", records) for number in range(WRITERS)]:
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
