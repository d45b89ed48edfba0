"""What a training run would take, before it is run: time, memory, room on the disk.

Best is to try: a few steps of the very shapes, in memory, from which all steps follow, as they are alike. Where even
loading models is too much, as for all cells of a suite, what earlier runs on this machine needed is scaled: time by the
FLOP that a step cannot do without, memory by what weights, gradients and moments take and by the same FLOP; both then
by what a teacher and a curriculum add here, and added there. With no earlier run it is an estimate, and says so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.footprint import ADAM_BYTES, estimated_peaks, process_bytes, static_bytes
from kallm_bench.models import KANSpec, complete_spec, skeleton_of
from kallm_bench.profiling import flops_per_token, peak_memory
from kallm_bench.profiling.flops import frozen_flops, training_flops
from kallm_bench.profiling.products import product_rate
from kallm_bench.progress import Watch
from kallm_bench.records import RunRecord
from kallm_bench.teaching import Taught, costs_of
from kallm_bench.training import CurriculumSettings, Forward, Rows, Teacher, TrainSettings, apply_scope, train
from kallm_bench.training.entry import first_learning
from kallm_bench.training.loop import SAVE_EVERY_SECONDS, SAVE_SHARE, TrainResult, check_rows
from kallm_bench.training.prefix_cache import size_of

TRIAL_STEPS = 4
"""Steps that are tried, or 2 where they are long; the first warms up."""

LONG_STEP_SECONDS = 4.0
"""On a CPU a step is tried with as many of its rows as take so long, and two batches at least."""

TRIAL_HELDOUT_BATCHES = 3

DISK_BYTES_PER_SECOND = 300e6
"""What a plain disk writes; saving is a small part of training."""

USUAL_BEARING = 0.4
"""Share of the positions that bear loss, where nothing is known of the data."""

USUAL_EFFICIENCY = {"cuda": 0.35, "cpu": 0.8}
"""How much of what a large product does a second training does, where no run is known: small models on an H100, and on
two cores."""

USUAL_COMPILING_SECONDS = 15.0
"""What compiling and recording add, where no run is known."""

SIMILAR = 3.0
"""Models of more or fewer parameters by this factor say nothing of each other's time and memory."""

ESTIMATE = "an estimate"
"""The source of what no record tells of."""


@dataclass(frozen=True)
class Budget:
    """A training run that was not made.

    Args:
        steps, tokens, parameters, trainable_parameters: of it.
        seconds: see the metric train_seconds.
        peaks: metric -> bytes, as the run's record will have them; none where nothing is known.
        source: how this is known.
        cache_bytes: what the cache of a frozen prefix would take, if it were kept.
        rows_at_once: rows through the model at once.
    """

    steps: int
    tokens: int
    parameters: int
    trainable_parameters: int
    seconds: float
    peaks: dict[str, float]
    source: str
    cache_bytes: int = 0
    rows_at_once: int = 0

    @property
    def checkpoint_bytes(self) -> int:
        """The trained model in float32."""
        return 4 * self.parameters if self.steps else 0

    @property
    def state_bytes(self) -> int:
        """What a stopped run goes on from: values and moments of what learns."""
        return ADAM_BYTES * self.trainable_parameters if self.steps else 0

    @property
    def disk_bytes(self) -> int:
        """The most at one time: the checkpoint is written while a state stands, a state beside the last one."""
        return self.state_bytes + max(self.state_bytes, self.checkpoint_bytes)

    @property
    def peak_bytes(self) -> float | None:
        return max(self.peaks.values(), default=None)

    def to_json(self) -> dict[str, Any]:
        named = ("checkpoint_bytes", "state_bytes", "disk_bytes")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in named}


@dataclass(frozen=True)
class Room:
    """What there is: bytes of memory of the device that computes, and free bytes of the disk."""

    memory_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, device: torch.device, folder: Path) -> Room:
        """Of this device, and of the disk that holds `folder` or would."""
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(memory, shutil.disk_usage(there).free)


# --- by trying --------------------------------------------------------------------------------------------------------


