"""One problem against the clock: all contenders on the same numbers, in turn.

Those that compute our function are first held against float64, since a wrong kernel can be as fast as it likes. One
that fails, or is not installed, is left with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median

import torch

from kallm_bench.profiling.contenders import (
    ACTIVATIONS,
    LAYERS,
    Contender,
    NotPossibleError,
    Setup,
    draw,
    plain_layer,
    true_layer,
)
from kallm_bench.profiling.memory import give_back, is_out_of_memory
from kallm_bench.profiling.problems import KernelProblem
from kallm_bench.profiling.replays import (
    Timer,
    first_line,
    make_timer,
    peak_bytes,
    sample_in_turn,
    saved_bytes,
)
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import WIDE_SPREAD, Metric

TIMINGS = ("forward_seconds", "forward_backward_seconds")


def measure_kernels(
    problem: KernelProblem, device: torch.device, dtype: torch.dtype, watch: Watch = nobody
) -> list[Metric]:
    """The figures of each contender, "forward_seconds/kallm"; of one that cannot compete, None and the reason."""
    torch.compiler.reset()  # shapes compiled before would count towards the compiler's limit, and make these dynamic
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        setup = draw(problem.basis, problem.tokens, problem.in_features, problem.out_features, device, dtype)
        known = ACTIVATIONS if problem.out_features is None else LAYERS
        judge, entries = Judge(setup), []
        for number, name in enumerate(problem.contenders):
            watch("contenders", number, len(problem.contenders), name)
            entries.append(_enter(name, known[name], setup, judge))
            give_back(device)
        timers = {f"{timing}/{entry.name}": timer for entry in entries for timing, timer in entry.timers.items()}
        samples = sample_in_turn(timers, problem.repeats)
        watch("contenders", len(problem.contenders), len(problem.contenders))
    metrics = [metric for entry in entries for metric in (*entry.metrics, *_timings(entry, samples))]
    del entries, timers, judge, setup
    give_back(device)
    return metrics


@dataclass
class Entry:
    """A contender on its way to the clock: its timers, or why it has none, and what was found out before."""

    name: str
    timers: dict[str, Timer] = field(default_factory=dict)
    reason: str = ""
    metrics: list[Metric] = field(default_factory=list)


def _enter(name: str, make: Callable[[Setup], Contender], setup: Setup, judge: Judge) -> Entry:
    """Builds one contender, checks it, asks for its memory, and makes it ready to be timed."""
    entry, device = Entry(name), setup.dy.device
    try:
        contender = make(setup)
        contender.both(0)
        if contender.ours:
            entry.metrics.append(judge.error_of(name, contender))
            if entry.metrics[0].note:
                raise NotPossibleError(entry.metrics[0].note)
        if contender.layer:
            entry.metrics += _memory(name, contender, setup)
        for timing, step in zip(TIMINGS, (contender.forward, contender.both), strict=True):
            entry.timers[timing] = make_timer(step, device)
    except NotPossibleError as error:
        entry.reason = str(error)
    except Exception as error:  # foreign code, foreign compilers, a device that is too small: each is a row of its own
        entry.reason = _why(error)
    if entry.reason:
        entry.timers.clear()
    return entry


class Judge:
    """Holds contenders against float64: each may be twice as wrong as plain PyTorch in the same dtype, and no more.

    An error is the norm of the difference over the norm of the truth, of the output and of each gradient.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def error_of(self, name: str, contender: Contender) -> Metric:
        """The largest error; its note says so where that is more than allowed."""
        found = self._errors(contender)
        worst = max(found.values(), key=lambda error: error if error == error else float("inf"))
        for what, error in found.items():
            if not error <= self.allowed[what]:  # not a number is not right either
                note = f"wrong, so not timed: {what} is off by {error:.1e}, and {self.allowed[what]:.1e} is allowed"
                return Metric(f"relative_error/{name}", worst if worst < float("inf") else None, note=note)
        return Metric(f"relative_error/{name}", worst)

    @cached_property
    def truth(self) -> dict[str, torch.Tensor]:
        return self._named(true_layer(self.setup).both(0))

    @cached_property
    def allowed(self) -> dict[str, float]:
        rounding = 4 * torch.finfo(self.setup.dy.dtype).eps + 16 * torch.finfo(torch.float32).eps  # sums of many rows
        return {what: 2 * error + rounding for what, error in self._errors(plain_layer(self.setup)).items()}

    def _errors(self, contender: Contender) -> dict[str, float]:
        found = self._named(contender.both(0))
        return {
            what: float((found[what].double() - true).norm() / true.norm().clamp_min(1e-300))
            for what, true in self.truth.items()
        }

    def _named(self, results: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ("y", "dx", *(f"gradient of {name}" for name, _ in self.setup.layer.named_parameters()))
        return {name: tensor.detach() for name, tensor in zip(names, results, strict=True)}


def _memory(name: str, contender: Contender, setup: Setup) -> list[Metric]:
    device = setup.dy.device
    saved = saved_bytes(lambda: contender.forward(0), (setup.inputs[0], *contender.learned), device)
    peak = peak_bytes(lambda: contender.both(0), device)
    return [Metric(f"saved_bytes/{name}", saved)] + ([] if peak is None else [Metric(f"peak_bytes/{name}", peak)])


def _timings(entry: Entry, samples: Mapping[str, Sequence[float]]) -> list[Metric]:
    if entry.reason:
        return [Metric(f"{timing}/{entry.name}", None, n=0, note=entry.reason) for timing in TIMINGS]
    metrics = []
    for timing, timer in entry.timers.items():
        seconds = samples[f"{timing}/{entry.name}"]
        metric = Metric(f"{timing}/{entry.name}", median(seconds), n=len(seconds), samples=seconds)
        notes = [f"spread {metric.spread:.0%}"] if metric.spread > WIDE_SPREAD else []
        notes += [timer.note] if timer.note else []
        metrics.append(replace(metric, note="; ".join(notes)))
    return metrics


def _why(error: Exception) -> str:
    return "out of memory" if is_out_of_memory(error) else first_line(error)
