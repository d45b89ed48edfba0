"""How anything is timed here: warmed up, synchronised, in turn, sampled, with what else went on said beside it.

Several models are measured in turn, round by round, and every second round the other way round: what a clock that
falls or a neighbour that computes takes away, it takes from all alike, and the ratios of a round are free of it. Energy
is counted over a stretch of some seconds afterwards, since a GPU's counter moves ten times a second.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch

from kallm_bench.profiling.hardware import Gpu, Reading
from kallm_bench.profiling.memory import give_back, suppressed_lack
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import OTHERS, WIDE_SPREAD, Metric

Work = Callable[[], float]
"""One run of what is measured; returns the seconds that count of it, the device synchronised."""

WARM_SECONDS = 0.5
"""A GPU's clock needs that long to rise, so it is warmed up for as long; a CPU with one run."""

MOST_WARM_RUNS = 50

SAMPLE_SECONDS = 0.3
"""A run that is shorter is done several times for one sample, their median: a host held up once does not move it."""

MOST_RUNS = 10
"""Runs in one sample, at most."""

STRETCH_SECONDS = 2.0
"""What energy is counted over, at least."""

BUSY_SHARE = 0.2
"""What other processes take of all cores is said from here on."""

SHORTEST_LOOK_SECONDS = 0.3
"""Over less than that the system's count of busy cores, in hundredths of a second, says nothing."""

NO_ENERGY = Reading(None, "energy is read by NVML, of an NVIDIA GPU")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Measured:
    """Samples of one work.

    Args:
        seconds: of each sample, a run; none where it could not be run, and `reason` says why.
        reason: see there.
        notes: what else went on.
        joules: of one run, and over how many it was counted.
    """

    seconds: tuple[float, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    joules: Reading = NO_ENERGY
    energy_runs: int = 0

    def metric(self, name: str, value_of: Callable[[float], float] = float) -> Metric:
        """The figure at the median, `value_of` seconds, with all samples; None with the reason where there are none."""
        if not self.seconds:
            return Metric(name, None, n=0, note=self.reason)
        samples = [value_of(each) for each in self.seconds]
        metric = Metric(name, statistics.median(samples), n=len(samples), samples=samples)
        notes = [f"spread {metric.spread:.0%}"] if metric.spread > WIDE_SPREAD else []
        return Metric(name, metric.value, metric.n, samples, "; ".join([*notes, *self.notes]))

    def joules_per_token(self, name: str, tokens: float) -> Metric:
        """Energy of the whole GPU a token, of a run that handles so many."""
        joules = self.joules.value
        if not self.seconds or joules is None:
            return Metric(name, None, n=0, note=self.reason or self.joules.reason)
        return Metric(name, joules / tokens, n=self.energy_runs, note="; ".join(self.notes))


@dataclass(frozen=True)
class Rig:
    """Where measurements are made.

    Args:
        device: that computes.
        gpu: what NVML says of it; None on a CPU.
        repeats: samples of each work.
        watch: told of progress.
    """

    device: torch.device
    gpu: Gpu | None = None
    repeats: int = 5
    watch: Watch = nobody

    @classmethod
    def at(cls, device: torch.device, repeats: int, watch: Watch = nobody) -> Rig:
        return cls(device, Gpu(device) if device.type == "cuda" else None, repeats, watch)

    def clocked(self, work: Callable[[], object]) -> float:
        """Seconds of one run of `work`, the device synchronised before and after."""
        self.synchronise()
        begin = time.perf_counter()
        work()
        self.synchronise()
        return time.perf_counter() - begin

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, name: str, works: Sequence[Work], warm_runs: int = 0, runs: int | None = None) -> list[Measured]:
        """Samples of each work, in turn. One that runs out of memory is left out, and says so; the others go on.

        Args:
            warm_runs: before any that counts; 0 for as many as warm this device up.
            runs: in one sample; None for as many as take SAMPLE_SECONDS.
        """
        jobs = [_Job(self, work) for work in works]
        surroundings = Surroundings(self.gpu)
        rounds = 1 + self.repeats  # the first warms up
        self.watch(f"profile of {name}", 0, rounds)
        for job in jobs:
            job.warm_up(warm_runs, runs)
        for number in range(self.repeats):
            self.watch(f"profile of {name}", 1 + number, rounds)
            for job in jobs if number % 2 == 0 else reversed(jobs):
                job.sample()
        self.watch(f"profile of {name}", rounds, rounds)
        for job in jobs:
            job.count_energy()
        notes = surroundings.notes()
        return [
            Measured(tuple(job.seconds), job.reason, notes, job.joules, job.energy_runs)
            if not job.reason
            else Measured(reason=job.reason)
            for job in jobs
        ]


