"""What the cells of a suite would take, before they are run: time and memory of each stage, and how that is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.bbh.evaluate import EvalSettings
from kallm_bench.bbh.protocols import find_protocol
from kallm_bench.bbh.tasks import TASKS
from kallm_bench.budget import Budget, Room, Wanted, foresee
from kallm_bench.efforts import (
    QUESTIONS_A_TASK,
    Effort,
    Speed,
    Work,
    foresee_stage,
    kernels_bytes,
    profile_bytes,
    questions_bytes,
    retrofit_bytes,
)
from kallm_bench.engine.cells import (
    asking,
    bench_of,
    check_cell,
    config_of,
    noting,
    part_of,
    parts_of,
    spec_of,
    stage_of,
)
from kallm_bench.engine.training import ways_of
from kallm_bench.errors import KallmError
from kallm_bench.filing import Bench, find_ref, parameter_count
from kallm_bench.models import KANSpec, complete_spec, replaced_sites, skeleton_of
from kallm_bench.profiling import KernelProblem
from kallm_bench.suites import Cell, Suite
from kallm_bench.teaching import Taught


@dataclasses.dataclass(frozen=True)
class CellForecast:
    """A cell that was not run: what it is, and what it would take.

    Args:
        arm, seed, what, questions: as a reader wants them.
        parameters: of the model after its retrofit; 0 where there is no model, or `trouble`.
        budget: of its training; None where nothing is trained or measured on held-out rows.
        efforts: of each part of it, by the name in parts_of; nothing of what an earlier cell has done for it.
        filed: whether each of these parts has a record for this cell, which holds where nothing has changed since.
        trouble: why it would be refused.
    """

    arm: str
    seed: str
    what: str
    questions: str = ""
    parameters: int = 0
    budget: Budget | None = None
    efforts: Mapping[str, Effort] = dataclasses.field(default_factory=dict)
    filed: bool = False
    trouble: str = ""

    @property
    def seconds(self) -> float:
        return sum(effort.seconds for effort in self.efforts.values())

    @property
    def peak_bytes(self) -> float | None:
        return max((each.peak_bytes for each in self.efforts.values() if each.peak_bytes), default=None)

    @property
    def sources(self) -> tuple[str, ...]:
        """How the efforts are known, each way once."""
        return tuple(dict.fromkeys(effort.source for effort in self.efforts.values()))


def foresee_suite(bench: Bench, suite: Suite, *, checks: bool = True) -> list[CellForecast]:
    """What each cell would take by what records of this testbed tell, else by an estimate.

    Args:
        checks: whether each cell is asked too if it can be, with the data and questions at hand.
    """
    ahead = _Ahead(bench, suite.name, checks)
    return [*map(ahead.cell, suite.cells), *map(ahead.problem, suite.kernels)]


def plan_of(bench: Bench, suite: Suite) -> dict[str, float]:
    """The seconds that each part of each cell would take; what cannot be foreseen takes none."""
    ahead = _Ahead(bench, suite.name, checks=False)
    bench.watch("foreseeing the work", 0, 1)
    parts = {
        part_of(cell, name): effort.seconds for cell in suite.cells for name, effort in ahead.cell(cell).efforts.items()
    }
    return parts | {each.arm: ahead.problem(each).seconds for each in suite.kernels}


class _Shape(NamedTuple):
    """A cell's model without values, the configuration it is made from, and the complete spec of what is replaced."""

    model: PreTrainedModel
    config: PreTrainedConfig
    spec: KANSpec | None


