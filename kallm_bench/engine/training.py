"""The stage that trains a checkpoint, or only tells what that would take."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.budget import Budget, Room, try_run
from kallm_bench.engine.checkpoints import describe_checkpoint
from kallm_bench.engine.data import data_of, fingerprint_of, rows_of, tokenizer_of
from kallm_bench.engine.lessons import NO_LESSONS, Lessons
from kallm_bench.errors import TrainingError
from kallm_bench.files import cache_folder, sha256
from kallm_bench.filing import Bench, ModelRef, Stage
from kallm_bench.footprint import ADAM_BYTES
from kallm_bench.models import load_model, load_weights, save_checkpoint
from kallm_bench.profiling import begin_anew, describe_run, heldout_curve, peak_memory, surrounded
from kallm_bench.progress import Log, nowhere
from kallm_bench.records import Metric, RunRecord
from kallm_bench.training import (
    CLASSIFIER,
    DataSource,
    DataTable,
    DistillationSettings,
    LabelledRows,
    Rows,
    Teacher,
    TrainSettings,
    answer,
    apply_scope,
    check_head,
    gather_into,
    make_curriculum,
    merge,
    parameters_in,
    put_head,
    tracking,
    train,
    write_head,
)

FAST_TOKENS = 2_000_000
"""From so many on, the quarter of a minute that compiling blocks takes on a GPU is won back."""


def train_model(
    bench: Bench,
    ref: ModelRef,
    settings: TrainSettings,
    out: Path | None = None,
    *,
    lessons: Lessons = NO_LESSONS,
    replace: bool = False,
    resume: bool = True,
    weights_needed: bool = True,
) -> RunRecord:
    """Trains a checkpoint, from where it was stopped, and saves it; zero tokens only measure the held-out loss.

    Several processes do it together, `bench.processes`: the first one writes, and all return its record.

    Args:
        resume: whether what a stopped run has saved is taken up; else it is removed.
        weights_needed: whether a record without its weights will not do.
    """
    processes = bench.processes
    with processes.in_turn():
        data, heldout = data_of(settings)
    bench.watch("loading the model", 0, 1)
    tokenizer = tokenizer_of(ref.tokenizer_source(), bench.shared)
    described = settings.described() | bench.place | {"tokenizer": fingerprint_of(tokenizer, bench.shared)}
    described |= {"data": data.fingerprint, "heldout": heldout and heldout.fingerprint}
    lessons = (lessons if settings.steps else NO_LESSONS).of(ref)
    lessons.check(settings)
    described |= lessons.described()
    if not settings.heldout_interval:
        del described["heldout_every"]  # as it was before there was such a setting
    if settings.task == "classify":
        head = ref.open().folder / CLASSIFIER
        described["head"] = sha256(head) if head.is_file() else None
    if settings.steps == 0:
        described["seed"] = None  # one measurement serves every seed
    stage = Stage(bench, "train", described, ref)
    if settings.steps:
        stage.folder = out or bench.runs / f"{ref.label}-trained-{stage.key[:8]}"
    if processes.tell(stage.key) != stage.key:
        raise TrainingError("the processes of this run were given different settings, models or data")
    with stage.claimed(weights_needed) if processes.first else nullcontext() as done:
        if not processes.tell(done is not None):
            done = _train(bench, ref, stage, settings, lessons, tokenizer, data, replace, resume)
        if processes.first:
            shutil.rmtree(_state_of(stage), ignore_errors=True)
        told = processes.tell(done.to_json() if done else None)
    return done or RunRecord.from_json(told)


def _train(
    bench: Bench,
    ref: ModelRef,
    stage: Stage,
    settings: TrainSettings,
    lessons: Lessons,
    tokenizer: Any,
    data: DataSource | DataTable,
    replace: bool,
    resume: bool,
) -> RunRecord | None:
    """The record, on the first process."""
    processes = bench.processes
    replace = processes.first and stage.folder is not None and stage.may_replace(replace)

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    def load(device: torch.device | str, which: ModelRef = ref) -> PreTrainedModel:
        return load_weights(which.open(), torch.float32, device)

    begin_anew(bench.device)
    model = load("cpu" if bench.sharded else bench.device)
    base = load(model.device, lessons.base) if lessons.base else None
    curriculum = make_curriculum(model, lessons.curriculum, settings, base)
    teaching = _teaching(lessons.distillation, base)
    del base  # a curriculum keeps of it what stood where something was put
    with processes.in_turn():
        if settings.steps:  # refused before the data is packed
            learning = parameters_in(model, settings.scope, settings.tail_from, settings.lora)
            if processes.first and (warning := _lack_of_room(bench, stage, model, learning)):
                bench.watch(warning, 0, 0)
        rows, kept = rows_of(settings, tokenizer, packing, bench.shared)
    own_head = _ready(model, rows, settings, ref)
    looking: AbstractContextManager[list[str]] = nullcontext([])
    if processes.count == 1:  # else what seems another's is this run's own
        looking = surrounded(bench.device)
    with _logging(bench, stage) as log, peak_memory(bench.device) as peak, looking as surroundings:
        result = train(
            model,
            rows,
            kept,
            settings,
            _state_of(stage),
            watch=bench.watch,
            log=log,
            resume=resume,
            curriculum=curriculum,
            teaching=teaching,
            processes=processes,
            sharded=bench.sharded,
            **ways_of(bench, settings),
        )
    del teaching
    figures = []
    if settings.steps:
        figures = [*describe_run(model, rows, settings, result, bench.dtype, processes, surroundings), *peak]
    answers = None
    if isinstance(kept, LabelledRows):
        ways = ways_of(bench, settings)
        answers = answer(
            model, kept, settings.heldout_rows, autocast=ways["autocast"], batch_rows=ways["batch_rows"],
            watch=bench.watch, processes=processes, sharded=bench.sharded,
        )  # fmt: skip
    if bench.sharded:
        split, model = model, load("cpu") if processes.first else model
        if processes.first:
            own_head = _ready(model, rows, settings, ref)
            if settings.steps:
                apply_scope(model, settings.scope, settings.tail_from, settings.lora)
        gather_into(model, split, processes)
    if not processes.first:
        return None
    if settings.steps:
        merge(model, settings.scope)
    head = model.get_output_embeddings()
    if own_head is not None:
        model.set_output_embeddings(own_head)
    loss = "class_loss" if answers else "heldout_loss"
    metrics = [
        *(answers.metrics() if answers else ()),
        Metric(loss, result.heldout_after, n=result.heldout_tokens),
        Metric(f"{loss}_before", result.heldout_before, n=result.heldout_tokens),
        Metric("trainable_parameters", result.trainable_parameters),
        Metric("trained_tokens", settings.steps * settings.rows_per_step * settings.row_length),
    ]
    about = {"source": data.label, "fingerprint": data.fingerprint}
    samples = answers.samples() if answers else None
    if stage.folder is None:
        return stage.finish(metrics, data=about, model=model, samples=samples)
    last = result.losses[-max(1, len(result.losses) // 10) :]
    name = "class_train_loss" if answers else "train_loss"
    curve = heldout_curve(settings, result)
    metrics.append(Metric(name, sum(last) / len(last), n=len(last), samples=result.losses))
    metrics += [dataclasses.replace(each, name=f"{loss}_curve") if answers else each for each in curve] + figures
    save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), base=stage.base, replace=replace)
    if answers:
        write_head(stage.folder, head, answers.names)
    record = stage.finish(metrics, saved=True, data=about, model=model, samples=samples)
    describe_checkpoint(bench, stage.folder, model, record)
    return record


def _lack_of_room(bench: Bench, stage: Stage, model: PreTrainedModel, learning: Sequence[torch.nn.Parameter]) -> str:
    """What to say where the disk may be too small for the checkpoint beside the state; empty where it is not."""
    parameters, learns = (sum(each.numel() for each in some) for some in (list(model.parameters()), learning))
    needed = ADAM_BYTES * learns + max(ADAM_BYTES * learns, 4 * parameters)
    free = Room.of(bench.device, stage.folder or bench.runs).disk_bytes
    if free >= needed:
        return ""
    return (
        f"the disk has {free / 1e9:.2f} GB free, and state and checkpoint may take {needed / 1e9:.2f} GB: make room, "
        "or the run will stop when it saves, and go on from its last state"
    )


def _ready(model: PreTrainedModel, rows: Rows, settings: TrainSettings, ref: ModelRef) -> torch.nn.Module | None:
    """Puts a head for classes into a model where these are asked for; returns the one that it had."""
    if not isinstance(rows, LabelledRows):
        return None
    folder = ref.open().folder
    if not settings.steps:
        check_head(folder, rows.names, ref.name)
    return put_head(model, rows.names, settings.seed, folder)


def try_training(bench: Bench, ref: ModelRef, settings: TrainSettings, lessons: Lessons = NO_LESSONS) -> Budget:
    """What training a checkpoint would take here, from a few steps of it. Only the cache of tokenised data is written.

    Args:
        lessons: whose distillation is tried too, and whose curriculum, of which each step is another, is not.

    Raises:
        TrainingError: several processes; what training itself would refuse.
    """
    if bench.processes.count > 1:
        raise TrainingError("--dry-run measures on one process; start it without torchrun")
    data_of(settings)
    lessons = (lessons if settings.steps else NO_LESSONS).of(ref)
    lessons.check(settings)
    bench.watch("loading the model", 0, 1)
    model, tokenizer = load_model(ref.open(), torch.float32, bench.device)
    if settings.steps:  # refused before the data is packed
        parameters_in(model, settings.scope, settings.tail_from, settings.lora)

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    rows, kept = rows_of(settings, tokenizer, packing, bench.shared)
    _ready(model, rows, settings, ref)
    base = load_weights(lessons.base.open(), torch.float32, bench.device) if lessons.base else None
    return try_run(
        model, rows, kept, settings, ways_of(bench, settings), bench.watch, _teaching(lessons.distillation, base)
    )


def _teaching(
    settings: DistillationSettings, base: PreTrainedModel | None
) -> Callable[[PreTrainedModel], Teacher] | None:
    """What makes the teacher of a model, where it is to have one."""
    return functools.partial(Teacher, base=base, settings=settings) if settings.active else None


def ways_of(bench: Bench, settings: TrainSettings) -> dict[str, Any]:
    """How training is done here; it changes time, memory and rounding."""
    on_gpu = bench.device.type == "cuda"
    return {
        "autocast": bench.autocast,
        "batch_rows": bench.batch_size or (32 if on_gpu else 4),
        "fast": on_gpu and settings.tokens >= FAST_TOKENS and not bench.sharded,
        "cache": cache_folder() if bench.prefix_cache else None,
    }


def _logging(bench: Bench, stage: Stage) -> AbstractContextManager[Log]:
    """The trackers that were asked for, on the process that writes."""
    if not bench.trackers or not bench.processes.first:
        return nullcontext(nowhere)
    name = f"{bench.suite}-{stage.arm}-s{bench.seed}-{stage.key[:8]}"
    return tracking(bench.trackers, name, bench.runs / "tracking", stage.settings, on_cpu=bench.device.type == "cpu")


def _state_of(stage: Stage) -> Path:
    """The folder of what a stopped training has saved."""
    return stage.bench.runs / "unfinished" / stage.key
