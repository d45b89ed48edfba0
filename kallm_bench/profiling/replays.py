"""The time of a step of a few microseconds, and the memory it takes.

Python needs longer to launch a small kernel than a GPU to run it, so a loop in Python would time the launches. A CUDA
graph records the launches of several calls once; a replay then issues them all, and what is left is the kernels.
Samples of all contenders are taken in turn, round after round, so that a clock that drifts under load drifts for all
alike. On a CPU, where there is nothing to record, calls are timed as they come.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Step = Callable[[int], object]
"""One call of what is timed, on the input set of this number."""

MOST_CALLS = 10
"""Calls in one graph, at most."""

MOST_REPLAYS = 100
"""Replays in one sample, at most."""

SAMPLE_SECONDS = 0.003
"""What a sample takes, about: the resolution of CUDA events is half a microsecond."""

WARM_UP = 3
"""Calls before anything is timed, and rounds before any counts."""


@dataclass(frozen=True)
class Timer:
    """A step made ready: `sample` runs it and gives the seconds of one call; `note` tells of reservations."""

    sample: Callable[[], float]
    note: str = ""
    step: Step | None = None
    """What a graph replays, kept: it holds the tensors whose addresses the graph knows."""


def make_timer(step: Step, device: torch.device) -> Timer:
    """Warms a step up and makes it ready. Raises what the step raises."""
    return _on_gpu(step, device) if device.type == "cuda" else _on_cpu(step)


def sample_in_turn(timers: Mapping[str, Timer], repeats: int) -> dict[str, list[float]]:
    """`repeats` samples of each timer, seconds a call, taken round by round after some that bring the clock up."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(WARM_UP + repeats):
        for name, timer in timers.items():
            samples[name].append(timer.sample())
    return {name: each[WARM_UP:] for name, each in samples.items()}


def _on_cpu(step: Step) -> Timer:
    step(0)
    begin = time.perf_counter()
    step(1)
    calls = _fitting(time.perf_counter() - begin, MOST_CALLS)

    def sample() -> float:
        begin = time.perf_counter()
        for number in range(calls):
            step(number)
        return (time.perf_counter() - begin) / calls

    return Timer(sample)


def _on_gpu(step: Step, device: torch.device) -> Timer:
    side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as a graph is, when it is recorded
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for number in range(WARM_UP):
            step(number)
    torch.cuda.current_stream(device).wait_stream(side)
    calls = _fitting(_seconds(lambda: step(0), device), MOST_CALLS)

    def all_calls() -> None:
        for number in range(calls):
            step(number)

    run, note = _recorded(all_calls, device)
    run()
    replays = _fitting(_seconds(run, device), MOST_REPLAYS)

    def sample() -> float:
        def several() -> None:
            for _ in range(replays):
                run()

        return _seconds(several, device) / (replays * calls)

    return Timer(sample, note, step)


def _recorded(work: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], str]:
    """The replay of a graph of `work`; `work` itself, and a note of why, where it cannot be recorded."""
    graph, home = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            work()
    except Exception as error:  # whatever in foreign code forbids recording, it can still be timed by launching it
        torch.cuda.set_stream(home)  # a recording that breaks off leaves its own behind
        torch.cuda.synchronize(device)
        work()
        return work, f"timed without a CUDA graph ({first_line(error)})"
    return graph.replay, ""


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record(torch.cuda.current_stream(device))
    work()
    end.record(torch.cuda.current_stream(device))
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _fitting(seconds: float, most: int) -> int:
    """How many times `seconds` fit into a sample, from 1 to `most`."""
    return max(1, min(most, round(SAMPLE_SECONDS / max(seconds, 1e-9))))


def first_line(error: Exception) -> str:
    """What went wrong, short enough for a table's note."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], Tensor], held: Sequence[Tensor], device: torch.device) -> int:
    """What a forward keeps for its backward, beyond its output and `held`, the input and the parameters.

    Call it once before, so that nothing is counted that only the first call makes.
    """
    if device.type == "cuda":
        _settle(device)
        before = _asked_for("current", device)
        y = forward()
        return max(0, _asked_for("current", device) - before - y.untyped_storage().nbytes())
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in (y, *held)}
    return sum(size for address, size in saved.items() if address not in known)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most that GPU tensors take during `work`, beyond what was there before; None on a CPU, which does not say."""
    if device.type != "cuda":
        return None
    _settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = _asked_for("current", device)
    work()
    torch.cuda.synchronize(device)
    return _asked_for("peak", device) - before


def _asked_for(when: str, device: torch.device) -> int:
    """Bytes of all tensors as they were asked for: blocks that the allocator hands out are up to 1 MiB larger."""
    return int(torch.cuda.memory_stats(device)[f"requested_bytes.all.{when}"])


def _settle(device: torch.device) -> None:
    gc.collect()
    torch.cuda.synchronize(device)
