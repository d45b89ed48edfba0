"""The one core that every command goes through: settings in, stage called, record out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.bbh.evaluate import EvalSettings, ask, score, score_as_lm_eval
from kallm_bench.bbh.prompts import build_prompts, fingerprint
from kallm_bench.bbh.protocols import Protocol, find_protocol
from kallm_bench.bbh.questions import QuestionSet, load_questions
from kallm_bench.bbh.tasks import TASKS
from kallm_bench.budget import Budget, Wanted, foresee, try_run
from kallm_bench.errors import BBHError, CheckpointError, DataError, KallmError, ModelError, TrainingError
from kallm_bench.files import cache_folder, check_writable, sha256, write_file
from kallm_bench.filing import Bench, ModelRef, Stage, find_ref, parameter_count, ref_after
from kallm_bench.models import (
    Calibration,
    CalibrationSettings,
    CutSettings,
    KANSpec,
    Original,
    blocks_to_revert,
    complete_spec,
    cut,
    cut_config,
    is_tight,
    load_config,
    load_model,
    load_tokenizer,
    open_original,
    parameters_of,
    read_lineage,
    replaced_modules,
    retrofit_reporting,
    save_checkpoint,
    skeleton_of,
    specs_of,
    stored_dtype,
    weights_folder,
    write_card,
)
from kallm_bench.models import revert as put_back
from kallm_bench.profiling import (
    KernelProblem,
    ProfileSettings,
    describe_run,
    flops_per_token,
    heldout_curve,
    measure_inference,
    measure_kernels,
    measure_training,
    peak_memory,
)
from kallm_bench.progress import Log, nowhere
from kallm_bench.records import Metric, ResultsStore, RunRecord
from kallm_bench.reporting import Table, build_tables, facts_of, to_csv, to_markdown
from kallm_bench.suites import Cell, Suite
from kallm_bench.training import (
    CLASSIFIER,
    SCOPES,
    CurriculumSettings,
    DataSource,
    DataTable,
    DistillationSettings,
    Fit,
    Forward,
    LabelledRows,
    Rows,
    Teacher,
    TrainSettings,
    answer,
    apply_scope,
    check_head,
    check_scope,
    find_data,
    find_texts,
    gather_into,
    heldout_loss,
    make_curriculum,
    merge,
    parameters_in,
    prepare,
    prepare_texts,
    put_head,
    tokenizer_fingerprint,
    tracking,
    train,
    used_tokens,
    write_head,
)

CUT_VERSION = 1
"""Raised when a change of code changes what is left of a model that is cut."""

START_VERSION = 3
"""Raised when a change of code changes what a calibrated start finds. 2: distilling begins at the right
variance. 3: under autocast a layer's input is cast before its expansion."""

FAST_TOKENS = 2_000_000
"""From so many on, the quarter of a minute that compiling blocks takes on a GPU is won back."""


def cut_model(
    bench: Bench,
    ref: ModelRef,
    settings: CutSettings,
    out: Path | None = None,
    *,
    replace: bool = False,
    weights_needed: bool = True,
) -> RunRecord:
    """Makes a smaller model: the first blocks, and the tokens that some texts need. Saves it as a checkpoint.

    Args:
        out: its folder; None names one below `bench.runs`.
        replace: whether another checkpoint that stands there may go.
        weights_needed: whether a record without its weights will not do.
    """
    if not settings.cuts:
        raise ModelError("nothing to cut: pass --blocks, or --data with the texts whose tokens shall stay, or both")
    texts = find_texts(settings.data) if settings.data else None
    tokenizer = load_tokenizer(ref.open())
    cut_config(load_config(ref.open()), settings.blocks)
    described = {"blocks": settings.blocks, "data": texts and texts.fingerprint, "version": CUT_VERSION}
    stage = Stage(bench, "cut", described | {"tokenizer": tokenizer_fingerprint(tokenizer)}, ref)
    stage.folder = out or bench.runs / f"{ref.label}-cut-{stage.key[:8]}"
    with stage.claimed(weights_needed) as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        bench.watch("cut", 0, 3, "reading texts")
        used = used_tokens(texts, tokenizer) if texts else None
        bench.watch("cut", 1, 3, "loading the model")
        model, _ = load_model(ref.open(), stored_dtype(ref.open()))
        model, tokenizer = cut(model, tokenizer, settings.blocks, used)
        bench.watch("cut", 2, 3, "saving")
        save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), replace=replace)
        bench.watch("cut", 3, 3)
        about = {"source": texts.label, "fingerprint": texts.fingerprint} if texts else {}
        return stage.finish([Metric("parameters", parameter_count(model))], saved=True, model=model, data=about)


