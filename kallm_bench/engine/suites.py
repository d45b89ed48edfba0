"""All cells of a suite, one after the other, and how much work they are."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from kallm_bench.bbh.tasks import TASKS
from kallm_bench.engine.cells import check_cell, part_of, run_cell
from kallm_bench.engine.costs import profile_kernels
from kallm_bench.errors import Interrupted, KallmError
from kallm_bench.files import check_writable
from kallm_bench.filing import Bench
from kallm_bench.profiling import KernelProblem, first_line, give_back
from kallm_bench.records import RunRecord
from kallm_bench.suites import Suite


class Ran(NamedTuple):
    """What a suite's run came to: the records of the cells that ended well, and "arm, seed 0" -> why of the others."""

    records: list[RunRecord]
    failures: dict[str, str]


def run_suite(bench: Bench, suite: Suite, begin: Callable[[str], None] = lambda part: None) -> Ran:
    """Runs every cell that is not done; one that fails, for whatever reason, does not stop the others.

    Raises:
        KallmError: some cell can never be, as check_cell says; then nothing is run.
    """
    bench = dataclasses.replace(bench, suite=suite.name)
    check_writable(bench.runs)
    bench.watch("checking the suite", 0, 1)
    for cell in suite.cells:
        try:
            check_cell(cell)
        except KallmError as error:
            raise type(error)(f"arm '{cell.arm}': {error}") from error
    ran = Ran([], {})
    for cell in suite.cells:
        with _apart(bench, ran, f"{cell.arm}, seed {cell.seed}"):
            ran.records.extend(run_cell(bench, cell, begin))
    for problem in suite.kernels:
        begin(problem.arm)
        with _apart(bench, ran, problem.arm):
            ran.records.append(profile_kernels(bench, problem))
    return ran


@contextmanager
def _apart(bench: Bench, ran: Ran, name: str) -> Iterator[None]:
    """Notes why what is inside failed, and goes on after it; a stop that was asked for is none."""
    try:
        yield
        return
    except Interrupted:
        raise
    except KallmError as error:
        ran.failures[name] = str(error)
    except Exception as error:  # a bug, a library, the machine: the other cells are worth as much as before
        ran.failures[name] = _told(error)
    give_back(bench.device)


def _told(error: Exception) -> str:
    """One line of an error that nobody foresaw, with where it came from."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory; a smaller --batch-size, --hidden, --length or --row-length needs less"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{first_line(error)} ({Path(place.filename).name}, line {place.lineno})"


def plan_of(suite: Suite) -> dict[str, float]:
    """How much work each stage of each cell is, in tokens forwarded; enough to tell how long the rest will take."""
    plan = {}
    for cell in suite.cells:
        heldout = cell.train.heldout_rows * cell.train.row_length * (2 if cell.train.steps else 1)
        questions = sum((each.limit or 250) * len(each.tasks or TASKS) for each in cell.evals)
        shape = cell.profile.batch * cell.profile.length * (cell.profile.repeats + 1)
        work = {"retrofit": 1000, "train": 3 * cell.train.tokens + heldout, "eval-bbh": 600 * questions}
        work["profile"] = 10 * shape
        if cell.spec and cell.spec.needs_calibration:
            steps = cell.spec.start_steps if {"distill", "sequence"} & set(cell.spec.start.split("+")) else 0
            work["retrofit"] = 2 * cell.calibration.tokens + 1000 * steps
        plan.update({part_of(cell, stage): float(work[stage]) for stage in cell.stages})
    return plan | plan_of_kernels(suite.kernels)


def plan_of_kernels(problems: Sequence[KernelProblem]) -> dict[str, float]:
    """The same of problems for layers alone: compiling takes most of the time, and the same for each contender."""
    return {problem.arm: 10_000.0 * len(problem.contenders) for problem in problems}
