"""The machine: what it is, what stays the same about it, and what is true of it now. The only importer of pynvml."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kallm_bench.errors import DeviceError, unknown

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "kallm-bench")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device called "cpu", "cuda", "cuda:1" ...; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        DeviceError: not there, or not a device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise DeviceError(unknown("device", name, ("auto", "cpu", "cuda")))
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DeviceError(f"no device '{name}': this machine has {torch.cuda.device_count()} GPUs; take --device cpu")
    return torch.device(name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on a GPU and float32 on a CPU. DeviceError where there is none."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise DeviceError(unknown("dtype", name, ("auto", *DTYPES)))
    return DTYPES[name]


@cache
def identity() -> dict[str, Any]:
    """What makes this machine this testbed: nothing that changes from day to day."""
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30)} for gpu in gpus],
        "system": platform.system(),
    }


def machine_facts() -> dict[str, Any]:
    """What is told of this machine beside its identity, and may change: the driver of its GPUs, where it has one."""
    if not torch.cuda.is_available():
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return {"driver": None, "nvml": str(error)}
    return {"driver": driver}


def environment(device: torch.device) -> dict[str, Any]:
    """What was true when a stage ran: versions, the state of the code, and of the GPU in use."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed_version(name))},
        "git": _git_state(),
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    return facts | ({"gpu": _gpu_state(device)} if device.type == "cuda" else {})


def installed_version(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _git_state() -> dict[str, Any] | None:
    """The commit this code stands at, and whether it was changed since; None outside a checkout."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu_state(device: torch.device) -> dict[str, Any]:
    """Name, driver, clocks and temperature, by NVML; only the name where NVML does not answer."""
    facts: dict[str, Any] = {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    import pynvml

    try:
        handle = _handle(device)
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        facts["clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        facts["memory_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        facts["temperature_celsius"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        facts["nvml"] = str(error)
    return facts


# --- a GPU as NVML knows it -------------------------------------------------------------------------------------------

HELD_DOWN = {
    0x04: "its power limit",
    0x08: "the hardware",
    0x20: "heat",
    0x40: "heat",
    0x80: "the power supply",
}
"""NVML's bits of what keeps a clock below what was asked for, beyond idling and users' own settings."""

PROBE_BYTES = 512 * 2**20
"""What is allocated for a moment, to find which of the listed processes is this one."""


class Reading(NamedTuple):
    """A number, or None and why there is none."""

    value: float | None
    reason: str = ""


class Look(NamedTuple):
    """What NVML said at one moment: memory in use, the GPU's clock, how many processes compute on it.

    Args:
        device_bytes: of the whole device, whoever holds them.
        process_bytes: of this process: tensors, what the allocator keeps, the CUDA context, libraries.
        held_down: what keeps the clock down, values of HELD_DOWN.
        processes: that compute on the device, this one among them.
    """

    device_bytes: Reading
    process_bytes: Reading
    held_down: frozenset[str]
    processes: int


class Gpu:
    """What NVML says of one GPU, look by look. Where NVML is missing nothing is raised: readings are None.

    Args:
        device: a CUDA device.

    Attributes:
        looks: every Look so far.
        missing: why nothing can be read; empty where NVML answers.
    """

    def __init__(self, device: torch.device) -> None:
        import pynvml

        self.looks: list[Look] = []
        self.missing = ""
        self._nvml = pynvml
        self._process = os.getpid()
        # the second is raised where the driver is older than these bindings, and is no NVMLError
        self._errors = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError)
        try:
            self._gpu = _handle(device)
        except self._errors as error:
            self.missing = f"NVML does not answer: {error}"
            return
        if self._process not in (listed := self._processes()):  # not yet, or not by this number
            self._process = self._grown(listed, device)

    def look(self) -> Look:
        """Looks, and remembers."""
        held_down = int(self._read("nvmlDeviceGetCurrentClocksThrottleReasons").value or 0)
        processes = self._processes()
        found = Look(
            self._read("nvmlDeviceGetMemoryInfo", lambda info: info.used),
            self._own(processes),
            frozenset(reason for bit, reason in HELD_DOWN.items() if held_down & bit),
            len(processes),
        )
        self.looks.append(found)
        return found

    def joules(self) -> Reading:
        """Energy that the whole device has taken since its driver was loaded."""
        return self._read("nvmlDeviceGetTotalEnergyConsumption", lambda millijoules: millijoules / 1000)

    @contextmanager
    def watched(self, every_seconds: float = 0.2) -> Iterator[None]:
        """Looks now and then from a thread of its own; not for what is timed."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(every_seconds):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _read(self, function: str, value: Callable[[Any], float] = float) -> Reading:
        if self.missing:
            return Reading(None, self.missing)
        try:
            return Reading(value(getattr(self._nvml, function)(self._gpu)))
        except self._errors as error:
            return Reading(None, f"NVML does not say: {error}")

    def _processes(self) -> dict[int, int | None]:
        """Number of each process that computes there -> its bytes, where NVML tells them."""
        if self.missing:
            return {}
        try:
            listed = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu)
        except self._errors:
            return {}
        return {process.pid: process.usedGpuMemory for process in listed}

    def _own(self, processes: Mapping[int, int | None]) -> Reading:
        if self.missing:
            return Reading(None, self.missing)
        if self._process not in processes:
            return Reading(None, "NVML does not list this process; in a container it often cannot")
        used = processes[self._process]
        return Reading(used, "" if used is not None else "NVML does not say what each process holds")

    def _grown(self, before: Mapping[int, int | None], device: torch.device) -> int:
        """The process that grows when this one does: inside a container it has another number. 0 where none does."""
        try:
            torch.cuda.empty_cache()
            probe = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return 0
        after = self._processes()
        del probe
        torch.cuda.empty_cache()
        grown = [pid for pid, used in after.items() if (used or 0) - (before.get(pid) or 0) >= PROBE_BYTES // 2]
        return grown[0] if len(grown) == 1 else 0


def driver_version() -> str:
    """Of NVIDIA's driver. DeviceError where NVML does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
        version: str = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise DeviceError(str(error)) from error
    return version


def _handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device, by what never changes; CUDA counts devices in another order."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