def retrofit(
    bench: Bench,
    ref: ModelRef,
    spec: KANSpec,
    out: Path | None = None,
    *,
    calibration: CalibrationSettings | None = None,
    replace: bool = False,
    weights_needed: bool = True,
) -> RunRecord:
    """Replaces feed-forwards and saves the checkpoint, in the dtype of the original's weights.

    Where the original's files hold its tensors by name, only what is new is written, and nothing is loaded but what the
    new modules begin from; a start that looks at text loads the other blocks one at a time, as each has its turn.

    Args:
        calibration: the text that a start is calibrated on; None for the defaults, where the start needs any.
        out: its folder; None names one after model, basis, blocks and key below `bench.runs`.
        replace: whether another checkpoint that stands there may go.
        weights_needed: whether a record without its weights will not do.
    """
    bench.watch("loading the model", 0, 1)
    spec = complete_spec(load_config(ref.open()), spec)
    if calibration is None and spec.needs_calibration:
        calibration = CalibrationSettings()
    described: dict[str, Any] = {"spec": spec.to_json()}
    if (dtype := stored_dtype(ref.open())) != torch.float32:
        described["weights_dtype"] = str(dtype).removeprefix("torch.")
    if calibration:
        described |= {"calibration": _describe_calibration(calibration, load_tokenizer(ref.open())), **bench.place}
    stage = Stage(bench, "retrofit", described, ref)
    stage.folder = out or bench.runs / _checkpoint_name(ref.label, spec, stage.key)
    with stage.claimed(weights_needed) as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        bench.watch("retrofit", 0, 3, "loading")
        source, tokenizer = ref.open(), None
        computes_in, place = (torch.float32, bench.device) if calibration else (dtype, torch.device("cpu"))
        original = open_original(source, spec, computes_in, place)
        streaming: AbstractContextManager[None] = nullcontext()
        whole = (
            original and calibration and not (original.streams and is_tight(place, 4 * parameter_count(original.model)))
        )
        if original is None or whole:
            model, tokenizer = load_model(source, computes_in, place)
            original = Original(weights_folder(source), model)
        elif calibration:
            tokenizer, streaming = load_tokenizer(source), original.streamed(place)
        model = original.model
        bench.watch("retrofit", 1, 3, f"{len(spec.blocks)} blocks, start '{spec.start}'")
        with streaming:
            found, about = _start(bench, model, tokenizer, spec, calibration)
        bench.watch("retrofit", 2, 3, "saving")
        if original.fits:
            original.save_changed(stage.folder, lineage=stage.lineage(), base=stage.base, replace=replace)
        else:
            model = model.to("cpu", dtype)
            save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), base=stage.base, replace=replace)
        bench.watch("retrofit", 3, 3)
        record = stage.finish([*_size_metrics(model), *found], saved=True, model=model, data=about)
    _describe(bench, stage.folder, model, record)
    return record


def revert(
    bench: Bench, ref: ModelRef, blocks: str = "all", base: ModelRef | None = None, out: Path | None = None, *,
    replace: bool = False,
) -> RunRecord:  # fmt: skip
    """Puts a checkpoint's own modules back, and saves that.

    Args:
        blocks: which; "all" for every one that was replaced.
        base: the model that the modules come back from; None for the one that the checkpoint was made of.

    Raises:
        SpecError: see models.revert.
        ModelError: the model that it was made of is not known or not here; CheckpointError: it is another by now.
    """
    chosen = blocks_to_revert(load_config(ref.open()), blocks)
    base = base or _base_of(ref)
    stage = Stage(bench, "retrofit", {"revert": list(chosen), "base": base.fingerprint}, ref)
    stage.folder = out or bench.runs / f"{ref.label}-reverted-{stage.key[:8]}"
    with stage.claimed() as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        dtype = stored_dtype(ref.open())
        bench.watch("revert", 0, 3, "loading")
        model, tokenizer = load_model(ref.open(), dtype)
        put_back(model, load_model(base.open(), dtype)[0], chosen)
        bench.watch("revert", 2, 3, "saving")
        save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), base=stage.base, replace=replace)
        bench.watch("revert", 3, 3)
        record = stage.finish(_size_metrics(model), saved=True, model=model)
    _describe(bench, stage.folder, model, record)
    return record


