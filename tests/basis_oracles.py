"""Every basis's functions a second time, by another road: scipy, numpy, a closed form or an explicit sum.

None of these is a recurrence of ours. An oracle takes the number of the function, the points as the basis gets them,
and the family's arguments under their public names.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb, factorial, prod
from typing import NamedTuple

import numpy as np
from scipy import interpolate, special


class Oracle(NamedTuple):
    """`values(k, x, **arguments)` is B_k(x). `others`: arguments beside the defaults that the tests try."""

    values: Callable[..., np.ndarray]
    others: tuple[dict[str, float], ...] = ()
    source: str = "scipy.special"


def third_kind(k, x, degree):
    """cos (k+½)θ / cos ½θ with x = cos θ; its limit at x = -1."""
    half = np.arccos(x) / 2
    limit = np.full_like(x, (-1) ** k * (2 * k + 1))
    return np.divide(np.cos((2 * k + 1) * half), np.cos(half), out=limit, where=x > -1)


def fourth_kind(k, x, degree):
    """sin (k+½)θ / sin ½θ with x = cos θ; its limit at x = 1."""
    half = np.arccos(x) / 2
    limit = np.full_like(x, 2 * k + 1)
    return np.divide(np.sin((2 * k + 1) * half), np.sin(half), out=limit, where=x < 1)


def bessel(k, x, degree):
    return sum(factorial(k + j) / (factorial(k - j) * factorial(j)) * (x / 2) ** j for j in range(k + 1))


def fibonacci(k, x, degree):
    return sum(comb(k - j, j) * x ** (k - 2 * j) for j in range(k // 2 + 1))


def lucas(k, x, degree):
    if k == 0:
        return np.full_like(x, 2.0)
    return sum(k / (k - j) * comb(k - j, j) * x ** (k - 2 * j) for j in range(k // 2 + 1))


@np.vectorize(excluded=["above", "below", "k"])
def hypergeometric(x, *, above, below, z, k):
    """The sum over j = 0 .. k of Π(above)_j / Π(below)_j z^j / j!, by rising factorials, in exact fractions.

    An entry of `above` may be a function of x. Its terms alternate and are large: in floats they would lose the digits.
    """
    total, term = Fraction(0), Fraction(1)
    tops = [Fraction(a(Fraction(float(x))) if callable(a) else a) for a in above]
    bottoms = [Fraction(b) for b in below]
    for j in range(k + 1):
        total += term
        term *= prod((a + j for a in tops), start=Fraction(z)) / (j + 1)
        term /= prod((b + j for b in bottoms), start=Fraction(1)) or 1
    return float(total)


def charlier(k, x, degree, a):
    return hypergeometric(x, above=[-k, lambda x: -x], below=[], z=-1 / Fraction(a), k=k)


def meixner(k, x, degree, beta, c):
    return hypergeometric(x, above=[-k, lambda x: -x], below=[beta], z=1 - 1 / Fraction(c), k=k)


def krawtchouk(k, x, degree, p, n):
    return hypergeometric(x, above=[-k, lambda x: -n * x], below=[-n], z=1 / Fraction(p), k=k)


def hahn(k, x, degree, alpha, beta, n):
    above = [-k, k + Fraction(alpha) + Fraction(beta) + 1, lambda x: -n * x]
    return hypergeometric(x, above=above, below=[Fraction(alpha) + 1, -n], z=1, k=k)


def bernstein(k, x, degree):
    return interpolate.BPoly(np.eye(degree + 1)[k][:, None], [0, 1])(x)


def bspline(k, x, grid, order):
    width = 2 / grid
    knots = -1 + width * (np.arange(k - order, k + 2))
    values = interpolate.BSpline.basis_element(knots, extrapolate=False)(x)
    at_end = np.isclose(x, 1) & (k >= grid)  # scipy's elements are open on the right, ours are closed at 1
    inside = interpolate.BSpline.basis_element(knots, extrapolate=True)(np.full_like(x, 1 - 1e-15))
    return np.where(at_end, inside, np.nan_to_num(values))


def rbf(k, x, centers):
    return np.exp(-(((x - np.linspace(-2, 2, centers)[k]) * (centers - 1) / 4) ** 2))


def fourier(k, x, frequencies):
    return np.cos((k + 1) * x) if k < frequencies else np.sin((k + 1 - frequencies) * x)


def relu(k, x, grid, span):
    start, end = (k - span) / grid, (k - span) / grid + (span + 1) / grid
    return (4 * grid**2 / (span + 1) ** 2 * np.maximum(x - start, 0) * np.maximum(end - x, 0)) ** 2


def wavelet(mother):
    return lambda k, x, wavelets: mother(x - np.linspace(-2 + 2 / wavelets, 2 - 2 / wavelets, wavelets)[k])


def rational(absolute):
    """By numpy's polynomials, on the coefficients that the basis starts from."""
    from kallm_bench.kan.bases.rational import fitted

    def values(k, x, numerator, denominator, groups):
        above, below, _ = fitted("rational-abs" if absolute else "rational", "silu", numerator, denominator)
        below = [0.0, *np.abs(below)] if absolute else [0.0, *below]
        divisor = np.polynomial.Polynomial(below)(np.abs(x) if absolute else x)
        return np.polynomial.Polynomial(above)(x) / (1 + np.abs(divisor))

    return values


