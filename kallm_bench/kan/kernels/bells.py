"""One function of a local family by its number: all of them are the same bell, each around its own centre.

`local` computes the few functions that differ from zero at x, all together. Here the number is given, a kernel may be
at any function, and what lies far away comes out as 0: a product that needs a tile of one function's values takes them
from here, without the others.

On a uniform grid of steps h a B-spline of order p is a sum of truncated powers of the distance d from its centre,

    B(d) = 1/p! Σ_j (-1)^j C(p+1, j) max((p+1)/2 - j - |d|, 0)^p,   d = (t - centre) / h,

over the j with (p+1)/2 > j: two of them for orders 2 and 3. Higher orders take more and lose digits, so they are left
to `local`. It holds wherever t is on the grid. A Gaussian is exp(-d²).

Source: Schoenberg 1946, "Contributions to the problem of approximation of equidistant data", Quart. Appl. Math. 4.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from kallm_bench.kan.kernels.device import INTERPRETED
from kallm_bench.kan.kernels.families import Family

ORDERS = (2, 3)
"""Of the splines that have a bell."""
WEIGHTS: tl.constexpr = tl.constexpr(
    tuple(
        tuple((-1) ** j * math.comb(order + 1, j) / math.factorial(order) for j in range((order + 2) // 2))
        for order in range(4)
    )
)
"""Of the truncated powers, by order and j."""


class Bell(NamedTuple):
    """Where a family's functions lie: function k at distance d = t · steps + zero - k from its centre.

    Args:
        order: of a B-spline's pieces, 2 or 3; 0 for a Gaussian.
        steps: centres to a unit of t.
        zero: the number, maybe a half one, that a function with its centre at t = 0 would have.
    """

    order: int
    steps: float
    zero: float


def bell(family: Family) -> Bell | None:
    """A family's bell; None where it has none that holds everywhere.

    A spline of order 1 has kinks, where which side's slope counts is decided by the interval. Beyond the grid, where
    only a squash keeps t from going, the reference's splines go on as the polynomials of the last interval.
    """
    if family.kind == "rbf":
        last = family.numbers[0] - 1
        return Bell(0, last / 4, last / 2)
    if family.kind == "bspline" and family.numbers[1] in ORDERS and family.squash == "tanh":
        grid, order = family.numbers
        return Bell(int(order), grid / 2, (grid + order - 1) / 2)
    return None


@triton.jit
def distance(t, k, STEPS: tl.constexpr, ZERO: tl.constexpr):
    """How many steps t lies beyond the centre of function k, rounded once: as exact as t is, however fine the grid."""
    if INTERPRETED:  # whose numbers know no fused multiply-add
        return (t.to(tl.float64) * STEPS + (ZERO - k)).to(tl.float32)
    else:
        return t * STEPS + (ZERO - k)


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    if EXPONENT == 1:
        return base
    else:
        return base * _power(base, EXPONENT - 1)


@triton.jit
def value_at(d, ORDER: tl.constexpr):
    """The bell at distance d. Not a number stays so."""
    if ORDER == 0:
        return tl.exp2(d * (d * -1.4426950408889634))  # log2(e)
    else:
        near = tl.maximum((ORDER + 1) / 2 - tl.abs(d), 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = WEIGHTS[ORDER][0] * _power(near, ORDER)
        for j in tl.static_range(1, (ORDER + 2) // 2):
            near = tl.maximum((ORDER + 1) / 2 - j - tl.abs(d), 0.0)
            total += WEIGHTS[ORDER][j] * _power(near, ORDER)
        return total


@triton.jit
def slope_at(d, ORDER: tl.constexpr, STEPS: tl.constexpr):
    """The bell's derivative by t at distance d."""
    if ORDER == 0:
        return (-2.0 * STEPS) * d * value_at(d, 0)
    else:
        near = tl.maximum((ORDER + 1) / 2 - tl.abs(d), 0.0, propagate_nan=tl.PropagateNan.ALL)
        total = WEIGHTS[ORDER][0] * _power(near, ORDER - 1)
        for j in tl.static_range(1, (ORDER + 2) // 2):
            near = tl.maximum((ORDER + 1) / 2 - j - tl.abs(d), 0.0)
            total += WEIGHTS[ORDER][j] * _power(near, ORDER - 1)
        return tl.where(d < 0, ORDER * STEPS, -ORDER * STEPS) * total


@triton.jit
def through_squash(t, gradient, SQUASH: tl.constexpr):
    """dL/dx from t = squash(x) and dL/dt."""
    if SQUASH == "tanh":
        gradient *= 1 - t * t
    elif SQUASH == "sigmoid":
        gradient *= t * (1 - t)
    return gradient
