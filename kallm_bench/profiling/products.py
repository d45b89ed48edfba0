"""How fast a device multiplies matrices, found by trying."""

from __future__ import annotations

import functools
import time

import torch

from kallm_bench.profiling.memory import give_back

LARGE = {"cuda": 8192, "cpu": 2048}
"""Rows and columns of a large product: launching it on a GPU should take no part of its time."""

LONG_PRODUCT_SECONDS = 0.1
"""A product that takes so long tells as much as a larger one; less may be a wait for a core that others keep busy."""

PATIENCE_SECONDS = 1.0
"""So long is a product tried that takes longer, for that may be a wait too."""


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large product of two matrices; of a smaller one where that takes long, as in a slow dtype."""
    size, best = LARGE[device.type] // 8, 0.0
    while size <= LARGE[device.type]:
        left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        seconds: list[float] = []
        while len(seconds) < 4 or (min(seconds) > LONG_PRODUCT_SECONDS and sum(seconds) < PATIENCE_SECONDS):
            seconds.append(_product_seconds(left, right))
        best = max(best, 2 * size**3 / min(seconds))
        if min(seconds) > LONG_PRODUCT_SECONDS:
            break
        size *= 2
    del left, right
    give_back(device)  # what the allocator keeps would count as the next stage's
    return best


def _product_seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    began = time.perf_counter()
    (left @ right)[0, 0].item()
    return time.perf_counter() - began
