"""What the stages beside training would take, before they are run: retrofits, questions, profiles, layers alone.

Each stage has a formula for its time, of what its settings ask for and what the device does in a second. Where this
testbed has a record of the stage, that record's time is scaled by the formula, which is then right in what both have in
common; else the formula itself is the answer, and is called an estimate. Expect an estimate to be a factor of two off.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from kallm_bench.budget import ESTIMATE, USUAL_EFFICIENCY, of_similar_size
from kallm_bench.footprint import estimated_peaks, process_bytes, static_bytes
from kallm_bench.kan.bases import make_basis
from kallm_bench.models import KANSpec
from kallm_bench.models.calibration import KEEP
from kallm_bench.models.distill import TOKENS_A_STEP
from kallm_bench.profiling import KernelProblem, ProfileSettings
from kallm_bench.profiling.flops import cache_bytes
from kallm_bench.profiling.products import product_rate
from kallm_bench.profiling.room import parameter_bytes
from kallm_bench.records import RunRecord
from kallm_bench.training import apply_scope

BYTES_PER_SECOND = 10e9
"""What a CPU reads of weights, a step of decoding after the other; and what a warm file is loaded with."""

LEAST_SECONDS = {"cuda": 0.025, "cpu": 0.0}
"""A step of distilling or decoding takes no less where each of its many small operations has to be launched."""

TEXT_SECONDS = 6.0
"""Reading and packing calibration text."""

QUESTIONS_A_TASK = 241
"""6,511 questions in 27 tasks."""

PROMPT_TOKENS, COMPARED_TOKENS = 160, 110
"""Tokens a question, what prompts share counted once: of one that is answered in words, and where choices compare."""

QUESTION_COST = 3.0
"""How much more a token of an evaluation takes than one of a large batch."""

QUESTIONS_AT_ONCE = 64
"""Rows of a usual batch of them."""

COMPILING_SECONDS = 1.5
"""For each contender of a problem for layers alone, on a GPU."""


FAR = 30.0
"""A record of work that is smaller or larger by this factor tells less than an estimate."""

STEP_COMPILING_SECONDS = 8.0
"""For each way and scope that a training step is measured in, on a GPU."""


@dataclass(frozen=True)
class Effort:
    """What a stage would take.

    Args:
        seconds: of it.
        peak_bytes: of the memory of the device that computes; None where nothing is known.
        source: how this is known.
    """

    seconds: float
    peak_bytes: float | None
    source: str


class Work(NamedTuple):
    """What decides how long a stage takes.

    Args:
        settings: as its record holds them.
        parameters, replaced: values of the model, and of those what a retrofit put in.
        questions: how many are asked.
    """

    settings: Mapping[str, Any]
    parameters: float = 0.0
    replaced: float = 0.0
    questions: int = 0

    @classmethod
    def of(cls, record: RunRecord) -> Work:
        asked = next((metric.n for metric in record.metrics if metric.name == "accuracy"), 0)
        replaced = record.value("replaced_parameters") or 0.0
        return cls(record.settings, record.model.get("parameters") or 0.0, replaced, asked)


class Speed(NamedTuple):
    """A device's kind, and the FLOP a second that small models do on it."""

    kind: str
    flops: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Speed:
        return cls(device.type, USUAL_EFFICIENCY[device.type] * product_rate(device, dtype))


def foresee_stage(
    stage: str,
    suite: str,
    arm: str,
    work: Work,
    speed: Speed,
    records: Sequence[RunRecord],
    peak_bytes: float | None = None,
) -> Effort:
    """What a stage would take by the nearest record of this testbed, else by its formula.

    Args:
        stage: a key of FORMULAS.
        records: all of this testbed, oldest first.
        peak_bytes: an estimate of them, which counts where no record of the same shapes tells.
    """
    formula = FORMULAS[stage]
    like = _nearest(stage, suite, arm, work, records)
    estimated = formula(work, speed)
    if like is None or not 1 / FAR < estimated / formula(Work.of(like), speed) < FAR:
        return Effort(estimated, peak_bytes, ESTIMATE)
    known = Work.of(like)
    if _shared(stage, known.settings, work.settings) == len(DECISIVE[stage]):
        peaks = [metric.value for metric in like.metrics if metric.name.startswith("peak_") and metric.value]
        more = 4 * (work.parameters - known.parameters)
        peak_bytes = max(peaks) + more if peaks else peak_bytes
    seconds = like.seconds * estimated / formula(known, speed)
    return Effort(seconds, peak_bytes, f"by {like.arm} of {like.suite}")


DECISIVE = {
    "retrofit": ("start", "target"),
    "eval-bbh": ("protocol",),
    "profile": ("batch", "length", "repeats", "new_tokens", "ways", "scope"),
    "kernels": ("basis", "tokens", "in_features", "out_features", "contenders"),
}
"""Settings that say most of what a stage takes; the more of them a record shares, the nearer it is."""


def _nearest(stage: str, suite: str, arm: str, work: Work, records: Sequence[RunRecord]) -> RunRecord | None:
    """The record of the same stage on the same device that is most like it; of equal ones the same arm's, the newest.

    A start that looks at text says nothing of one that does not, nor the other way round.
    """
    settings = work.settings
    known = [
        each
        for each in records
        if each.stage == stage
        and not each.reused
        and of_similar_size(each, work.parameters)
        and _has_text(each.settings) == _has_text(settings)
        and all(each.settings.get(name) in (None, settings.get(name)) for name in ("device", "dtype"))
    ]

    def likeness(record: RunRecord) -> tuple[int, bool, str]:
        return _shared(stage, record.settings, settings), (record.suite, record.arm) == (suite, arm), record.started

    return max(known, key=likeness, default=None)


