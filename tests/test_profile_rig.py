"""How things are timed: in turn, with what else went on said beside them, and what NVML tells of a GPU.

There is a GPU here or there is none: NVML is one that says what a test has it say.
"""

from __future__ import annotations

import math
import os
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from kallm_bench.profiling import rig as rigs
from kallm_bench.profiling.flops import Limits
from kallm_bench.profiling.hardware import Gpu, Reading
from kallm_bench.profiling.memory import peak_memory
from kallm_bench.profiling.ratios import ratios
from kallm_bench.profiling.rig import Measured, Rig, Surroundings, surrounded
from kallm_bench.profiling.throughput import fractions
from kallm_bench.records import Metric

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MIB = 2**20


class Nvml:
    """What stands behind pynvml's functions: one GPU, whose state a test sets."""

    def __init__(self) -> None:
        self.used = 1000 * MIB
        self.processes: dict[int, int | None] = {os.getpid(): 600 * MIB}
        self.millijoules = 5_000_000
        self.reasons = pynvml.nvmlClocksEventReasonGpuIdle
        self.failing: dict[str, Exception] = {}
        self.growing: dict[int, float] = {}

    def allocate(self, size: int, **where: Any) -> object:
        """Stands for torch.empty: what a process that is not listed by its own number looks like from outside."""
        for process, share in self.growing.items():
            self.processes[process] = (self.processes.get(process) or 0) + int(share * size)
        return object()

    def answers(self) -> dict[str, Any]:
        return {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=self.used),
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [
                SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes.items()
            ],
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: self.millijoules,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: self.reasons,
        }

    def fail(self, function: str, error: int) -> None:
        self.failing[function] = pynvml.NVMLError(error)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    nvml = Nvml()

    def answering(name: str, answer: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if name in nvml.failing:
                raise nvml.failing[name]
            return answer(*arguments)

        return call

    for name, answer in nvml.answers().items():
        monkeypatch.setattr(pynvml, name, answering(name, answer))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "empty", nvml.allocate)
    monkeypatch.setattr(rigs, "STRETCH_SECONDS", 0.0)
    return nvml


# --- turns ------------------------------------------------------------------------------------------------------------


def test_works_are_sampled_in_turn_and_every_second_round_the_other_way() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> Any:
        def run() -> float:
            order.append(name)
            return seconds

        return run

    first, second = Rig(CPU, repeats=3).measure("x", [work("a", 1.0), work("b", 2.0)], warm_runs=2, runs=1)
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab"
    assert first.seconds == (1.0,) * 3
    assert second.seconds == (2.0,) * 3


def test_a_short_run_is_done_several_times_for_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counted = [0.0], iter(range(1, 100))
    monkeypatch.setattr(rigs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work() -> float:
        now[0] += rigs.SAMPLE_SECONDS / 3.5
        number = next(counted)
        return 1000.0 if number == 3 else float(number)  # when the host was held up

    (measured,) = Rig(CPU, repeats=2).measure("x", [work])
    assert measured.seconds == (4.5, 7.5)  # medians of 2 to 5, and of 6 to 9; the first run warms up


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["gpu", "cpu"])
def test_what_runs_out_of_memory_is_left_out_and_the_others_go_on(error: Exception) -> None:
    runs = iter(range(100))

    def lacking() -> float:
        if next(runs) == 2:
            raise error
        return 1.0

    first, second = Rig(CPU, repeats=3).measure("x", [lacking, lambda: 1.0], runs=1)
    assert first.metric("prefill_seconds") == Metric("prefill_seconds", None, n=0, note="out of memory")
    assert second.seconds == (1.0,) * 3


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def wrong() -> float:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        Rig(CPU).measure("x", [wrong])


# --- what NVML tells --------------------------------------------------------------------------------------------------


def test_a_look_tells_memory_processes_and_what_holds_the_clock_down(nvml: Nvml) -> None:
    gpu = Gpu(CUDA)
    calm = gpu.look()
    assert calm == (Reading(1000 * MIB), Reading(600 * MIB), frozenset(), 1)
    nvml.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonSwThermalSlowdown
    nvml.processes[1] = 10 * MIB
    look = gpu.look()
    assert (look.held_down, look.processes) == ({"its power limit", "heat"}, 2)
    assert gpu.looks == [calm, look]


