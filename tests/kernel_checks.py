"""How kernels are tested: as exact as plain PyTorch, in memory that was not cleared, on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the kernels run in Triton's interpreter; conftest.py sees to it."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uncleared is full of NaN here, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_as_exact(
    truth: dict[str, Tensor], reference: dict[str, Tensor], kernel: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """The kernel may be twice as wrong as PyTorch is in `dtype`, and a few roundings of the largest value more."""
    assert truth.keys() == reference.keys() == kernel.keys()
    for what, true in truth.items():
        rounding = 4 * torch.finfo(dtype).eps * true.abs().max()
        allowed = 2 * (reference[what].double() - true).abs().max() + rounding
        error = (kernel[what].double() - true).abs().max()
        assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}"  # NaN fails too
