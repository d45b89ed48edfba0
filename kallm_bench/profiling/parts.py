"""Where a model's time goes: attention, feed-forwards or KANs, the head, and all the rest.

Marks are set when a part begins and when it is done: on a GPU events in its queue, on a CPU the clock. Marks take time
themselves, so that the parts come to a little more than the whole without them. Where a GPU waits for Python to launch
kernels, a part's time is the time of its launches.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANLinear
from kallm_bench.kan.layers import GroupFunction
from kallm_bench.models import specs_of
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.modeling import original_class
from kallm_bench.profiling.flops import product_weights
from kallm_bench.profiling.memory import suppressed_lack
from kallm_bench.profiling.rig import Measured, Rig, Work
from kallm_bench.profiling.settings import ProfileSettings
from kallm_bench.profiling.throughput import Decode, Prefill, new_tokens, random_tokens, too_long
from kallm_bench.records import Metric

WHOLE, REST = "whole", "rest"
NAMES = ("attention", "mixer", "feed-forward", "kan", "head", REST)
"""Parts as metrics name them, in their order. A mixer lets tokens see each other without being attention."""


class Part(NamedTuple):
    """One module, or several that follow each other."""

    name: str
    modules: tuple[nn.Module, ...]


def parts_of(model: PreTrainedModel) -> list[Part]:
    """Every mixer and feed-forward of every block, and the head.

    Raises:
        SpecError: the architecture is one whose feed-forwards cannot be found.
    """
    anatomy = Anatomy.of(model.config, original_class(model)) if specs_of(model.config) else Anatomy(model)
    parts, places = [], anatomy.covered()
    for block, place in enumerate(places):
        for path, is_attention in anatomy.mixers(block).items():
            parts.append(Part("attention" if is_attention else "mixer", (model.get_submodule(path),)))
        if isinstance(place, str):  # some hybrids have blocks without
            continue
        paths = (place.path,) if place.adds or not place.chain else place.chain
        modules = tuple(model.get_submodule(path) for path in paths)
        learned = any(isinstance(each, KANLinear | GroupFunction) for module in modules for each in module.modules())
        parts.append(Part("kan" if learned else "feed-forward", modules))
    if all(isinstance(place, str) for place in places):
        raise SpecError(f"a block {places[0]}")
    return [*parts, Part("head", (model.get_output_embeddings(),))]


def measure_parts(models: Sequence[PreTrainedModel], settings: ProfileSettings, rig: Rig) -> list[list[Metric]]:
    """Parameters, FLOP and time of each part, in a prefill and in a step of decoding at the main point, in turn.

    Returns:
        Of each model "part_parameters/attention" ... ; one None with the reason where its parts cannot be found.
    """
    jobs = []
    found: list[list[Metric]] = []
    for model in models:
        try:
            parts = parts_of(model)
        except SpecError as error:
            found.append([Metric("part_parameters", None, n=0, note=f"parts cannot be told apart: {error}")])
            continue
        found.append([*_sizes("part_parameters", parts, model, _own_parameters)])
        found[-1] += _sizes("part_flops_per_token", parts, model, lambda module: {module: 2 * product_weights(module)})
        if not too_long(model, settings.length):
            jobs.append(_Job(model, parts, found[-1], _Marks(rig)))
    with torch.inference_mode(), ExitStack() as stack:
        for job in jobs:
            stack.enter_context(_marked(job.model, job.parts, job.marks))
        for phase in ("prefill", "decode"):
            _time_parts(phase, jobs, settings, rig)
    return found


@dataclass(frozen=True)
class _Job:
    """A model whose parts are timed: where its metrics go, and where its marks are."""

    model: PreTrainedModel
    parts: Sequence[Part]
    metrics: list[Metric]
    marks: _Marks


def _time_parts(phase: str, jobs: Sequence[_Job], settings: ProfileSettings, rig: Rig) -> None:
    """Adds the time of the parts of each model in this phase to its metrics; nothing where memory runs out."""
    new = new_tokens(settings.main, settings)

    def work_of(job: _Job) -> Work:
        ids = random_tokens(job.model, settings.main)
        return Prefill(rig, job.model, ids) if phase == "prefill" else Decode(rig, job.model, ids, new)

    works = [work_of(job) for job in jobs]
    runs: list[list[dict[str, float]]] = [[] for _ in jobs]
    with suppressed_lack():
        for number in range(settings.repeats + 1):
            rig.watch(f"profile of the parts of {phase}", number, settings.repeats + 1)
            for job, work, mine in zip(jobs, works, runs, strict=True):
                job.marks.clear()
                work()
                passes = job.marks.passes()
                mine.append(_mean(passes if phase == "prefill" else passes[1:]))  # decoding begins with a prefill
        rig.watch(f"profile of the parts of {phase}", settings.repeats + 1, settings.repeats + 1)
    for job, (_, *counting) in zip(jobs, runs, strict=True):  # the first run warms up
        for name in (name for name in NAMES if counting and name in counting[0]):
            seconds = tuple(run[name] for run in counting)
            job.metrics.append(Measured(seconds).metric(f"{phase}_part_seconds/{name}"))


def _own_parameters(module: nn.Module) -> Mapping[object, int]:
    return {parameter: parameter.numel() for parameter in module.parameters(recurse=False)}


def _sizes(
    metric: str, parts: Sequence[Part], model: PreTrainedModel, of: Callable[[nn.Module], Mapping[Any, int]]
) -> Iterator[Metric]:
    """The sum of something over the modules of each part, each thing once, and over the rest of the model."""

    def total(modules: Sequence[nn.Module]) -> int:
        things = {id(key): size for each in modules for inner in each.modules() for key, size in of(inner).items()}
        return sum(things.values())

    by_name: dict[str, list[nn.Module]] = defaultdict(list)
    for part in parts:
        by_name[part.name] += part.modules
    sizes = {name: total(modules) for name, modules in by_name.items()}
    sizes[REST] = total([model]) - sum(sizes.values())
    yield from (Metric(f"{metric}/{name}", sizes[name]) for name in NAMES if name in sizes)


class _Marks:
    """When parts began and ended, in the order in which they did."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        if self.rig.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.rig.device))
        return event

    def span(self, name: str, begin: Any, end: Any) -> None:
        self._spans.append((name, begin, end))

    def clear(self) -> None:
        self._spans.clear()

    def passes(self) -> list[dict[str, float]]:
        """Of each forward pass of the model, the seconds of each part, summed over blocks, and of the rest."""
        self.rig.synchronise()
        found: list[dict[str, float]] = []
        current: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            current[name] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
            if name == WHOLE:
                whole = current.pop(WHOLE)
                found.append({**current, REST: whole - sum(current.values())})
                current = defaultdict(float)
        return found


@contextmanager
def _marked(model: PreTrainedModel, parts: Sequence[Part], marks: _Marks) -> Iterator[None]:
    """While inside, every pass through the model leaves marks."""
    handles: list[RemovableHandle] = []
    for part in (*parts, Part(WHOLE, (model,))):
        begun: list[Any] = []

        def begin(*called: Any, begun: list[Any] = begun) -> None:
            begun.append(marks.now())

        def end(*called: Any, begun: list[Any] = begun, name: str = part.name) -> None:
            marks.span(name, begun.pop(), marks.now())

        handles.append(part.modules[0].register_forward_pre_hook(begin))
        handles.append(part.modules[-1].register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(each[name] for each in passes) for name in passes[0]}
