"""One arm and seed of a suite: asked beforehand whether it can be, then run from stage to stage."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedConfig

from kallm_bench.bbh.evaluate import EvalSettings, prepare
from kallm_bench.engine.costs import profile
from kallm_bench.engine.cutting import cut_model
from kallm_bench.engine.data import data_of, fingerprint_of, tokenizer_of
from kallm_bench.engine.lessons import Lessons
from kallm_bench.engine.questions import eval_bbh
from kallm_bench.engine.retrofitting import retrofit
from kallm_bench.engine.starting import SEEN
from kallm_bench.engine.training import train_model
from kallm_bench.errors import DataError, RemadeError
from kallm_bench.filing import Bench, ModelRef, find_ref, ref_after
from kallm_bench.models import (
    CalibrationSettings,
    CutSettings,
    KANSpec,
    complete_spec,
    cut_config,
    load_config,
    parameters_of,
    skeleton_of,
    specs_of,
)
from kallm_bench.profiling import find_dtype
from kallm_bench.records import RunRecord
from kallm_bench.sharing import Shared
from kallm_bench.suites import Cell
from kallm_bench.training import check_context, check_scope, find_texts, make_curriculum


def run_cell(bench: Bench, cell: Cell, begin: Callable[[str], None] = lambda part: None) -> list[RunRecord]:
    """Runs what of a cell is not done yet: retrofit, training, questions, profile; returns the record of each.

    Weights may be gone once what follows is done; where a stage needs some that are, they are made again.
    """
    bench = bench_of(bench, cell)
    try:
        return _stages_of(bench, cell, begin)
    except RemadeError:  # as it may be on a GPU; what follows is asked of the new ones
        return _stages_of(bench, cell, begin)


def _stages_of(bench: Bench, cell: Cell, begin: Callable[[str], None]) -> list[RunRecord]:
    records, ref, _ = _learned(bench, cell, begin)
    if {"eval-bbh", "profile"} & set(cell.stages):
        bench.shared.forget(SEEN)
    if "eval-bbh" in cell.stages:
        for each in cell.evals:
            begin(part_of(cell, asking(each)))
            records.append(eval_bbh(bench, ref, each))
    if "profile" in cell.stages:
        begin(part_of(cell, "profile"))
        records.append(profile(bench, ref, cell.profile))
    return records


def remove_weights(bench: Bench, cell: Cell, records: Sequence[RunRecord], coming: Sequence[Cell]) -> bool:
    """Removes the checkpoints that a cell has left, unless a coming one starts from them; returns whether it did.

    What was made outside its suite stays.
    """
    if any(_retrofitted_from(other) == _retrofitted_from(cell) for other in coming):
        return False
    ours = {record.id for record in bench.store.records(bench.suite, bench.testbed)}
    for record in records:
        for folder in {Path(artifact.path).parent for artifact in record.artifacts}:
            if folder.parent == bench.runs and (record.reused or record.id) in ours:
                shutil.rmtree(folder, ignore_errors=True)
    return True


def _retrofitted_from(cell: Cell) -> tuple[object, ...]:
    """What decides the checkpoint that its retrofit leaves."""
    return cell.model, cell.cut, cell.spec, cell.match, cell.seed, cell.after, _calibration_of(cell)


def bench_of(bench: Bench, cell: Cell) -> Bench:
    """Where a cell is run: the suite's place, in its own dtype if it has one."""
    dtype = find_dtype(cell.dtype, bench.device) if cell.dtype else bench.dtype
    return dataclasses.replace(bench, arm=cell.arm, seed=cell.seed, dtype=dtype)


def _learned(
    bench: Bench, cell: Cell, begin: Callable[[str], None] = lambda part: None
) -> tuple[list[RunRecord], ModelRef, ModelRef]:
    """The records of retrofit and training, the model that they left, and the one that nothing was replaced in."""
    records: list[RunRecord] = []
    begin(part_of(cell, "retrofit"))
    if cell.after:
        _, ref, untouched = _learned(bench_of(bench, cell.after), cell.after)
    else:
        ref = find_ref(cell.model)
        untouched = ref = _cut_ref(bench, ref, cell.cut) if cell.cut.cuts else ref
    start = ref
    if (wanted := spec_of(cell, ref)) is not None:
        spec, text = wanted, _calibration_of(cell)
        records.append(retrofit(bench, start, spec, calibration=text, weights_needed=False))
        ref = ref_after(records[-1], start, remake=lambda: _again(bench, start, spec, text))
    if "train" in cell.stages:
        bench.shared.forget(SEEN)
        begin(part_of(cell, "train"))
        train = functools.partial(train_model, bench, ref, cell.train, lessons=_lessons_of(cell, start, untouched))
        records.append(train(weights_needed=False))
        ref = ref_after(records[-1], ref, remake=train)
    return records, ref, untouched


def _again(bench: Bench, start: ModelRef, spec: KANSpec, text: CalibrationSettings | None) -> RunRecord:
    """A retrofit whose weights are gone, in the midst of the stage that needs them."""
    try:
        return retrofit(bench, start, spec, calibration=text)
    finally:
        bench.shared.forget(SEEN)


