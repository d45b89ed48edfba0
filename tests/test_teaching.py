"""What a teacher and a curriculum are said to cost: against the products that PyTorch counts, and an H100's records."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from test_budget import RESULTS, on_h100, trained, wanted
from test_forward import some_rows
from torch.utils.flop_counter import FlopCounterMode

from kallm_bench.budget import ESTIMATE, Wanted, foresee
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.profiling.flops import training_flops
from kallm_bench.records import ResultsStore, RunRecord
from kallm_bench.teaching import Costs, Taught, costs_of
from kallm_bench.training import (
    SCOPES,
    CurriculumSettings,
    DistillationSettings,
    Forward,
    Teacher,
    TrainSettings,
    apply_scope,
)
from kallm_bench.training.curriculum import Curriculum
from kallm_bench.training.forward import Batch, make_batch

__all__ = ["on_h100"]

STEPS = 12
HALF = DistillationSettings(0.5)
CURRICULA = {
    "degree": CurriculumSettings(start_degree=1),
    "stages": CurriculumSettings(stages="backwards"),
    "anneal": CurriculumSettings(anneal="linear"),
    "all": CurriculumSettings(start_degree=2, stages="forwards", anneal="cosine"),
}


def settings_of(scope: str = "tail") -> TrainSettings:
    return TrainSettings(tokens=STEPS * 2 * 16, row_length=16, rows_per_step=2, scope=scope, heldout_rows=1)


def pupil(base: Any) -> Any:
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("2-3", "cheby2", degree=4, hidden=12))
    return model


def products(model: Any, batch: Batch, teacher: Teacher | None = None) -> int:
    """FLOP of a step in products of matrices, as PyTorch counts them."""
    with Forward(model, teacher=teacher, changes=True) as forward, FlopCounterMode(display=False) as counter:
        forward.objective(batch).total.backward()
    model.zero_grad()
    found = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in found.items() if "mm" in str(operation) and "bmm" not in str(operation))


def costs(model: Any, batch: Batch, settings: TrainSettings, **taught: Any) -> Costs:
    model = copy.deepcopy(model).to("meta")
    return costs_of(model, model.config, Taught(**taught), settings, len(batch.targets) / batch.input_ids.numel())


@pytest.mark.parametrize("scope", SCOPES)
def test_a_teacher_costs_a_forward_pass_and_what_it_does_not_share(tiny_llama: Any, scope: str) -> None:
    base = tiny_llama(vocab_size=97)
    model, batch = pupil(base), make_batch(some_rows(2), [0, 1])
    apply_scope(model, scope)
    foreseen = costs(model, batch, settings_of(scope), distillation=HALF)
    alone, whole = products(model, batch), sum(parameter.numel() for parameter in base.parameters())
    teacher = Teacher(model, base, HALF)
    more = products(model, batch, teacher) - alone
    assert more > 0
    assert foreseen.flops * batch.input_ids.numel() == pytest.approx(more)
    shared = {id(parameter) for parameter in model.parameters()}
    assert foreseen.memory.held == sum(each.numel() for each in base.parameters() if id(each) not in shared)
    assert foreseen.memory.loaded == whole


@pytest.mark.parametrize("name", CURRICULA)
def test_a_curriculum_costs_what_is_computed_in_the_mean_over_its_steps(tiny_llama: Any, name: str) -> None:
    base = tiny_llama(vocab_size=97)
    model, batch = pupil(base), make_batch(some_rows(2), [0, 1])
    apply_scope(model, "tail")
    foreseen = costs(model, batch, settings_of(), curriculum=CURRICULA[name])
    alone = products(model, batch)
    curriculum = Curriculum(model, CURRICULA[name], STEPS, base)
    more = []
    for step in range(STEPS):
        curriculum.set(step)
        more.append(products(model, batch) - alone)
    assert len(set(more)) > 1
    assert foreseen.flops * batch.input_ids.numel() == pytest.approx(sum(more) / STEPS)


def test_no_lessons_and_no_steps_cost_nothing(tiny_llama: Any) -> None:
    model, batch = pupil(tiny_llama(vocab_size=97)), make_batch(some_rows(2), [0, 1])
    apply_scope(model, "tail")
    assert costs(model, batch, settings_of()) == Costs()
    measured = dataclasses.replace(settings_of(), tokens=0)
    assert costs(model, batch, measured, distillation=HALF) == Costs()


# --- from records -----------------------------------------------------------------------------------------------------


def of_h100(suite: str, arm: str) -> RunRecord:
    records = ResultsStore(RESULTS).records(suite, "h100")
    return next(each for each in records if (each.arm, each.stage) == (arm, "train"))


@pytest.mark.parametrize("lesson", ["distilled", "anneal", "stages"])
@pytest.mark.parametrize("arm", ["kan", "linear-matched"])
def test_memory_of_a_gpu_under_lessons_is_known_by_shapes_and_from_a_run_without(
    arm: str, lesson: str, on_h100: None
) -> None:
    true, plain = of_h100("curricula", f"{arm}+{lesson}"), of_h100("curricula", arm)
    for known, within in (([], 0.15), ([plain], 0.1)):
        coming = foresee(wanted("curricula", f"{arm}+{lesson}"), known)
        assert set(coming.peaks) == {"peak_vram_allocated_bytes", "peak_vram_reserved_bytes"}
        for name, value in coming.peaks.items():
            assert value == pytest.approx(true.value(name), rel=within)


def ask(model: Any, kept: bool = False, **taught: Any) -> Wanted:
    """A run that replaces what it has not yet."""
    config = copy.deepcopy(model.config)
    config.kallm, spec = None, KANSpec("2-3", "cheby2", degree=4, hidden=12)
    place = torch.device("cpu"), torch.float32
    return Wanted("s", "a", config, spec, settings_of(), *place, 2, kept=kept, taught=Taught(**taught))


@pytest.mark.parametrize("kept", [False, True])
def test_a_record_tells_of_a_run_that_is_taught_otherwise(tiny_llama: Any, kept: bool) -> None:
    """By a teacher's FLOP beside those that a step does: without frozen blocks where their answers are read."""
    model = pupil(tiny_llama(vocab_size=97))
    apply_scope(model, "tail")
    own, settings = training_flops(model, 0.5), settings_of().described()
    teachers = costs_of(model, model.config, Taught(distillation=HALF), settings_of(), 0.5).flops
    below = 2 * sum(each.numel() for block in model.model.layers[:2] for each in block.parameters() if each.dim() == 2)
    more = 1 + teachers / (own - below * kept)
    figures = {"train_flops_per_token": own, "bearing_share": 0.5, "prefix_cache_share": float(kept)}
    figures |= {"peak_resident_bytes": 4e9, "train_tokens_per_second": 1e-3, "train_seconds": 0.0}
    plain = trained(model, settings, **figures)
    heard = trained(model, settings | {"distillation": dataclasses.asdict(HALF)}, **figures)
    same, taught = (foresee(ask(model, kept, **lessons), [plain]) for lessons in ({}, {"distillation": HALF}))
    steps = STEPS * 2 * 16 / 1e-3
    looks = same.seconds - steps
    assert taught.seconds - looks == pytest.approx(steps * more, rel=1e-4)
    assert taught.peaks["peak_resident_bytes"] > same.peaks["peak_resident_bytes"]
    same, untaught = (foresee(ask(model, kept, **lessons), [heard]) for lessons in ({"distillation": HALF}, {}))
    assert same.seconds - untaught.seconds == pytest.approx(steps * (1 - 1 / more), rel=1e-4)
    assert same.peaks["peak_resident_bytes"] > untaught.peaks["peak_resident_bytes"]


def test_the_record_of_a_run_taught_alike_tells_most_and_one_under_another_curriculum_nothing(tiny_llama: Any) -> None:
    model = pupil(tiny_llama(vocab_size=97))
    settings = settings_of().described()
    plain = trained(model, settings, "plain")
    heard = trained(model, settings | {"distillation": dataclasses.asdict(HALF)}, "heard")
    staged = trained(model, settings | {"curriculum": dataclasses.asdict(CURRICULA["degree"])}, "staged")
    records = [plain, heard, staged]

    def told_by(known: list[RunRecord], **taught: Any) -> str:
        return foresee(ask(model, **taught), known).source

    assert told_by(records) == "by plain of s"
    assert told_by(records, distillation=HALF) == "by heard of s"
    assert told_by(records, curriculum=CURRICULA["degree"]) == "by staged of s"
    assert told_by(records, curriculum=CURRICULA["anneal"]) == "by plain of s"
    assert told_by([staged]) == ESTIMATE