ORACLES = {
    "cheby1": Oracle(lambda k, x, degree: special.eval_chebyt(k, x)),
    "cheby2": Oracle(lambda k, x, degree: special.eval_chebyu(k, x)),
    "cheby3": Oracle(third_kind, source="half angles"),
    "cheby4": Oracle(fourth_kind, source="half angles"),
    "legendre": Oracle(lambda k, x, degree: special.eval_legendre(k, x)),
    "hermite": Oracle(lambda k, x, degree: special.eval_hermite(k, x)),
    "hermite-e": Oracle(lambda k, x, degree: special.eval_hermitenorm(k, x)),
    "laguerre": Oracle(lambda k, x, degree, alpha: special.eval_genlaguerre(k, alpha, x), ({"alpha": 1.7},)),
    "gegenbauer": Oracle(
        lambda k, x, degree, lam: special.eval_gegenbauer(k, lam, x), ({"lam": 0.3}, {"lam": -0.2}, {"lam": 2.5})
    ),
    "jacobi": Oracle(
        lambda k, x, degree, a, b: special.eval_jacobi(k, a, b, x), ({"a": 0.3, "b": -0.5}, {"a": -0.5, "b": -0.5})
    ),
    "bessel": Oracle(bessel, source="explicit sum"),
    "fibonacci": Oracle(fibonacci, source="explicit sum"),
    "lucas": Oracle(lucas, source="explicit sum"),
    "charlier": Oracle(charlier, ({"a": 2.5},), "2F0 sum"),
    "meixner": Oracle(meixner, ({"beta": 2.5, "c": 0.3},), "2F1 sum"),
    "krawtchouk": Oracle(krawtchouk, ({"p": 0.3, "n": 9},), "2F1 sum"),
    "hahn": Oracle(hahn, ({"alpha": 0.5, "beta": 1.5, "n": 9}, {"alpha": -0.5, "beta": -0.5}), "3F2 sum"),
    "bernstein": Oracle(bernstein, source="scipy BPoly"),
    "bspline": Oracle(
        bspline, ({"grid": 1, "order": 3}, {"grid": 12, "order": 1}, {"grid": 200, "order": 5}), "scipy BSpline"
    ),
    "rbf": Oracle(rbf, ({"centers": 5},), "closed form"),
    "rational": Oracle(rational(False), ({"numerator": 3, "denominator": 2},), "numpy Polynomial"),
    "rational-abs": Oracle(rational(True), ({"numerator": 3, "denominator": 2},), "numpy Polynomial"),
    "fourier": Oracle(fourier, ({"frequencies": 7},), "numpy"),
    "mexican-hat": Oracle(
        wavelet(lambda z: 2 / (np.sqrt(3) * np.pi**0.25) * (1 - z**2) * np.exp(-(z**2) / 2)), source="closed form"
    ),
    "dog": Oracle(wavelet(lambda z: -z * np.exp(-(z**2) / 2)), ({"wavelets": 7},), "closed form"),
    "morlet": Oracle(wavelet(lambda z: np.cos(5 * z) * np.exp(-(z**2) / 2)), source="closed form"),
    "relu": Oracle(relu, ({"grid": 8, "span": 2},), "numpy"),
    "sinc": Oracle(lambda k, x, points: np.sinc((x - (k - points) / points) * points), ({"points": 6},), "numpy sinc"),
}