def _base_of(ref: ModelRef) -> ModelRef:
    """The model that a checkpoint was made of."""
    if not ref.lineage or "source" not in ref.base:
        raise ModelError(f"{ref.name} does not say what it was made of; pass --base")
    source = ref.base["source"]
    try:
        base = find_ref(source)
    except ModelError as error:
        raise ModelError(f"{ref.name} was made of '{source}', which is not here; pass --base") from error
    if base.fingerprint != ref.base.get("fingerprint"):
        raise CheckpointError(f"'{source}' is not what {ref.name} was made of any more; pass --base")
    return base


def _describe(bench: Bench, folder: Path | None, model: PreTrainedModel, record: RunRecord) -> None:
    """Writes what is known of a checkpoint into its card, where it is one of ours."""
    if folder is None or not (lineage := read_lineage(folder)):
        return
    led = {entry["id"] for entry in lineage}
    known = [
        each
        for each in bench.store.records(testbed=bench.testbed)
        if each.id in led or (each.stage == "eval-bbh" and each.model.get("fingerprint") == record.model["fingerprint"])
    ]
    write_card(folder, model, facts_of(known))


def _start(
    bench: Bench, model: PreTrainedModel, tokenizer: Any, spec: KANSpec, settings: CalibrationSettings | None
) -> tuple[list[Metric], dict[str, Any]]:
    """Retrofits `model`; returns what is known of how it starts, and about the text that took."""
    if settings is None:
        _, report = retrofit_reporting(model, spec, watch=bench.watch, device="cpu")
        error = report.conversion_error
        return [] if error is None else [Metric("conversion_error", error)], {}

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    learned, kept = prepare(
        settings.data, tokenizer, settings.row_length, cache_folder(), settings.heldout, progress=packing
    )
    rows = settings.tokens // settings.row_length
    judged = min(settings.heldout_tokens // settings.row_length, len(kept))
    if rows > len(learned):
        most = len(learned) * settings.row_length
        raise DataError(
            f"{settings.data} has {most:,} tokens to calibrate on, not {settings.tokens:,}; take at most those"
        )
    batches = learned.batch(range(rows)), kept.batch(range(judged))
    tokens, positions = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "position_ids"))
    with Forward(model, autocast=bench.autocast) as forward:
        before, count = heldout_loss(forward, kept, judged, Fit(4), bench.watch)
    began = time.perf_counter()
    _, report = retrofit_reporting(model, spec, Calibration(tokens, positions, judged), bench.watch, bench.device)
    seconds = time.perf_counter() - began
    with Forward(model, autocast=bench.autocast) as forward:
        after, _ = heldout_loss(forward, kept, judged, Fit(4), bench.watch)
    metrics = [
        Metric("heldout_loss_before", before, n=count),
        Metric("heldout_loss", after, n=count),
        Metric("start_seconds", seconds),
        *(Metric(f"start_r2/{block}", r2, n=judged * settings.row_length) for block, r2 in report.r2.items()),
    ]
    data = find_data(settings.data)
    return metrics, {"source": data.label, "fingerprint": data.fingerprint}


def _describe_calibration(settings: CalibrationSettings, tokenizer: Any) -> dict[str, Any]:
    data, heldout = _data_of(settings)
    described = dataclasses.asdict(settings) | {"tokenizer": tokenizer_fingerprint(tokenizer), "version": START_VERSION}
    return described | {"data": data.fingerprint, "heldout": heldout and heldout.fingerprint}