def _shared(stage: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """How many of what DECISIVE names two stages have in common."""
    told, wanted = (dict(each) | dict(each.get("spec", {})) for each in (one, other))
    return sum(_plain(told.get(name)) == _plain(wanted.get(name)) for name in DECISIVE[stage])


def _has_text(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("calibration"))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# --- formulas: seconds of a stage -------------------------------------------------------------------------------------


def _retrofit_seconds(work: Work, speed: Speed) -> float:
    """Loading and saving; where a start looks at text, passes over it, and steps of regression."""
    text, spec = work.settings.get("calibration"), work.settings.get("spec", {})
    seconds = 1.0 + _loading_seconds(work)
    if not text:
        return seconds
    phases = spec.get("start", "").split("+")
    steps: int = spec.get("start_steps", KANSpec.start_steps)
    taught = steps * len({"distill", "sequence"} & set(phases))
    followed = TOKENS_A_STEP * steps * ("sequence" in phases)
    read: int = text["tokens"] + 2 * text["heldout_tokens"] + followed
    step = max(LEAST_SECONDS[speed.kind], 6 * work.replaced * TOKENS_A_STEP / speed.flops)
    return seconds + TEXT_SECONDS + 2 * work.parameters * read / speed.flops + taught * step


def _questions_seconds(work: Work, speed: Speed) -> float:
    """Prompts, and half of the longest reply for each question."""
    longest: int = work.settings.get("max_new_tokens") or 0
    tokens = PROMPT_TOKENS + longest / 2 if longest else COMPARED_TOKENS
    forward = 2 * work.parameters * tokens / speed.flops
    return 4.0 + _loading_seconds(work) + work.questions * QUESTION_COST * forward


def _profile_seconds(work: Work, speed: Speed) -> float:
    """Loads, prefill and decoding, each of the whole and of its parts, and training steps."""
    names = {entry.name for entry in dataclasses.fields(ProfileSettings)}
    settings = ProfileSettings(**{name: _frozen(value) for name, value in work.settings.items() if name in names})
    runs = settings.repeats + 2
    forward = 2 * work.parameters / speed.flops
    decoding = max(LEAST_SECONDS[speed.kind], 4 * work.parameters / BYTES_PER_SECOND * (speed.kind == "cpu"))
    once = 2 * forward * sum(point.batch * point.length for point in settings.points)
    once += 2 * decoding * settings.new_tokens * len(settings.points)
    once += 2 * forward * settings.batch * settings.length * len(settings.steps)
    compiling = STEP_COMPILING_SECONDS * (speed.kind == "cuda") * sum(step.way != "plain" for step in settings.steps)
    return 4 * _loading_seconds(work) + compiling + runs * once


def _kernels_seconds(work: Work, speed: Speed) -> float:
    """Forward and backward of each contender, in turn, and compiling."""
    settings = work.settings
    each: int = make_basis(settings["basis"]).size * settings["in_features"] * (settings["out_features"] or 8)
    once: float = 2 * 4 * settings["tokens"] * each / speed.flops
    compiling = COMPILING_SECONDS * (speed.kind == "cuda")
    repeats: int = settings["repeats"] + 3
    return 1.0 + len(settings["contenders"]) * (compiling + repeats * once)


def _loading_seconds(work: Work) -> float:
    return 4 * work.parameters / BYTES_PER_SECOND


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FORMULAS: dict[str, Callable[[Work, Speed], float]] = {
    "retrofit": _retrofit_seconds,
    "eval-bbh": _questions_seconds,
    "profile": _profile_seconds,
    "kernels": _kernels_seconds,
}


# --- memory -----------------------------------------------------------------------------------------------------------


def retrofit_bytes(work: Work, width: int, sites: int, device: torch.device, room: float) -> float:
    """Peak of a retrofit: beside text the whole model, and what modules were seen to do; else what is new, on the CPU.

    Args:
        width: of what goes into a module, and comes out of it.
        sites: how many modules are replaced.
        room: bytes of memory that there are.
    """
    around = process_bytes() if device.type == "cpu" else 0
    text: dict[str, int] | None = work.settings.get("calibration")
    if not text:
        return around + 8 * work.replaced if device.type == "cpu" else 0.0
    tokens = text["tokens"] + text["heldout_tokens"]
    seen = min(tokens * sites * 2 * width * 4, KEEP * room)
    return static_bytes(int(work.parameters), int(work.replaced)) + seen + around


def questions_bytes(model: PreTrainedModel, device: torch.device) -> float:
    """What answering questions takes at least: weights, and a cache of a usual batch."""
    cache = QUESTIONS_AT_ONCE * PROMPT_TOKENS * cache_bytes(model.config, model.dtype)
    return parameter_bytes(model) + cache + (process_bytes() if device.type == "cpu" else 0)


def profile_bytes(model: PreTrainedModel, settings: ProfileSettings, device: torch.device, dtype: torch.dtype) -> float:
    """Peak of a profile, which is that of a training step where one is measured. Raises as apply_scope."""
    tokens = settings.batch * settings.length
    peaks = [questions_bytes(model, device) + tokens * cache_bytes(model.config, dtype)]
    fast = device.type == "cuda" and "plain" not in settings.ways
    for scope in settings.all_scopes:
        taught = copy.deepcopy(model)
        apply_scope(taught, scope, settings.tail_from)
        peaks += estimated_peaks(taught, tokens, tokens, device, dtype, fast).values()
    return max(peaks)


def kernels_bytes(problem: KernelProblem, dtype: torch.dtype) -> float:
    """Peak of the contender that expands its input in memory, forward and backward."""
    slabs = make_basis(problem.basis).size * problem.in_features
    return 4 * problem.tokens * (slabs + problem.in_features + (problem.out_features or 0)) * dtype.itemsize
