"""Every registered basis: its values against an independent formula, its gradients, its range, its refusals."""

import numpy as np
import pytest
import torch
from scipy import special

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, KANLinear, make_basis

POINTS = np.linspace(-1, 1, 101)

ALL = sorted(BASES)
WITH_DEGREE = [name for name in ALL if "degree" in BASES[name].arguments()]
DEGREES = (1, 2, 3, 5, 8)


def third_kind(k, x):
    """cos (k+½)θ / cos ½θ with x = cos θ; its limit at x = -1."""
    half = np.arccos(x) / 2
    limit = np.full_like(x, (-1) ** k * (2 * k + 1))
    return np.divide(np.cos((2 * k + 1) * half), np.cos(half), out=limit, where=x > -1)


def fourth_kind(k, x):
    """sin (k+½)θ / sin ½θ with x = cos θ; its limit at x = 1."""
    half = np.arccos(x) / 2
    limit = np.full_like(x, 2 * k + 1)
    return np.divide(np.sin((2 * k + 1) * half), np.sin(half), out=limit, where=x < 1)


ORACLES = {  # (k, x) -> B_k(x)
    "cheby1": special.eval_chebyt,
    "cheby2": special.eval_chebyu,
    "cheby3": third_kind,
    "cheby4": fourth_kind,
    "legendre": special.eval_legendre,
}


def highest(name, degree=8):
    """The basis at a high degree, where its family has degrees."""
    return make_basis(name, degree=degree if name in WITH_DEGREE else None)


def test_every_basis_has_an_oracle():
    assert set(ORACLES) == set(BASES)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("degree", DEGREES)
def test_values(name, degree):
    basis = highest(name, degree)
    values = basis(torch.from_numpy(POINTS)[:, None])[..., 0].numpy()  # (points, K)
    for k in range(basis.size):
        true = ORACLES[name](k, POINTS)
        error = np.abs(values[:, k] - true).max()
        allowed = 1e-12 * np.abs(true).max()
        assert error <= allowed, f"B_{k}: off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize("name", ALL)
def test_gradients_match_finite_differences(name):
    x = torch.linspace(-0.97, 0.97, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(highest(name), x)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3), (0, 3)], ids=str)
def test_shape(name, dtype, shape):
    basis = make_basis(name)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(dtype)
    values = basis(x)
    assert values.shape == (*shape[:-1], basis.size, shape[-1])
    assert values.dtype == dtype
    for channel in range(shape[-1]):  # each is a function of its own channel alone
        assert torch.equal(values[..., channel], basis(x[..., channel : channel + 1])[..., 0])


@pytest.mark.parametrize("name", WITH_DEGREE)
@pytest.mark.parametrize("degree", DEGREES)
def test_size_of_a_degree(name, degree):
    assert make_basis(name, degree=degree).size == degree + 1


@pytest.mark.parametrize("name", [name for name in ALL if BASES[name].constant])
def test_the_constant_function_is_constant(name):
    first = make_basis(name)(torch.from_numpy(POINTS)[:, None])[:, 0]
    assert torch.equal(first, first[:1].expand_as(first))
    assert first[0] != 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_inputs_stay_finite(name, dtype):
    sizes = torch.logspace(-4, 4, 50)
    x = torch.cat([-sizes, torch.zeros(1), sizes])[:, None].to(dtype).requires_grad_()
    layer = KANLinear(1, 3, highest(name)).to(dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert (dx != 0).any()


@pytest.mark.parametrize("name", WITH_DEGREE)
@pytest.mark.parametrize("degree", [-1, 0, 17, 10**12])
def test_degree_out_of_range(name, degree):
    with pytest.raises(SpecError, match=rf"{name}.*degree.*{degree}"):
        make_basis(name, degree=degree)


def test_arguments_in_the_name():
    assert make_basis("cheby2:degree=3").size == 4
    assert make_basis("cheby2:degree=3", degree=None).size == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chebby2", "no basis 'chebby2'. Did you mean 'cheby2'?"),
        ("Legendre", "Did you mean 'legendre'?"),
        ("zzzz", "cheby1, cheby2, cheby3, cheby4"),
        ("", "There are:"),
        ("chebby2:degree=3", "Did you mean 'cheby2'?"),
        ("cheby2:degre=3", "no argument 'degre': it takes degree"),
        ("cheby2:degree", "'degree'"),
        ("cheby2:degree=", "'degree='"),
        ("cheby2:degree=two", "'degree=two'"),
        ("cheby2:3", "'3'"),
        ("cheby2:degree=2.5", "2.5"),
        ("cheby2:degree=1e400", "degree"),
        ("cheby2:degree=2,degree=3", "degree"),
    ],
)
def test_names_that_cannot_be(name, message):
    with pytest.raises(SpecError) as refused:
        make_basis(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_argument_given_twice():
    with pytest.raises(SpecError, match="degree is given twice, as 3 and as 4"):
        make_basis("cheby2:degree=3", degree=4)


def test_an_argument_that_no_family_takes():
    with pytest.raises(SpecError, match="no argument 'order': it takes degree"):
        make_basis("cheby2", order=4)