@dataclass
class _Job:
    """A work on its way through the rounds."""

    rig: Rig
    work: Work
    seconds: list[float] = field(default_factory=list)
    reason: str = ""
    runs: int = 1
    joules: Reading = NO_ENERGY
    energy_runs: int = 0

    def warm_up(self, warm_runs: int, runs: int | None) -> None:
        begin, done, last = time.perf_counter(), 0, 0.0
        on_gpu = self.rig.device.type == "cuda"

        def is_cold() -> bool:
            if warm_runs or not on_gpu:
                return done < max(warm_runs, 1)
            return done < MOST_WARM_RUNS and time.perf_counter() - begin < WARM_SECONDS

        while not self.reason and is_cold():
            before = time.perf_counter()
            self._run()
            last, done = time.perf_counter() - before, done + 1  # all of it, whatever of it counts
        self.runs = runs or max(1, min(MOST_RUNS, math.ceil(SAMPLE_SECONDS / max(last, 1e-6))))

    def sample(self) -> None:
        """Takes one more sample; then NVML is looked at, outside of what is timed."""
        seconds = [self._run() for _ in range(self.runs) if not self.reason]
        if not self.reason:
            self.seconds.append(statistics.median(seconds))
            if self.rig.gpu:
                self.rig.gpu.look()

    def count_energy(self) -> None:
        gpu = self.rig.gpu
        if self.reason or gpu is None:
            return
        before = gpu.joules()
        if before.value is None:
            self.joules = before
            return
        begin = time.perf_counter()
        with gpu.watched():
            while not self.reason and (self.energy_runs < 2 or time.perf_counter() - begin < STRETCH_SECONDS):
                self._run()
                self.energy_runs += 1
        after = gpu.joules()
        if after.value is not None:
            self.joules = Reading((after.value - before.value) / self.energy_runs)

    def _run(self) -> float:
        with suppressed_lack():
            return self.work()
        self.reason = OUT_OF_MEMORY
        give_back(self.rig.device)  # here, where the error and all that it held are gone
        return 0.0


class Surroundings:
    """What else goes on while something is measured, from when this is made."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu, self._first_look = gpu, len(gpu.looks) if gpu else 0
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def notes(self) -> tuple[str, ...]:
        """What a reader should know beside the number."""
        looks = self._gpu.looks[self._first_look :] if self._gpu else []
        held_down = sorted({reason for look in looks for reason in look.held_down})
        others = max((look.processes for look in looks), default=0) - 1
        found = [f"the GPU's clock is held down by {' and '.join(held_down)}"] if held_down else []
        if others > 0:
            found.append(f"{others} {OTHERS}{' computes' if others == 1 else 'es compute'} on the GPU")
        if (share := self.busy_share()) >= BUSY_SHARE:
            found.append(f"{OTHERS}es take {share:.0%} of the CPU")
        return tuple(found)

    def busy_share(self) -> float:
        """What other processes took of all cores together, 0 to 1; 0 where too little time has passed to tell."""
        passed = time.perf_counter() - self._began
        if passed < SHORTEST_LOOK_SECONDS:
            return 0.0
        others = _busy_seconds() - self._busy - (_own_seconds() - self._own)
        return min(1.0, max(0.0, others / (passed * (psutil.cpu_count() or 1))))


LOOKS_APART_SECONDS = 5.0
"""NVML is asked that often in a long piece of work, and at both its ends."""


@contextmanager
def surrounded(device: torch.device) -> Iterator[list[str]]:
    """Yields a list that holds what else went on, in words, when the block is left."""
    gpu = Gpu(device) if device.type == "cuda" else None
    surroundings, notes = Surroundings(gpu), list[str]()
    if gpu is None:
        yield notes
    else:
        gpu.look()
        with gpu.watched(LOOKS_APART_SECONDS):
            yield notes
        gpu.look()
    notes.extend(surroundings.notes())


def _busy_seconds() -> float:
    """Of all cores since the machine was started, whatever kept them from idling; a guest's count as users'."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)
