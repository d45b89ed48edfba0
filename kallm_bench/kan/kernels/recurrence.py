"""What happens to one value: the squash, and the polynomials of a three-term recurrence with their slopes.

P_0 = FIRST, P_{n+1} = (A_n t + B_n) P_n - C_n P_{n-1} with t = squash(x). R holds (A_n, B_n, C_n) for n = 0, 1, .. and
is known when a kernel is compiled, so that every family becomes the few multiply-adds that it needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from kallm_bench.kan.kernels.device import INTERPRETED


@triton.jit
def _fast_tanh(x):
    """The GPU's own tanh, to 11 bits: one instruction, where exp and a division are twenty."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _tanh(x, BITS: tl.constexpr):
    if INTERPRETED:
        x = 2 * tl.sigmoid(2 * x) - 1
    elif BITS <= 8:
        x = _fast_tanh(x)
    elif BITS <= 11:
        x = 2 * tl.sigmoid(2 * x) - 1
    else:
        x = libdevice.tanh(x)
    return x


@triton.jit
def _sigmoid(x, BITS: tl.constexpr):
    if INTERPRETED:
        x = tl.sigmoid(x)
    elif BITS <= 8:
        x = 0.5 * _fast_tanh(0.5 * x) + 0.5
    elif BITS <= 11:
        x = tl.sigmoid(x)
    else:
        x = tl.div_rn(1.0, 1.0 + libdevice.exp(-x))
    return x


@triton.jit
def squashed(x, SQUASH: tl.constexpr, BITS: tl.constexpr):
    """SQUASH of float32 x, as exactly as a dtype of so many significant bits can tell."""
    if SQUASH == "tanh":
        x = _tanh(x, BITS)
    elif SQUASH == "sigmoid":
        x = _sigmoid(x, BITS)
    return x


@triton.jit
def following(t, value, before, n: tl.constexpr, R: tl.constexpr):
    """P_{n+1} from P_n and P_{n-1}."""
    return (R[n][0] * t + R[n][1]) * value - R[n][2] * before


@triton.jit
def through_slopes(t, zeros, gradients, FIRST: tl.constexpr, R: tl.constexpr, SQUASH: tl.constexpr):
    """dL/dx from t = squash(x) and `gradients`, a tuple of dL/dP_1, dL/dP_2, ..: Σ_n gradients[n] P'_{n+1}(t) dt/dx.

    `zeros` is a tensor like t of nothing else, which Triton and Gluon make each in its own way.
    """
    before = zeros
    value = before + FIRST
    slope_before = before
    slope = before
    total = before
    for n in tl.static_range(len(R)):
        slope_after = R[n][0] * value + (R[n][0] * t + R[n][1]) * slope - R[n][2] * slope_before
        after = following(t, value, before, n, R)
        before = value
        value = after
        slope_before = slope
        slope = slope_after
        total += gradients[n] * slope
    if SQUASH == "tanh":
        total *= 1 - t * t
    elif SQUASH == "sigmoid":
        total *= t * (1 - t)
    return total
