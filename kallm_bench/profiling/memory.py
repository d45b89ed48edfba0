"""Peak memory of a piece of work: the process's on a CPU; on a GPU four figures, each holding more than the last.

Tensors are allocated; the allocator reserves more than they take, and keeps it; the process has the CUDA context and
libraries beside; the device has other processes too. The first two are peaks that PyTorch knows. NVML tells the others
of a moment alone: they are the largest of the moments it was asked in, after every run of what is measured, when the
allocator still holds what that run has needed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kallm_bench.profiling.hardware import Gpu
from kallm_bench.records import Metric

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@contextmanager
def peak_memory(device: torch.device, gpu: Gpu | None = None, part: str = "") -> Iterator[list[Metric]]:
    """Yields a list that holds the metrics of peak memory when the block is left.

    Args:
        gpu: where it is looked at in the block, what NVML says is among them.
        part: stands after the metrics' names, "/prefill".
    """
    metrics: list[Metric] = []
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        begin = len(gpu.looks) if gpu else 0
        yield metrics
        metrics.append(Metric(f"peak_vram_allocated_bytes{part}", torch.cuda.max_memory_allocated(device)))
        metrics.append(Metric(f"peak_vram_reserved_bytes{part}", torch.cuda.max_memory_reserved(device)))
        if gpu:
            gpu.look()
            metrics += _seen(gpu, begin, part)
        return
    reset = _reset_peak()
    yield metrics
    peak = _peak_resident_bytes()
    note = "" if reset else "since the process began: this system cannot reset its peak"
    metrics.append(Metric(f"peak_resident_bytes{part}", peak, note=note if peak else "this system does not say"))


def _seen(gpu: Gpu, begin: int, part: str) -> list[Metric]:
    """The largest of what NVML said since a look, or why it did not."""
    found = []
    for way, readings in (
        ("process", [look.process_bytes for look in gpu.looks[begin:]]),
        ("device", [look.device_bytes for look in gpu.looks[begin:]]),
    ):
        most = max((reading.value for reading in readings if reading.value is not None), default=None)
        reason = readings[-1].reason if most is None else ""
        found.append(Metric(f"peak_vram_{way}_bytes{part}", most, n=len(readings), note=reason))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def suppressed_lack() -> Iterator[None]:
    """Ends where memory runs out; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """While inside, garbage is looked for among what was made inside alone; what is garbage already goes before.

    Libraries bring millions of objects that stay as long as the process, and each look at them takes half a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back(device: torch.device) -> None:
    """Returns what earlier work has freed and the allocators still hold, so that a peak is that of this work.

    What refers to itself in a circle is freed here first: a model with hooks, an optimiser's closure, a graph.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def begin_anew(device: torch.device) -> None:
    """Returns what earlier work in this process still holds, so that no cell's memory depends on the one before.

    Besides what `give_back` returns, the room that cuBLAS keeps for every stream it was called on: 32 MiB each. Graphs
    that were recorded before must not be replayed after.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
    give_back(device)


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