def test_without_nvml_there_are_no_figures_and_a_reason(nvml: Nvml) -> None:
    nvml.fail("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    gpu = Gpu(CUDA)
    look = gpu.look()
    assert look.processes == 0
    for reading in (look.device_bytes, look.process_bytes, gpu.joules()):
        assert reading.value is None
        assert reading.reason == "NVML does not answer: NVML Shared Library Not Found"
    (measured,) = Rig(CPU, gpu, repeats=2).measure("x", [lambda: 1.0])
    assert measured.joules_per_token("prefill_joules_per_token", 4).note == gpu.missing
    assert measured.seconds == (1.0, 1.0)


def test_what_a_gpu_does_not_tell_does_not_stop_the_rest(nvml: Nvml) -> None:
    nvml.fail("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_NOT_SUPPORTED)
    nvml.fail("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NO_PERMISSION)
    gpu = Gpu(CUDA)
    assert gpu.joules() == Reading(None, "NVML does not say: Not Supported")
    assert gpu.look().device_bytes == Reading(1000 * MIB)
    assert "does not list this process" in gpu.look().process_bytes.reason


@pytest.mark.parametrize(
    ("before", "growing", "own"),
    [
        ({4001: 300 * MIB, 4002: 700 * MIB}, {4001: 0.1, 4002: 1.0}, 4002),
        ({4001: 300 * MIB}, {4002: 1.5}, 4002),
        ({}, {4002: 1.5}, 4002),
        ({}, {os.getpid(): 1.5}, os.getpid()),
        ({4001: 300 * MIB, 4002: 700 * MIB}, {4001: 0.1}, None),
        ({4001: 300 * MIB, 4002: 700 * MIB}, {4001: 1.0, 4002: 1.0}, None),
        ({}, {}, None),
    ],
    ids=["in a container", "new there", "the only one", "by its own number", "hidden", "two that grow", "nobody"],
)
def test_the_process_that_grows_is_this_one(
    nvml: Nvml, before: dict[int, int | None], growing: dict[int, float], own: int | None
) -> None:
    nvml.processes, nvml.growing = dict(before), growing
    gpu = Gpu(CUDA)
    if own:
        nvml.processes[own] = 750 * MIB
    reading = gpu.look().process_bytes
    assert reading.value == (750 * MIB if own else None)
    assert own or reading.reason == "NVML does not list this process; in a container it often cannot"


def test_peak_memory_is_told_four_ways(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5)
    gpu = Gpu(CUDA)
    nvml.processes[os.getpid()] = 9000 * MIB
    gpu.look()  # of what was before
    nvml.processes[os.getpid()] = 600 * MIB
    with peak_memory(CUDA, gpu, "/decode") as peaks:
        nvml.processes[os.getpid()], nvml.used = 800 * MIB, 1200 * MIB
        gpu.look()
        nvml.processes[os.getpid()], nvml.used = 700 * MIB, 1100 * MIB
    assert {metric.name: metric.value for metric in peaks} == {
        "peak_vram_allocated_bytes/decode": 3,
        "peak_vram_reserved_bytes/decode": 5,
        "peak_vram_process_bytes/decode": 800 * MIB,
        "peak_vram_device_bytes/decode": 1200 * MIB,
    }


# --- energy -----------------------------------------------------------------------------------------------------------


def test_energy_is_that_of_the_stretch_over_its_runs(nvml: Nvml) -> None:
    def work() -> float:
        nvml.millijoules += 3000
        return 1.0

    (measured,) = Rig(CPU, Gpu(CUDA), repeats=4).measure("x", [work])
    metric = measured.joules_per_token("prefill_joules_per_token", 12)
    assert metric.value == 0.25
    assert metric.n == measured.energy_runs >= 2


def test_on_a_cpu_energy_is_not_measured_and_says_so() -> None:
    (measured,) = Rig(CPU, repeats=2).measure("x", [lambda: 1.0])
    metric = measured.joules_per_token("prefill_joules_per_token", 1)
    assert (metric.value, metric.note) == (None, "energy is read by NVML, of an NVIDIA GPU")


# --- what else goes on ------------------------------------------------------------------------------------------------


def test_notes_say_what_may_spoil_a_figure(nvml: Nvml) -> None:
    def work() -> float:
        nvml.reasons = pynvml.nvmlClocksEventReasonHwThermalSlowdown
        nvml.processes = {os.getpid(): 1, 1: 1, 2: 1}
        return 1.0

    gpu = Gpu(CUDA)
    calm = Surroundings(gpu)
    gpu.look()
    assert calm.notes() == ()
    (measured,) = Rig(CPU, gpu, repeats=2).measure("x", [work])
    assert measured.metric("prefill_seconds").note == (
        "the GPU's clock is held down by heat; 2 other processes compute on the GPU"
    )


def test_a_long_piece_of_work_is_watched_at_both_ends(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.processes = {os.getpid(): 1}
    with surrounded(CUDA) as calm:
        pass
    assert calm == []
    with surrounded(CUDA) as notes:
        nvml.processes = {os.getpid(): 1, 1: 1}
        assert notes == []
    assert notes == ["1 other process computes on the GPU"]
    with surrounded(CPU) as notes:
        pass
    assert notes == []


@pytest.mark.parametrize(
    ("passed", "others", "note"),
    [(2.0, 1.5, ()), (2.0, 2.0, ("other processes take 25% of the CPU",)), (0.1, 0.3, ())],
    ids=["calm", "busy", "too short to tell"],
)
def test_a_busy_cpu_is_told(
    monkeypatch: pytest.MonkeyPatch, passed: float, others: float, note: tuple[str, ...]
) -> None:
    clock = {"now": 100.0, "busy": 50.0, "own": 7.0}
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(user=clock["busy"], idle=1e6, iowait=1e6))
    own = lambda: SimpleNamespace(user=clock["own"], system=0.0, children_user=0.0, children_system=0.0)  # noqa: E731
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(cpu_times=own))
    seen = Surroundings(None)
    clock = {"now": 100.0 + passed, "busy": 50.0 + others + 3.0, "own": 10.0}  # three seconds are its own
    assert seen.notes() == note


# --- fractions and ratios ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flops", "moved", "mfu", "roofline"),
    [(50.0, 1.0, 0.25, 0.25), (50.0, 30.0, 0.25, 0.75)],
    ids=["bound by arithmetic", "bound by bandwidth"],
)
def test_the_roofline_is_the_longer_of_two_times(flops: float, moved: float, mfu: float, roofline: float) -> None:
    found = fractions("decode", "/1x64", Measured((2.0, 2.0)), flops, moved, Limits(100.0, 20.0))
    assert [(metric.name, metric.value) for metric in found] == [
        ("decode_mfu/1x64", mfu),
        ("decode_roofline/1x64", roofline),
    ]


def test_an_unknown_device_has_no_fractions_and_a_reason() -> None:
    for metric in fractions("prefill", "", Measured((2.0,)), 1.0, 1.0, None):
        assert (metric.value, metric.note) == (None, "no data sheet is known of this device")


def test_a_ratio_is_taken_round_by_round() -> None:
    slow_rounds = [1.0, 4.0, 1.0, 2.0]  # what slows the one slows the other: no interval of its own is as narrow
    first = [
        Metric("prefill_seconds", 1.5, 4, slow_rounds),
        Metric("parameters", 100),
        Metric("replaced_parameters", 0),
    ]
    second = [
        Metric("prefill_seconds", 3.0, 4, [2.0 * each for each in slow_rounds]),
        Metric("parameters", 150),
        Metric("replaced_parameters", 5),
        Metric("peak_bytes", None),
    ]
    found = {metric.name: metric for metric in ratios(first, second)}
    assert set(found) == {
        "ratio/prefill_seconds",
        "ratio_low/prefill_seconds",
        "ratio_high/prefill_seconds",
        "ratio/parameters",
    }
    for end in ("ratio", "ratio_low", "ratio_high"):
        assert math.isclose(found[f"{end}/prefill_seconds"].value or 0, 2.0)
    assert found["ratio/parameters"].value == 1.5


def test_the_interval_of_a_ratio_is_students_of_the_logarithms() -> None:
    second = [Metric("prefill_seconds", 2.0, 3, [1.0, 2.0, 4.0])]
    found = {metric.name: metric.value for metric in ratios([Metric("prefill_seconds", 1.0, 3, [1.0] * 3)], second)}
    half = 4.302652729911275 * math.log(2) / math.sqrt(3)  # Student's 97.5 % with two degrees of freedom
    assert found == pytest.approx(
        {
            "ratio/prefill_seconds": 2.0,
            "ratio_low/prefill_seconds": 2.0 * math.exp(-half),
            "ratio_high/prefill_seconds": 2.0 * math.exp(half),
        }
    )