class _Stamps:
    """A Watch that notes when batches of held-out rows were done."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None:
        now = time.perf_counter()
        if work == "held-out loss" and done > 1:
            self.seconds.append(now - self._last)
        self._last = now
        self.watch(f"trying {work}" if total else work, done, total)


def try_run(
    model: PreTrainedModel,
    rows: Rows,
    heldout: Rows,
    settings: TrainSettings,
    ways: dict[str, Any],
    watch: Watch,
    teaching: Callable[[PreTrainedModel], Teacher] | None = None,
) -> Budget:
    """What `train` would take with these arguments, from a few steps of it. Nothing is saved, and no weight moves.

    Changes the model's scope, as training does. A cache of a frozen prefix is read where it holds all that is needed,
    and left alone else.

    Args:
        ways: what `train` is given of how it is done: autocast, batch_rows ...

    Raises:
        TrainingError: as `train` would: too little data, no memory for one row.
    """
    check_rows(rows, settings)
    needed = {rows: settings.steps * settings.rows_per_step, heldout: settings.heldout_rows}
    ways = ways | {"cache": _whole_cache(model, needed, settings, ways)}
    batch = ways["batch_rows"]
    every = settings.rows_per_step
    on_gpu = model.device.type == "cuda"
    stamps = _Stamps(watch)

    def attempt(rows_per_step: int, steps: int, heldout_batches: int) -> TrainResult:
        still = dataclasses.replace(
            settings,
            tokens=steps * rows_per_step * settings.row_length,
            rows_per_step=rows_per_step,
            heldout_rows=min(settings.heldout_rows, heldout_batches * batch),
            heldout_every=0,
            learning_rate=1e-12,
            new_learning_rate=None,
        )
        return train(model, rows, heldout, still, None, watch=stamps, teaching=teaching, **ways)

    if ways.get("fast"):  # training will find what compiling leaves on the disk, so the trial should too
        attempt(every, 1, 1)
        torch.compiler.reset()
    tried = every if on_gpu else min(every, 2 * batch)
    steps = min(settings.steps, TRIAL_STEPS if on_gpu else 2)
    with peak_memory(model.device) as peak:
        first = result = attempt(tried, steps, TRIAL_HELDOUT_BATCHES)
        if tried < every and steps:
            at_most = int(LONG_STEP_SECONDS / _usual(first.step_seconds) * tried) // batch * batch
            if tried < (more := min(every, at_most)):
                steps = min(settings.steps, TRIAL_STEPS)
                tried, result = more, attempt(more, steps, 1)
    looked = math.ceil(min(settings.heldout_rows, TRIAL_HELDOUT_BATCHES * batch, len(heldout)) / batch)
    look = statistics.median(stamps.seconds) if stamps.seconds else (first.seconds - sum(first.step_seconds)) / 2
    alike = len(first.step_seconds) * _usual(first.step_seconds) + 2 * looked * look
    measured = _Speed(_usual(result.step_seconds) * every / tried, look, once=max(0.0, first.seconds - alike))
    batches = math.ceil(min(settings.heldout_rows, len(heldout)) / (result.rows_at_once or batch))
    return Budget(
        settings.steps,
        settings.steps * every * settings.row_length,
        sum(parameter.numel() for parameter in model.parameters()),
        result.trainable_parameters,
        _seconds(settings, measured, batches, ADAM_BYTES * result.trainable_parameters),
        {metric.name: metric.value for metric in peak if metric.value is not None},
        f"measured: {steps} steps of {tried} rows here" if steps else "measured here",
        _cache_bytes(model, needed, ways["autocast"]),
        result.rows_at_once,
    )


def _whole_cache(
    model: PreTrainedModel, needed: Mapping[Rows, int], settings: TrainSettings, ways: Mapping[str, Any]
) -> Path | None:
    """The folder in which a frozen prefix is to be kept, where an earlier run has kept all of it; else None."""
    folder: Path | None = ways.get("cache")
    if folder is None or not settings.steps:
        return None
    apply_scope(model, settings.scope, settings.tail_from, settings.lora, settings.seed)
    return folder if Forward(model, autocast=ways["autocast"]).kept_all(folder, needed) else None


class _Speed(NamedTuple):
    """Seconds of a step, of a batch of held-out rows, and of what comes once, such as compiling."""

    step: float
    batch: float
    once: float = 0.0


def _usual(step_seconds: Sequence[float]) -> float:
    """Of all but the first step, which warms up."""
    return statistics.median(step_seconds[1:] or step_seconds) if step_seconds else 0.0


def _seconds(settings: TrainSettings, speed: _Speed, heldout_batches: float, state_bytes: int) -> float:
    """Of all steps, of every held-out loss, and of saving."""
    steps, interval = settings.steps, settings.heldout_interval
    heldout = (2 if steps else 1) + ((steps - 1) // interval if interval and steps else 0)
    working = speed.once + steps * speed.step + heldout * heldout_batches * speed.batch
    saving = state_bytes / DISK_BYTES_PER_SECOND
    return working + saving + min(working // SAVE_EVERY_SECONDS * saving, SAVE_SHARE * working) if steps else working


def _cache_bytes(model: PreTrainedModel, several: Mapping[Rows, int], autocast: torch.dtype | None) -> int:
    """What Forward.keep would take; 0 where nothing is frozen."""
    if model.get_input_embeddings().weight.requires_grad or not first_learning(model):
        return 0
    width = model.config.get_text_config(decoder=True).hidden_size
    kept = torch.bfloat16 if autocast == torch.bfloat16 else torch.float32
    return sum(size_of(rows, min(count, len(rows)), width, kept) for rows, count in several.items())


# --- from records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A run that a budget is asked for: which arm of which suite, what is trained, on what, and in which ways.

    Args:
        fast, kept: whether blocks are compiled, and whether what frozen ones give is kept on disk.
        taught: by what beside data.
    """

    suite: str
    arm: str
    config: PreTrainedConfig
    spec: KANSpec | None
    settings: TrainSettings
    device: torch.device
    dtype: torch.dtype
    rows_at_once: int
    fast: bool = False
    kept: bool = False
    taught: Taught = field(default_factory=Taught)


