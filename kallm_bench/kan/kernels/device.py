"""Where kernels can run: on an NVIDIA GPU, or anywhere in Triton's interpreter, which tests use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether TRITON_INTERPRET=1 was set when Triton was imported. The interpreter runs a program at a time, in NumPy."""


def runs_on(device: torch.device) -> bool:
    """Whether a kernel can run on tensors of this device: an NVIDIA GPU from Ampere on, or the interpreter's."""
    if device.type != "cuda":
        return bool(INTERPRETED.value)
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. The interpreter knows bfloat16 only as bits, so there the operands are widened first."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
