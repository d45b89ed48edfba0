"""Peak memory of a piece of work: the process's on a CPU, the tensors' and the allocator's on a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kallm_bench.records import Metric

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[Metric]]:
    """Yields a list that holds the metrics of peak memory when the block is left."""
    metrics: list[Metric] = []
    _give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield metrics
        metrics.append(Metric("peak_vram_allocated_bytes", torch.cuda.max_memory_allocated(device)))
        metrics.append(Metric("peak_vram_reserved_bytes", torch.cuda.max_memory_reserved(device)))
        return
    reset = _reset_peak()
    yield metrics
    peak = _peak_resident_bytes()
    note = "" if reset else "since the process began: this system cannot reset its peak"
    metrics.append(Metric("peak_resident_bytes", peak, note=note if peak else "this system does not say"))


def _give_back(device: torch.device) -> None:
    """Returns what earlier work has freed and the allocators still hold, so that a peak is that of this work."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Linux forgets a process's peak when 5 is written to its clear_refs."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak_resident_bytes() -> int | None:
    if not _STATUS.is_file():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
