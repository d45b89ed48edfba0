"""One function of a local family by its number, against scipy and numpy, and against what `local` computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE
from scipy.interpolate import BSpline
from torch import Tensor

from kallm_bench.kan.kernels.bells import ORDERS, bell, distance, slope_at, value_at
from kallm_bench.kan.kernels.families import Family

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@triton.jit
def _all_functions(t_ptr, values_ptr, slopes_ptr, N, K, ORDER: tl.constexpr, STEPS: tl.constexpr, ZERO: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    at = tl.arange(0, BLOCK)
    t = tl.load(t_ptr + at, mask=at < N, other=0.0)
    for k in range(K):
        d = distance(t, k, STEPS, ZERO)
        tl.store(values_ptr + k * N + at, value_at(d, ORDER), mask=at < N)
        tl.store(slopes_ptr + k * N + at, slope_at(d, ORDER, STEPS), mask=at < N)


def all_functions(t: Tensor, family: Family) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) the values, and (K, N) the derivatives, of every function at t (N,)."""
    shape = bell(family)
    assert shape
    values = torch.full((family.functions, len(t)), torch.nan, device=DEVICE)
    slopes = values.clone()
    size = triton.next_power_of_2(len(t))
    _all_functions[(1,)](t.float().to(DEVICE), values, slopes, len(t), family.functions, *shape, BLOCK=size)
    return values.cpu().double().numpy(), slopes.cpu().double().numpy()


def points(reach: float, seed: int = 0) -> Tensor:
    """Even ones, which lie on knots and on centres, and others, all within reach."""
    random = 2 * torch.rand(191, generator=torch.Generator().manual_seed(seed)) - 1
    return torch.cat([torch.linspace(-1, 1, 41), random]) * reach


@pytest.mark.parametrize("grid", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("order", ORDERS)
def test_splines_are_those_of_scipy(grid: int, order: int) -> None:
    t = points(1)
    values, slopes = all_functions(t, Family("bspline", (grid, order), "tanh"))
    knots = -1 + 2 / grid * np.arange(-order, grid + order + 1)
    splines = [BSpline.basis_element(knots[k : k + order + 2], extrapolate=False) for k in range(grid + order)]
    where = t.double().numpy()
    assert np.abs(values - np.nan_to_num([spline(where) for spline in splines])).max() < 1e-6
    steep = np.nan_to_num([spline.derivative()(where) for spline in splines])
    assert np.abs(slopes - steep).max() < 2e-6 * grid  # as steep as the grid is fine
    assert np.abs(values.sum(axis=0) - 1).max() < 1e-6


@pytest.mark.parametrize("centers", [2, 5, 8, 50])
def test_gaussians_are_those_of_the_formula(centers: int) -> None:
    t = points(6)
    values, slopes = all_functions(t, Family("rbf", (centers,), "none"))
    z = (t.double().numpy() - np.linspace(-2, 2, centers)[:, None]) * (centers - 1) / 4
    assert np.abs(values - np.exp(-(z**2))).max() < 1e-6
    assert np.abs(slopes + 2 * z * np.exp(-(z**2)) * (centers - 1) / 4).max() < 2e-6 * centers


@pytest.mark.parametrize("family", [Family("bspline", (5, 3), "tanh"), Family("rbf", (8,), "none")])
def test_what_is_no_number_stays_so_and_what_is_far_is_nothing(family: Family) -> None:
    values, slopes = all_functions(torch.tensor([torch.nan, 1e4, -1e4, 1.0]), family)
    assert np.isnan(values[:, 0]).all()
    assert np.isnan(slopes[:, 0]).all()
    assert not values[:, 1:3].any()
    assert not slopes[:, 1:3].any()


@pytest.mark.parametrize(
    "family",
    [
        Family("polynomial", (1.0, 2.0, 0.0, 0.0), "tanh"),
        Family("bspline", (5, 1), "tanh"),  # has kinks
        Family("bspline", (5, 4), "tanh"),  # would lose digits
        Family("bspline", (5, 3), "none"),  # goes on beyond the grid
    ],
)
def test_others_have_no_bell(family: Family) -> None:
    assert bell(family) is None