@dataclass(frozen=True)
class Lessons:
    """What there is to a training run beside its settings.

    Args:
        curriculum, distillation: how a model comes to its replacements, and how much it learns from the untouched one.
        base: the untouched model, where it is not the one that the checkpoint says it was made of.
    """

    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    base: ModelRef | None = None

    def of(self, ref: ModelRef) -> Lessons:
        """The same for a checkpoint: with the untouched model if that takes part, else without. Raises as _base_of."""
        if not (self.curriculum.needs_base or self.distillation.active):
            return dataclasses.replace(self, base=None)
        made = ref.lineage or specs_of(load_config(ref.open()))
        return dataclasses.replace(self, base=self.base or (_base_of(ref) if made else ref))

    def check(self, settings: TrainSettings) -> None:
        """Asks whether it goes with these settings. TrainingError if not."""
        if settings.task == "classify" and self.distillation.active:
            raise TrainingError("task 'classify' has nothing to distill: the untouched model knows no classes")
        if settings.scope == "lora" and self.curriculum.active:
            raise TrainingError("a curriculum changes what adapters would be added to; take another scope than 'lora'")

    def described(self) -> dict[str, Any]:
        """The part of a stage's settings; where there are none, nothing, so that keys are what they were."""
        told: dict[str, Any] = {"base": self.base.fingerprint} if self.base else {}
        if self.curriculum.active:
            told["curriculum"] = dataclasses.asdict(self.curriculum)
        if self.distillation.active:
            told["distillation"] = dataclasses.asdict(self.distillation)
        return told


NONE = Lessons()


def train_model(
    bench: Bench,
    ref: ModelRef,
    settings: TrainSettings,
    out: Path | None = None,
    *,
    lessons: Lessons = NONE,
    replace: bool = False,
    resume: bool = True,
) -> RunRecord:
    """Trains a checkpoint, from where it was stopped, and saves it; zero tokens only measure the held-out loss.

    Several processes do it together, `bench.processes`: the first one writes, and all return its record.

    Args:
        resume: whether what a stopped run has saved is taken up; else it is removed.
    """
    processes = bench.processes
    with processes.in_turn():
        data, heldout = _data_of(settings)
    bench.watch("loading the model", 0, 1)
    tokenizer = load_tokenizer(ref.open())
    described = settings.described() | bench.place | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    described |= {"data": data.fingerprint, "heldout": heldout and heldout.fingerprint}
    lessons = (lessons if settings.steps else NONE).of(ref)
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
    with stage.claimed() if processes.first else nullcontext() as done:
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
        return load_model(which.open(), torch.float32, device)[0]

    model = load("cpu" if bench.sharded else bench.device)
    base = load(model.device, lessons.base) if lessons.base else None
    curriculum = make_curriculum(model, lessons.curriculum, settings, base)
    teaching = (
        functools.partial(Teacher, base=base, settings=lessons.distillation) if lessons.distillation.active else None
    )
    del base  # a curriculum keeps of it what stood where something was put
    with processes.in_turn():
        if settings.steps:  # refused before the data is packed
            parameters_in(model, settings.scope, settings.tail_from, settings.lora)
        rows, kept = _rows(settings, tokenizer, packing)
    own_head = _ready(model, rows, settings, ref)
    with _logging(bench, stage) as log, peak_memory(bench.device) as peak:
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
            **_ways(bench, settings),
        )
    del teaching
    figures = []
    if settings.steps:
        figures = [*describe_run(model, rows, settings, result, bench.dtype, processes), *peak]
    answers = None
    if isinstance(kept, LabelledRows):
        ways = _ways(bench, settings)
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
    _describe(bench, stage.folder, model, record)
    return record


def _rows(settings: TrainSettings, tokenizer: Any, packing: Callable[[int, int], None]) -> tuple[Rows, Rows]:
    """What is trained on, and what is held out."""
    if settings.task == "classify":
        rows, kept = prepare_texts(settings.data, tokenizer, settings.row_length, settings.heldout)
        return rows.enough_for(settings.steps * settings.rows_per_step), kept
    return prepare(settings.data, tokenizer, settings.row_length, cache_folder(), settings.heldout, progress=packing)


def _ready(model: PreTrainedModel, rows: Rows, settings: TrainSettings, ref: ModelRef) -> torch.nn.Module | None:
    """Puts a head for classes into a model where these are asked for; returns the one that it had."""
    if not isinstance(rows, LabelledRows):
        return None
    folder = ref.open().folder
    if not settings.steps:
        check_head(folder, rows.names, ref.name)
    return put_head(model, rows.names, settings.seed, folder)