def foresee(wanted: Wanted, records: Sequence[RunRecord]) -> Budget:
    """What a run would take by what is known of runs on this machine; no weights are read.

    Args:
        records: all of this testbed, oldest first.

    Raises:
        SpecError: the retrofit cannot be. TrainingError: the scope cannot be.
    """
    settings, config = wanted.settings, copy.deepcopy(wanted.config)
    if wanted.spec:
        config.kallm = [*(getattr(config, "kallm", None) or []), complete_spec(config, wanted.spec).to_json()]
    model = skeleton_of(config)
    learning = apply_scope(model, settings.scope, settings.tail_from, settings.lora) if settings.steps else []
    parameters, trainable = (sum(each.numel() for each in some) for some in (list(model.parameters()), learning))
    like = _nearest(wanted, parameters, records)
    bearing = (like and like.value("bearing_share")) or USUAL_BEARING
    flops = training_flops(model, bearing)
    at_once, all_at_once = (
        rows * settings.row_length for rows in (min(wanted.rows_at_once, settings.rows_per_step), wanted.rows_at_once)
    )
    done = flops - frozen_flops(model) * bool(like and wanted.kept and _kept(like))

    def taken(taught: Taught) -> tuple[float, dict[str, float]]:
        """How many times the FLOP of this run without lessons it takes with such ones, and its estimated peaks."""
        costs = costs_of(model, config, taught, settings, bearing)
        estimated = estimated_peaks(
            model, at_once, bearing * all_at_once, wanted.device, wanted.dtype, wanted.fast, costs.memory
        )
        return (done + costs.flops) / done, estimated

    more, peaks = taken(wanted.taught)
    if like:
        its_more, its_peaks = taken(Taught.of(like.settings))
        rate, source = its_more * _rate(like), f"by {like.arm} of {like.suite}"
        once = _once(like, rate)
        told = _peaks(static_bytes(parameters, trainable), flops, like, wanted)
        peaks = {name: value * peaks[name] / its_peaks[name] for name, value in told.items()}
    else:
        rate = USUAL_EFFICIENCY[wanted.device.type] * product_rate(wanted.device, wanted.dtype)
        once, source = USUAL_COMPILING_SECONDS * wanted.fast, ESTIMATE
    tokens = settings.rows_per_step * settings.row_length
    row = settings.row_length * flops_per_token(model) / rate
    speed = _Speed(tokens * more * flops / rate, row, once)
    return Budget(
        settings.steps,
        settings.steps * tokens,
        parameters,
        trainable,
        _seconds(settings, speed, settings.heldout_rows, ADAM_BYTES * trainable),
        peaks if settings.steps else {},
        source,
        rows_at_once=wanted.rows_at_once,
    )


