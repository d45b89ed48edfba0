"""All cells of a suite, one after the other, and how much work they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from kallm_bench.engine.cells import check_cell, remove_weights, run_cell
from kallm_bench.engine.costs import profile_kernels
from kallm_bench.engine.failures import Place, Ran, apart, failed_before
from kallm_bench.errors import KallmError
from kallm_bench.files import check_writable
from kallm_bench.filing import Bench
from kallm_bench.records import RunRecord
from kallm_bench.reporting import Figure, judged, written
from kallm_bench.suites import Cell, Suite


def run_suite(bench: Bench, suite: Suite, begin: Callable[[str], None] = lambda part: None) -> Ran:
    """Runs every cell that is not done; one that fails, for whatever reason, does not stop the others.

    Raises:
        KallmError: some cell can never be, as check_cell says; then nothing is run.
    """
    bench = dataclasses.replace(bench, suite=suite.name)
    check_writable(bench.runs)
    failed = failed_before(bench)
    bench.watch("checking the suite", 0, 1)
    for cell in suite.cells:
        try:
            check_cell(cell, bench.shared)
        except KallmError as error:
            raise type(error)(f"arm '{cell.arm}': {error}") from error
    ran = Ran([], {})
    begun_after = {(cell.after.arm, cell.after.seed) for cell in suite.cells if cell.after}
    left: list[tuple[Cell, list[RunRecord]]] = []
    for number, cell in enumerate(suite.cells, 1):
        with apart(bench, ran, Place(cell.arm, cell.seed), failed, begin) as begun:
            records = run_cell(bench, cell, begun)
            ran.records.extend(records)
            bench.watch(_ended(cell, records), 0, 0)
            if (cell.arm, cell.seed) not in begun_after:
                left.append((cell, records))
        if not bench.keep_weights:
            left = [each for each in left if not remove_weights(bench, *each, suite.cells[number:])]
    for problem in suite.kernels:
        with apart(bench, ran, Place(problem.arm), failed, begin) as begun:
            begun(problem.arm)
            ran.records.append(profile_kernels(bench, problem))
    return ran


SHOWN = {"heldout_loss": "held-out loss", "class_accuracy": "right", "train_tokens_per_second": "training tokens/s"}
"""Figures of a cell that has ended, with their names; the accuracy has its protocol's."""


def _ended(cell: Cell, records: Sequence[RunRecord]) -> str:
    """A line for a cell that has ended, with what there is to say of it."""
    found = {}
    for record in records:
        for name, label in (SHOWN | {"accuracy": str(record.settings.get("protocol"))}).items():
            if (value := record.value(name)) is not None:
                found[label] = written(name, Figure(value, *judged(record, name)))
    figures = ", ".join(f"{label} {value}" for label, value in found.items())
    return f"{cell.arm}, seed {cell.seed}: {figures or 'done'}"