def try_training(bench: Bench, ref: ModelRef, settings: TrainSettings) -> Budget:
    """What training a checkpoint would take here, from a few steps of it. Only the cache of tokenised data is written.

    Raises:
        TrainingError: several processes; what training itself would refuse.
    """
    if bench.processes.count > 1:
        raise TrainingError("--dry-run measures on one process; start it without torchrun")
    _data_of(settings)
    bench.watch("loading the model", 0, 1)
    model, tokenizer = load_model(ref.open(), torch.float32, bench.device)
    if settings.steps:  # refused before the data is packed
        parameters_in(model, settings.scope, settings.tail_from, settings.lora)

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    rows, kept = _rows(settings, tokenizer, packing)
    _ready(model, rows, settings, ref)
    return try_run(model, rows, kept, settings, _ways(bench, settings) | {"cache": None}, bench.watch)


def _ways(bench: Bench, settings: TrainSettings) -> dict[str, Any]:
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


def _answerable(name: str) -> Protocol:
    """The protocol of this name. BBHError for one whose questions cannot be asked yet, or that there is none of."""
    protocol = find_protocol(name)
    if protocol.compared:
        raise BBHError(f"protocol '{name}' compares likelihoods, which is not here yet; take zeroshot")
    return protocol


def eval_bbh(bench: Bench, ref: ModelRef, settings: EvalSettings) -> RunRecord:
    """Asks the model BIG-Bench Hard, or questions like it, and scores its answers."""
    protocol = _answerable(settings.protocol)
    reading = protocol.find_reading(settings.reading)
    questions = _questions(settings, protocol, reading)
    max_new_tokens = settings.max_new_tokens or protocol.max_new_tokens
    tokenizer = load_tokenizer(ref.open())
    described = {
        "protocol": protocol.name,
        "tasks": list(questions.tasks),
        "limit": settings.limit,
        "max_new_tokens": max_new_tokens,
        "questions": questions.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **bench.place,
    }
    if protocol.group:
        asked = build_prompts(questions, protocol, tokenizer, reading, max_new_tokens)
        described |= {"reading": reading, "prompts": fingerprint(asked)}
    stage = Stage(bench, "eval-bbh", described, ref)
    with stage.claimed() as done:
        if done:
            return done
        model, _ = load_model(ref.open(), bench.dtype, bench.device)
        partial = bench.runs / "unfinished" / f"{stage.key}.jsonl"
        size = bench.batch_size or (256 if bench.device.type == "cuda" else 16)
        samples = ask(model, tokenizer, questions, protocol, max_new_tokens, partial, size, bench.watch, reading)
        metrics = score(samples, questions, lambda question: protocol.guessable(question, reading))
        if protocol.group:
            metrics += score_as_lm_eval(samples, bool(protocol.compared))
        about = {"source": questions.source, "fingerprint": questions.fingerprint}
        record = stage.finish(metrics, data=about, model=model, samples=samples)
        _describe(bench, ref.open().folder, model, record)
        partial.unlink(missing_ok=True)
        return record


def _questions(settings: EvalSettings, protocol: Protocol, reading: str) -> QuestionSet:
    """Those that are asked for and that the protocol can put; BBHError where none is left."""
    found = load_questions(settings.source, settings.tasks, settings.limit, settings.questions_seed, protocol.tasks)
    kept = tuple(question for question in found.questions if protocol.can_answer(question, reading))
    if not kept:
        raise BBHError(f"no question of {', '.join(found.tasks)} has a right answer among the choices compared")
    return dataclasses.replace(found, questions=kept)