def of_similar_size(record: RunRecord, parameters: float) -> bool:
    """Whether what a model of so many parameters takes can be told from what the record's took."""
    own: float | None = record.model.get("parameters")
    return not own or not parameters or 1 / SIMILAR < own / parameters < SIMILAR


def _nearest(wanted: Wanted, parameters: int, records: Sequence[RunRecord]) -> RunRecord | None:
    """The training record that tells most of a run: of the same arm, of the same shapes and ways; then the newest.

    What changes as training goes tells nothing of what does not, nor of what changes otherwise.
    """
    place = {"device": wanted.device.type, "dtype": str(wanted.dtype).removeprefix("torch.")}
    told = ("train_tokens_per_second", "train_flops_per_token")
    known = [
        record
        for record in records
        if record.stage == "train"
        and place.items() <= record.settings.items()
        and all(record.value(name) for name in told)
        and of_similar_size(record, parameters)
        and Taught.of(record.settings).curriculum in (CurriculumSettings(), wanted.taught.curriculum)
    ]

    def likeness(record: RunRecord) -> tuple[bool, bool, bool, bool, str]:
        shapes = ("row_length", "rows_per_step", "scope")
        return (
            (record.suite, record.arm) == (wanted.suite, wanted.arm),
            all(record.settings[name] == getattr(wanted.settings, name) for name in shapes),
            _kept(record) == wanted.kept,
            Taught.of(record.settings) == wanted.taught,
            record.started,
        )

    return max(known, key=likeness, default=None)


def _kept(record: RunRecord) -> bool:
    """Whether a run has read what frozen blocks give, rather than computed it."""
    return (record.value("prefix_cache_share") or 0.0) > 0.5


def _rate(like: RunRecord) -> float:
    """FLOP a second that a run did of those it could not do without."""
    return (like.value("train_flops_per_token") or 0.0) * (like.value("train_tokens_per_second") or 0.0)


def _once(like: RunRecord, rate: float) -> float:
    """Seconds that a run took beside its steps, its held-out losses and its saving: compiling, on a GPU.

    Args:
        rate: FLOP a second that it did.
    """
    names = {entry.name for entry in dataclasses.fields(TrainSettings)}
    settings = TrainSettings(**{name: value for name, value in like.settings.items() if name in names})
    tokens = settings.rows_per_step * settings.row_length
    row = settings.row_length * 2 * like.model["parameters"] / rate
    speed = _Speed(tokens / (like.value("train_tokens_per_second") or math.inf), row)
    state = ADAM_BYTES * (like.model["trainable_parameters"] or 0)
    return max(0.0, (like.value("train_seconds") or 0.0) - _seconds(settings, speed, settings.heldout_rows, state))


def _peaks(static: float, flops: float, like: RunRecord, wanted: Wanted) -> dict[str, float]:
    """A record's peaks with this run's weights, gradients and moments; libraries' as they are, the rest by FLOP."""
    own = static_bytes(like.model["parameters"], like.model["trainable_parameters"] or 0)
    more = wanted.settings.row_length / like.settings["row_length"] * flops / (like.value("train_flops_per_token") or 1)
    found = {metric.name: metric.value for metric in like.metrics if metric.name.startswith("peak_")}
    peaks = {}
    for name, value in found.items():
        if value is not None:
            rest = max(0.0, value - own)
            around = min(rest, process_bytes()) if wanted.device.type == "cpu" else 0.0
            peaks[name] = static + around + (rest - around) * more
    return peaks
