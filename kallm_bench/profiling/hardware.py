"""The machine: what it is, what stays the same about it, and what is true of it now. The only importer of pynvml."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

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
    folder = Path(__file__).parent

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
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        facts["driver"] = pynvml.nvmlSystemGetDriverVersion()
        facts["clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
        facts["memory_clock_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
        facts["temperature_celsius"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        facts["nvml"] = str(error)
    return facts