def write_prompts(
    ref: Callable[[], ModelRef], settings: EvalSettings, protocols: Sequence[str], out: Path
) -> dict[str, int]:
    """Writes what a model would be asked, one JSON line a question; asks nothing.

    Args:
        ref: finds the model whose chat template is taken; not called where every protocol asks in plain text.
        settings: which questions, and the reading; its own protocol is not looked at.
        protocols: names; one after the other.

    Returns:
        How many questions of each protocol.

    Raises:
        BBHError: as eval_bbh.
    """
    lines, counts = [], {}
    for protocol in map(find_protocol, protocols):
        reading = protocol.find_reading(settings.reading)
        questions = _questions(settings, protocol, reading)
        tokenizer = load_tokenizer(ref().open()) if protocol.chat else None
        prompts = build_prompts(questions, protocol, tokenizer, reading, settings.max_new_tokens)
        lines += [json.dumps(prompt.to_json(protocol.name), ensure_ascii=False) + "\n" for prompt in prompts]
        counts[protocol.name] = len(prompts)
    write_file(out, "".join(lines).encode())
    return counts


def profile(bench: Bench, ref: ModelRef, settings: ProfileSettings, *, again: bool = False) -> RunRecord:
    """Measures what the model costs here. `again` measures anew where a record exists."""
    stage = Stage(bench, "profile", dataclasses.asdict(settings) | bench.place, ref)
    with stage.claimed(again=again) as done:
        if done:
            return done
        source = ref.open()
        start = time.perf_counter()
        model, _ = load_model(source, bench.dtype, bench.device)
        loaded = time.perf_counter() - start
        metrics = [
            *_size_metrics(model),
            Metric("flops_per_token", flops_per_token(model)),
            Metric("load_seconds", loaded),
        ]
        tail_from = settings.tail_from
        for scope in SCOPES if replaced_modules(model) or tail_from is not None else ["all"]:
            if scope != "replaced" or replaced_modules(model):
                count = sum(parameter.numel() for parameter in parameters_in(model, scope, tail_from))
                metrics.append(Metric(f"trainable_parameters/{scope}", count))
        metrics += measure_inference(model, settings, bench.watch)
        if settings.scope != "none":
            if bench.autocast:
                model, _ = load_model(source, torch.float32, bench.device)
            metrics += measure_training(model, settings, bench.autocast, bench.watch)
        return stage.finish(metrics, model=model)


def profile_kernels(bench: Bench, problem: KernelProblem, *, again: bool = False) -> RunRecord:
    """Measures a layer by itself beside its contenders. `again` measures anew where a record exists."""
    bench = dataclasses.replace(bench, arm=problem.arm)
    stage = Stage(bench, "kernels", problem.settings() | bench.place)
    with stage.claimed(again=again) as done:
        return done or stage.finish(measure_kernels(problem, bench.device, bench.dtype, bench.watch))


def run_cell(bench: Bench, cell: Cell, begin: Callable[[str], None] = lambda part: None) -> list[RunRecord]:
    """Runs what of a cell is not done yet: retrofit, training, questions, profile; returns the record of each.

    The weights between retrofit and training may be gone once training is done; trained weights that are gone are
    trained again.
    """
    bench = dataclasses.replace(bench, arm=cell.arm, seed=cell.seed)
    ref = find_ref(cell.model)
    records = []
    begin(_part(cell, "retrofit"))
    if cell.cut.cuts:
        ref = _cut_ref(bench, ref, cell.cut)
    start = ref
    if (wanted := _spec_of(cell, ref)) is not None:
        spec, text = wanted, _calibration_of(cell)
        records.append(retrofit(bench, start, spec, calibration=text, weights_needed=False))
        ref = ref_after(records[-1], start, remake=lambda: retrofit(bench, start, spec, calibration=text))
    if "train" in cell.stages:
        begin(_part(cell, "train"))
        records.append(train_model(bench, ref, cell.train, lessons=_lessons_of(cell, start)))
        ref = ref_after(records[-1], ref)
    if "eval-bbh" in cell.stages:
        begin(_part(cell, "eval-bbh"))
        records.append(eval_bbh(bench, ref, cell.eval))
    if "profile" in cell.stages:
        begin(_part(cell, "profile"))
        records.append(profile(bench, ref, cell.profile))
    return records


def _cut_ref(bench: Bench, ref: ModelRef, settings: CutSettings) -> ModelRef:
    """What a suite's arms start from where it cuts the model first; one record for all of them."""
    bench = dataclasses.replace(bench, arm="", seed=0)
    record = cut_model(bench, ref, settings, weights_needed=False)
    made = ref_after(record, ref, remake=lambda: cut_model(bench, ref, settings))
    return dataclasses.replace(made, base={})  # replaced modules come back from here, not from the whole model