def _cut_ref(bench: Bench, ref: ModelRef, settings: CutSettings) -> ModelRef:
    """What a suite's arms start from where it cuts the model first; one record for all of them."""
    bench = dataclasses.replace(bench, arm="", seed=0)
    record = cut_model(bench, ref, settings, weights_needed=False)
    made = ref_after(record, ref, remake=lambda: cut_model(bench, ref, settings))
    return dataclasses.replace(made, base={}, before=None)  # replaced modules come back from here, not the whole model


def spec_of(cell: Cell, ref: ModelRef, config: PreTrainedConfig | None = None) -> KANSpec | None:
    """A cell's spec; with as many parameters as another arm's modules where it says so.

    Args:
        config: of the model, where that is not what `ref` opens.
    """
    if cell.spec is None or cell.match is None:
        return cell.spec
    config = config or load_config(ref.open())
    return dataclasses.replace(cell.spec, params=parameters_of(config, complete_spec(config, cell.match)))


def _lessons_of(cell: Cell, ref: ModelRef, untouched: ModelRef) -> Lessons:
    """Of a cell that starts from `ref`."""
    return Lessons(cell.curriculum, cell.distillation, untouched if cell.cut.cuts or cell.after else None).of(ref)


def config_of(cell: Cell, ref: ModelRef) -> PreTrainedConfig:
    """Of the model that a cell replaces parts of, which `ref` opens before it is cut and before other arms are."""
    if cell.after:
        config = config_of(cell.after, ref)
        return noting(config, spec_of(cell.after, ref, config))
    return _untouched_config(cell, ref)


def _untouched_config(cell: Cell, ref: ModelRef) -> PreTrainedConfig:
    config = load_config(ref.open())
    return cut_config(config, cell.cut.blocks) if cell.cut.cuts else config


def noting(config: PreTrainedConfig, spec: KANSpec | None) -> PreTrainedConfig:
    """The configuration of a model after another retrofit."""
    if spec is None:
        return config
    config = copy.deepcopy(config)
    config.kallm = [*(getattr(config, "kallm", None) or []), complete_spec(config, spec).to_json()]
    return config


def _calibration_of(cell: Cell) -> CalibrationSettings | None:
    return cell.calibration if cell.spec and cell.spec.needs_calibration else None


def check_cell(cell: Cell, shared: Shared | None = None) -> None:
    """Asks of every stage of a cell whether it can be, before the first one runs. Raises what that stage would.

    Args:
        shared: what is found here and needed again.
    """
    shared = shared or Shared()
    ref = find_ref(cell.model)
    config = config_of(cell, ref)
    with _saying_how_to_take_others():
        _check_data(cell)
    if spec := spec_of(cell, ref, config):
        spec = complete_spec(config, spec)
    replaced = bool(cell.spec or specs_of(config))
    if cell.train.steps and "train" in cell.stages:
        check_scope(cell.train.scope, replaced=replaced, tail_from=cell.train.tail_from)
        lessons = _lessons_of(cell, ref, ref)
        lessons.check(cell.train)
        _check_lessons(cell, lessons, config, spec)
    if cell.profile.scope != "none" and "profile" in cell.stages:
        check_scope(cell.profile.scope, replaced=replaced, tail_from=cell.profile.tail_from)
    tokenizer = tokenizer_of(ref.open(), shared)
    fingerprint_of(tokenizer, shared)
    if "train" in cell.stages:
        check_context(config, cell.train.row_length)
    if "eval-bbh" in cell.stages:
        for each in cell.evals:
            prepare(each, tokenizer)


def _check_data(cell: Cell) -> None:
    """Asks whether all texts of a cell are there."""
    if cell.cut.data:
        find_texts(cell.cut.data)
    if text := _calibration_of(cell):
        data_of(text)
    if "train" in cell.stages:
        data_of(cell.train)


@contextmanager
def _saying_how_to_take_others() -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; --data and --heldout name what to take in the place of the suite's own") from error


def _check_lessons(cell: Cell, lessons: Lessons, config: PreTrainedConfig, spec: KANSpec | None) -> None:
    """Asks a model without values whether it can have a cell's curriculum."""
    if not lessons.curriculum.active:
        return
    base = skeleton_of(_untouched_config(cell, lessons.base)) if lessons.base else None
    make_curriculum(skeleton_of(noting(config, spec)), lessons.curriculum, cell.train, base)


def parts_of(cell: Cell) -> list[str]:
    """What a cell consists of, in order: a name each, which ends in that of its stage."""
    parts = ["retrofit"] if cell.spec else []
    parts += ["train"] if "train" in cell.stages else []
    parts += [asking(each) for each in cell.evals] if "eval-bbh" in cell.stages else []
    return [*parts, *(["profile"] if "profile" in cell.stages else [])]


def asking(settings: EvalSettings) -> str:
    """The name of the part that asks these questions."""
    return f"{settings.protocol} eval-bbh"


def stage_of(name: str) -> str:
    """The stage that a part belongs to, whether its cell stands before it or not."""
    return name.rpartition(" ")[2]


def part_of(cell: Cell, name: str) -> str:
    """What of a suite's work a part of a cell is."""
    return f"{cell.arm} seed {cell.seed} {name}"
