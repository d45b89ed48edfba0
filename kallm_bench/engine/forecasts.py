"""What the cells of a suite would take, before they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kallm_bench.budget import Budget, Wanted, foresee
from kallm_bench.engine.cells import bench_of, config_of, spec_of
from kallm_bench.engine.training import ways_of
from kallm_bench.errors import KallmError
from kallm_bench.filing import Bench, find_ref
from kallm_bench.records import RunRecord
from kallm_bench.suites import Cell, Suite


@dataclasses.dataclass(frozen=True)
class CellForecast:
    """A cell that was not run: what it is, and what its training would take.

    Args:
        arm, seed, what, questions: as a reader wants them.
        budget: None where nothing is trained or measured on held-out rows, or `trouble` says why none can be made.
    """

    arm: str
    seed: str
    what: str
    questions: str = ""
    budget: Budget | None = None
    trouble: str = ""


def foresee_suite(bench: Bench, suite: Suite) -> list[CellForecast]:
    """What each cell would take by what records of this testbed tell, and what is measured of layers alone."""
    records = bench.store.records(testbed=bench.testbed) if bench.testbed else []
    cells = []
    for cell in suite.cells:
        what = f"{cell.spec.basis}, {cell.spec.start}, blocks {cell.spec.blocks}" if cell.spec else "nothing replaced"
        asked = (cell.evals[0].source or "BIG-Bench Hard") if "eval-bbh" in cell.stages else ""
        here = CellForecast(cell.arm, str(cell.seed), what, asked)
        if "train" in cell.stages:
            try:
                here = dataclasses.replace(here, budget=_foresee_cell(bench, suite.name, cell, records))
            except KallmError as error:
                here = dataclasses.replace(here, trouble=str(error))
        cells.append(here)
    return cells + [CellForecast(each.arm, "", f"{len(each.contenders)} contenders") for each in suite.kernels]


def _foresee_cell(bench: Bench, suite: str, cell: Cell, records: Sequence[RunRecord]) -> Budget:
    bench, ref = bench_of(bench, cell), find_ref(cell.model)
    config, ways = config_of(cell, ref), ways_of(bench, cell.train)
    wanted = Wanted(
        suite, cell.arm, config, spec_of(cell, ref, config), cell.train, bench.device, bench.dtype,
        ways["batch_rows"], fast=ways["fast"], kept=ways["cache"] is not None,
    )  # fmt: skip
    return foresee(wanted, records)