def _spec_of(cell: Cell, ref: ModelRef, config: PreTrainedConfig | None = None) -> KANSpec | None:
    """A cell's spec; with as many parameters as another arm's modules where it says so.

    Args:
        config: of the model, where that is not what `ref` opens.
    """
    if cell.spec is None or cell.match is None:
        return cell.spec
    config = config or load_config(ref.open())
    return dataclasses.replace(cell.spec, params=parameters_of(config, complete_spec(config, cell.match)))


def _lessons_of(cell: Cell, ref: ModelRef) -> Lessons:
    """Of a cell whose model is `ref`."""
    return Lessons(cell.curriculum, cell.distillation, ref if cell.cut.cuts else None).of(ref)


def _config_of(cell: Cell, ref: ModelRef) -> PreTrainedConfig:
    """Of the model that a cell replaces parts of, which `ref` opens before it is cut."""
    config = load_config(ref.open())
    return cut_config(config, cell.cut.blocks) if cell.cut.cuts else config


def _calibration_of(cell: Cell) -> CalibrationSettings | None:
    return cell.calibration if cell.spec and cell.spec.needs_calibration else None


def check_cell(cell: Cell) -> None:
    """Asks of every stage of a cell whether it can be, before the first one runs. Raises what that stage would."""
    ref = find_ref(cell.model)
    config = _config_of(cell, ref)
    if cell.cut.data:
        find_texts(cell.cut.data)
    if spec := _spec_of(cell, ref, config):
        spec = complete_spec(config, spec)
    if text := _calibration_of(cell):
        _data_of(text)
    replaced = bool(cell.spec or specs_of(config))
    if cell.train.steps and "train" in cell.stages:
        check_scope(cell.train.scope, replaced=replaced, tail_from=cell.train.tail_from)
        lessons = _lessons_of(cell, ref)
        lessons.check(cell.train)
        _check_lessons(cell, lessons, config, spec)
    if cell.profile.scope != "none" and "profile" in cell.stages:
        check_scope(cell.profile.scope, replaced=replaced, tail_from=cell.profile.tail_from)
    tokenizer_fingerprint(load_tokenizer(ref.open()))
    if "train" in cell.stages:
        _data_of(cell.train)
    if "eval-bbh" in cell.stages:
        _answerable(cell.eval.protocol)
        load_questions(cell.eval.source, cell.eval.tasks, cell.eval.limit, cell.eval.questions_seed)


def _check_lessons(cell: Cell, lessons: Lessons, config: PreTrainedConfig, spec: KANSpec | None) -> None:
    """Asks a model without values whether it can have a cell's curriculum."""
    if not lessons.curriculum.active:
        return
    config = copy.deepcopy(config)
    if spec:
        config.kallm = [*(getattr(config, "kallm", None) or []), spec.to_json()]
    base = skeleton_of(_config_of(cell, lessons.base)) if lessons.base else None
    make_curriculum(skeleton_of(config), lessons.curriculum, cell.train, base)


class Ran(NamedTuple):
    """What a suite's run came to: the records of the cells that ended well, and "arm, seed 0" -> why of the others."""

    records: list[RunRecord]
    failures: dict[str, str]


