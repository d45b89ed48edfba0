"""Whether a model fits the device at hand, said before it is tried."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

from kallm_bench.errors import DeviceError
from kallm_bench.profiling.flops import cache_bytes
from kallm_bench.profiling.memory import give_back
from kallm_bench.profiling.settings import ProfileSettings

ADAM_BYTES = 12
"""A learning parameter's gradient and AdamW's two moments, in float32."""


def too_large(needed: int, device: torch.device) -> str:
    """Why so many bytes more do not fit the device; empty where they do."""
    if needed <= _memory(device)[0]:
        return ""
    give_back(device)  # takes its time, and so is left until it matters
    free, there = _memory(device)
    if needed <= free:
        return ""
    where = "GPU" if device.type == "cuda" else "machine"
    room = f"the {where} has {_gib(free)} free of {_gib(there)}"
    return f"predicted not to fit: {_gib(needed)} and activations, and {room}"


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes free and in all."""
    if device.type == "cuda":
        free, there = torch.cuda.mem_get_info(device)
        return free, there
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def check_room(
    names: list[str], skeletons: list[PreTrainedModel], settings: ProfileSettings, device: torch.device
) -> None:
    """Refuses models whose weights, all of them at once, and largest cache would not fit the device.

    Args:
        skeletons: the models without values, in the dtype they are served in.

    Raises:
        DeviceError: says what they need, what there is, and what to try.
    """
    largest = max(point.batch * point.length for point in settings.points)
    needed = sum(parameter_bytes(each) for each in skeletons)
    needed += max(largest * cache_bytes(each.config, each.dtype) for each in skeletons)
    if reason := too_large(needed, device):
        other = "--device cpu, a smaller model" if device.type == "cuda" else "a smaller model"
        dtype = "--dtype bfloat16, " if skeletons[0].dtype == torch.float32 else ""
        raise DeviceError(f"{' and '.join(names)}: {reason}; take {dtype}{other}, or a smaller --batch and --length")


def parameter_bytes(model: PreTrainedModel, dtype: torch.dtype | None = None) -> int:
    """What all values of a model take, tied ones once; in `dtype` if they were stored in that."""
    return sum(each.numel() * (dtype or each.dtype).itemsize for each in model.parameters())


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