class _Ahead:
    """Foresees the cells of one suite in their order; what is the same in several is foreseen and counted once."""

    def __init__(self, bench: Bench, suite: str, checks: bool) -> None:
        self.bench, self.suite, self.checks = bench, suite, checks
        self.records = bench.store.records(testbed=bench.testbed) if bench.testbed else []
        self.filed = {(each.arm, each.seed, each.stage) for each in self.records if each.suite == suite}
        self.room = Room.of(bench.device, bench.runs).memory_bytes
        self.counted: set[str] = set()
        self.known: dict[str, CellForecast] = {}

    def cell(self, cell: Cell) -> CellForecast:
        what = f"{cell.spec.basis}, {cell.spec.start}, blocks {cell.spec.blocks}" if cell.spec else "nothing replaced"
        asked = (cell.evals[0].source or "BIG-Bench Hard") if "eval-bbh" in cell.stages else ""
        alike = repr(_seedless(cell))
        if alike not in self.known:
            self.known[alike] = self._foreseen(cell)
        found = self.known[alike]
        efforts = self._before(cell)
        for name, work in _works(cell).items():
            if name in found.efforts and work not in self.counted:
                self.counted.add(work)
                efforts[name] = _sum([found.efforts[name], *([efforts[name]] if name in efforts else [])])
        filed = bool(efforts) and all((cell.arm, cell.seed, stage_of(name)) in self.filed for name in efforts)
        return dataclasses.replace(
            found, arm=cell.arm, seed=str(cell.seed), what=what, questions=asked, efforts=efforts, filed=filed
        )

    def _before(self, cell: Cell) -> dict[str, Effort]:
        """What the cell that this one starts after takes where no earlier one has done it; done with the retrofit."""
        if not cell.after:
            return {}
        stages = tuple(stage for stage in cell.after.stages if stage in ("retrofit", "train"))
        efforts = self.cell(dataclasses.replace(cell.after, stages=stages)).efforts
        return {"retrofit": _sum(list(efforts.values()))} if efforts else {}

    def problem(self, problem: KernelProblem) -> CellForecast:
        settings = problem.settings() | self.bench.place
        effort = foresee_stage(
            "kernels", self.suite, problem.arm, Work(settings), self._speed(self.bench), self.records,
            kernels_bytes(problem, self.bench.dtype),
        )  # fmt: skip
        what, filed = f"{len(problem.contenders)} contenders", (problem.arm, 0, "kernels") in self.filed
        return CellForecast(problem.arm, "", what, efforts={"kernels": effort}, filed=filed)

    def _foreseen(self, cell: Cell) -> CellForecast:
        found = CellForecast("", "", "")
        try:
            found = self._foreseen_where_possible(cell)
            if self.checks:
                check_cell(cell, self.bench.shared)
        except KallmError as error:
            found = dataclasses.replace(found, trouble=str(error))
        return found

    def _foreseen_where_possible(self, cell: Cell) -> CellForecast:
        bench = bench_of(self.bench, cell)
        config = config_of(cell, find_ref(cell.model))
        spec = spec_of(cell, find_ref(cell.model), config)
        spec = spec and complete_spec(config, spec)
        shape = _Shape(skeleton_of(noting(config, spec)), config, spec)
        budget = self._budget(bench, cell, shape) if "train" in cell.stages else None
        efforts = {name: self._effort(bench, cell, shape, budget, name) for name in parts_of(cell)}
        return CellForecast("", "", "", parameters=parameter_count(shape.model), budget=budget, efforts=efforts)

    def _budget(self, bench: Bench, cell: Cell, shape: _Shape) -> Budget:
        ways = ways_of(bench, cell.train)
        wanted = Wanted(
            self.suite, cell.arm, shape.config, shape.spec, cell.train, bench.device, bench.dtype, ways["batch_rows"],
            fast=ways["fast"], kept=ways["cache"] is not None, taught=Taught(cell.curriculum, cell.distillation),
        )  # fmt: skip
        return foresee(wanted, self.records)

    def _effort(self, bench: Bench, cell: Cell, shape: _Shape, budget: Budget | None, name: str) -> Effort:
        """Of one part of a cell."""
        if name == "train" and budget:
            peak = budget.peak_bytes or questions_bytes(shape.model, bench.device)
            return Effort(budget.seconds, peak, budget.source)
        stage = stage_of(name)
        replaced = sum(map(parameter_count, replaced_sites(shape.model).values()))
        settings, questions, peak = self._asked(bench, cell, shape, name)
        work = Work(settings | bench.place, parameter_count(shape.model), replaced, questions)
        if stage == "retrofit":
            width, sites = shape.config.get_text_config(decoder=True).hidden_size, len(replaced_sites(shape.model))
            peak = retrofit_bytes(work, width, sites, bench.device, self.room)
        return foresee_stage(stage, self.suite, cell.arm, work, self._speed(bench), self.records, peak)

    def _asked(self, bench: Bench, cell: Cell, shape: _Shape, name: str) -> tuple[dict[str, Any], int, float]:
        """The settings of a stage as its record would hold them, the questions it asks, and bytes of memory."""
        if name == "retrofit" and shape.spec:
            text = {"calibration": dataclasses.asdict(cell.calibration)} if shape.spec.needs_calibration else {}
            return {"spec": shape.spec.to_json(), **text}, 0, 0.0
        if name == "profile":
            peak = profile_bytes(shape.model, cell.profile, bench.device, bench.dtype)
            return dataclasses.asdict(cell.profile), 0, peak
        (asked,) = (each for each in cell.evals if asking(each) == name)
        longest = asked.max_new_tokens or find_protocol(asked.protocol).max_new_tokens
        settings = {"protocol": asked.protocol, "max_new_tokens": longest}
        return settings, _count(asked), questions_bytes(shape.model, bench.device)

    def _speed(self, bench: Bench) -> Speed:
        return Speed.of(bench.device, bench.dtype)


def _sum(efforts: Sequence[Effort]) -> Effort:
    """Of work that is done one after the other."""
    sources = "; ".join(dict.fromkeys(effort.source for effort in efforts))
    peak = max((effort.peak_bytes for effort in efforts if effort.peak_bytes), default=None)
    return Effort(sum(effort.seconds for effort in efforts), peak, sources)


def _count(asked: EvalSettings) -> int:
    """Questions, about as many as there are."""
    tasks = [name for name in asked.tasks or TASKS if name in find_protocol(asked.protocol).tasks]
    return len(tasks) * min(asked.limit or QUESTIONS_A_TASK, QUESTIONS_A_TASK)


def _seedless(cell: Cell) -> Cell:
    """What cells of one arm have in common."""
    return dataclasses.replace(
        cell,
        seed=0,
        spec=cell.spec and dataclasses.replace(cell.spec, seed=0),
        match=cell.match and dataclasses.replace(cell.match, seed=0),
        train=dataclasses.replace(cell.train, seed=0),
        after=cell.after and _seedless(cell.after),
    )


def _works(cell: Cell) -> dict[str, str]:
    """Part of a cell -> everything that decides what is done in it; the same twice is done once."""
    learned = _learned(cell)
    made = repr((cell.model, cell.cut, cell.after and _learned(cell.after), cell.spec, cell.match, cell.calibration))
    works = {"retrofit": made, "train": learned, "profile": f"{learned}{cell.profile}"}
    works |= {asking(each): f"{learned}{each}" for each in cell.evals}
    return {name: f"{name} {work} {cell.dtype}" for name, work in works.items()}


def _learned(cell: Cell) -> str:
    """What decides the model after training; where no step is taken, no seed does."""
    train = cell.train if cell.train.steps else dataclasses.replace(cell.train, seed=0)
    start = _learned(cell.after) if cell.after else ""
    what = (cell.model, cell.cut, cell.spec, cell.match, cell.calibration, train, cell.curriculum, cell.distillation)
    return f"{start}{what}"