def run_suite(bench: Bench, suite: Suite, begin: Callable[[str], None] = lambda part: None) -> Ran:
    """Runs every cell that is not done; one that fails does not stop the others.

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
        try:
            ran.records.extend(run_cell(bench, cell, begin))
        except KallmError as error:
            ran.failures[f"{cell.arm}, seed {cell.seed}"] = str(error)
    for problem in suite.kernels:
        begin(problem.arm)
        try:
            ran.records.append(profile_kernels(bench, problem))
        except KallmError as error:
            ran.failures[problem.arm] = str(error)
    return ran


def plan_of(suite: Suite) -> dict[str, float]:
    """How much work each stage of each cell is, in tokens forwarded; enough to tell how long the rest will take."""
    plan = {}
    for cell in suite.cells:
        heldout = cell.train.heldout_rows * cell.train.row_length * (2 if cell.train.steps else 1)
        questions = (cell.eval.limit or 250) * len(cell.eval.tasks or TASKS)
        shape = cell.profile.batch * cell.profile.length * (cell.profile.repeats + 1)
        work = {"retrofit": 1000, "train": 3 * cell.train.tokens + heldout, "eval-bbh": 600 * questions}
        work["profile"] = 10 * shape
        if cell.spec and cell.spec.needs_calibration:
            steps = cell.spec.start_steps if {"distill", "sequence"} & set(cell.spec.start.split("+")) else 0
            work["retrofit"] = 2 * cell.calibration.tokens + 1000 * steps
        plan.update({_part(cell, stage): float(work[stage]) for stage in cell.stages})
    return plan | plan_of_kernels(suite.kernels)


def plan_of_kernels(problems: Sequence[KernelProblem]) -> dict[str, float]:
    """The same of problems for layers alone: compiling takes most of the time, and the same for each contender."""
    return {problem.arm: 10_000.0 * len(problem.contenders) for problem in problems}


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
        asked = (cell.eval.source or "BIG-Bench Hard") if "eval-bbh" in cell.stages else ""
        here = CellForecast(cell.arm, str(cell.seed), what, asked)
        if "train" in cell.stages:
            try:
                here = dataclasses.replace(here, budget=_foresee_cell(bench, suite.name, cell, records))
            except KallmError as error:
                here = dataclasses.replace(here, trouble=str(error))
        cells.append(here)
    return cells + [CellForecast(each.arm, "", f"{len(each.contenders)} contenders") for each in suite.kernels]


def _foresee_cell(bench: Bench, suite: str, cell: Cell, records: Sequence[RunRecord]) -> Budget:
    ref = find_ref(cell.model)
    config = _config_of(cell, ref)
    wanted = Wanted(
        suite, cell.arm, config, _spec_of(cell, ref, config), cell.train, bench.device, bench.dtype,
        _ways(bench, cell.train)["batch_rows"],
    )  # fmt: skip
    return foresee(wanted, records)


class Report(NamedTuple):
    """A suite's tables, and the folder that holds them as report.md and report.csv."""

    tables: list[Table]
    folder: Path


def write_report(store: ResultsStore, suite: Suite, testbed: str, records: Sequence[RunRecord]) -> Report:
    """Writes a suite's tables beside its records.

    Args:
        records: what the cells that were just run stand for; the others' come from the store, by the suite's arms.
    """
    ran = {(record.arm, record.seed) for record in records}
    ids = {record.id for record in records}

    def stands(record: RunRecord) -> bool:
        return record.id in ids if (record.arm, record.seed) in ran else record.arm in suite.arms

    tables = build_tables(store, suite.name, testbed, stands)
    folder = store.folder / testbed / suite.name
    write_file(folder / "report.md", to_markdown(tables).encode())
    write_file(folder / "report.csv", to_csv(tables).encode())
    return Report(tables, folder)


def _data_of(
    settings: TrainSettings | CalibrationSettings,
) -> tuple[DataSource | DataTable, DataSource | DataTable | None]:
    """The training data, and the held-out data where that has a source of its own. DataError where they are one."""
    find = find_texts if isinstance(settings, TrainSettings) and settings.task == "classify" else find_data
    data, heldout = find(settings.data), find(settings.heldout) if settings.heldout else None
    if heldout and heldout.fingerprint == data.fingerprint:
        raise DataError(f"{settings.heldout}: the held-out data is the training data; leave it out to hold a part back")
    return data, heldout


def _part(cell: Cell, stage: str) -> str:
    return f"{cell.arm} seed {cell.seed} {stage}"


def _size_metrics(model: PreTrainedModel) -> list[Metric]:
    replaced = sum(parameter_count(module) for module in replaced_modules(model).values())
    return [Metric("parameters", parameter_count(model)), Metric("replaced_parameters", replaced)]


def _checkpoint_name(model: str, spec: KANSpec, key: str) -> str:
    blocks = sorted(map(int, spec.blocks))
    run = f"{blocks[0]}-{blocks[-1]}" if blocks == list(range(blocks[0], blocks[-1] + 1)) else f"{len(blocks)}blocks"
    basis = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in spec.basis)
    what = basis if spec.target == "feedforward" else f"{basis}-{spec.target}"
    return f"{model}-{what}-{run}-{key[:8]}"
