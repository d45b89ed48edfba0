"""What keeps a failed cell apart from the others: why it failed is noted for reports, and the rest goes on."""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from kallm_bench.errors import Interrupted, KallmError
from kallm_bench.files import DiskError
from kallm_bench.filing import Bench, new_id
from kallm_bench.profiling import first_line, give_back
from kallm_bench.records import Ending, RunRecord, standing_failures
from kallm_bench.records.endings import FIRST_STAGE
from kallm_bench.suites import STAGES


class Ran(NamedTuple):
    """What a suite's run came to: the records of the cells that ended well, and "arm, seed 0" -> why of the others."""

    records: list[RunRecord]
    failures: dict[str, str]


class Place(NamedTuple):
    """An arm and seed, or a problem for layers alone, which has no seeds."""

    arm: str
    seed: int | None = None

    def __str__(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"


@contextmanager
def apart(
    bench: Bench, ran: Ran, place: Place, failed: Collection[Place], begin: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """Notes why what is inside failed, and goes on after it; a stop that was asked for is no failure.

    Yields what is told of a part that begins, as `begin` is. That something went well is noted where it had `failed`.
    """
    stage = "kernels" if place.seed is None else FIRST_STAGE

    def begun(part: str) -> None:
        nonlocal stage
        _, _, last = part.rpartition(" ")  # as part_of names parts
        stage = last if last in STAGES else stage
        begin(part)

    try:
        yield begun
    except Interrupted:
        raise
    except KallmError as error:
        reason = str(error)
    except Exception as error:  # a bug, a library, the machine: the other cells are worth as much as before
        reason = _told(error)
    else:
        if place in failed:
            _note(bench, place, stage, "")
        return
    reason = " ".join(reason.split()) or "no reason was given"
    ran.failures[str(place)] = reason
    _note(bench, place, stage, reason)
    bench.watch(f"{place} failed: {reason}", 0, 0)
    with suppress(RuntimeError):  # a GPU that has failed for good; the other cells will say so of themselves
        give_back(bench.device)


def failed_before(bench: Bench) -> set[Place]:
    """What reports still tell as failed."""
    store = bench.store
    records = store.records(bench.suite, bench.testbed)
    standing = standing_failures(store.endings(bench.suite, bench.testbed), records)
    return {Place(each.arm, None if each.stage == "kernels" else each.seed) for each in standing}


def _note(bench: Bench, place: Place, stage: str, reason: str) -> None:
    """Files how a cell ended, for reports."""
    now = datetime.now(UTC)
    ending = Ending(
        id=new_id(now, "ending", place.arm, place.seed or 0, uuid.uuid4().hex),
        suite=bench.suite,
        arm=place.arm,
        seed=place.seed or 0,
        testbed=bench.testbed,
        stage=stage,
        ended=now.isoformat(timespec="microseconds"),
        reason=reason,
        suite_file=bench.suite_file,
    )
    try:
        bench.store.write_ending(ending)
    except DiskError as error:
        bench.watch(f"how {place} ended cannot be noted for the report: {error}", 0, 0)


def _told(error: Exception) -> str:
    """One line of an error that nobody foresaw, with where it came from."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory; a smaller --batch-size, --hidden, --length or --row-length needs less"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})"
