"""Every registered basis: its values against an independent formula, its gradients, its range, its refusals."""

import numpy as np
import pytest
import torch
from basis_oracles import ORACLES

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, KANLinear, make_basis
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.kan.bases.base import DOMAINS

ALL = sorted(BASES)
WITH_DEGREE = [name for name in ALL if "degree" in BASES[name].arguments()]
DEGREES = (1, 2, 3, 5, 8)
TRIED = [(name, arguments) for name in ALL for arguments in ({}, *(ORACLES[name].others if name in ORACLES else ()))]


def limit_of(name, **arguments):
    """The family's numerically safe degree."""
    for degree in range(16, 0, -1):
        try:
            make_basis(name, degree=degree, **arguments)
        except SpecError:
            continue
        return degree
    raise AssertionError(name)


def highest(name, degree=8, **arguments):
    """The basis at a high degree, where its family has degrees; bound to its fewest channels."""
    if name in WITH_DEGREE:
        arguments["degree"] = min(degree, limit_of(name, **arguments))
    basis = make_basis(name, **arguments)
    return basis.bound(basis.groups or 1)


def on_channels(basis, x):
    """x (..., 1) on as many channels as the basis has groups."""
    return x.expand(*x.shape[:-1], basis.groups or 1)


def points_of(basis):
    return np.linspace(*DOMAINS[basis.squash], 101)


def test_every_basis_has_an_oracle():
    missing = sorted(set(BASES) - set(ORACLES))
    assert not missing, f"add to tests/basis_oracles.py how to compute {missing} some other way"
    assert set(ORACLES) == set(BASES)


@pytest.mark.parametrize(("name", "arguments"), TRIED, ids=str)
@pytest.mark.parametrize("degree", DEGREES)
def test_values(name, arguments, degree):
    if name not in WITH_DEGREE and degree > 1:
        pytest.skip("has no degree")
    if name not in ORACLES:
        pytest.skip("has no oracle yet, as another test says")
    basis, x = highest(name, degree, **arguments).double(), points_of(make_basis(name, **arguments))
    basis.reset_parameters()  # in float64 from the beginning
    values = basis(on_channels(basis, torch.from_numpy(x)[:, None]))[..., 0].detach().numpy()  # (points, K)
    given = {key: parameter.default for key, parameter in BASES[name].arguments().items()} | arguments
    if name in WITH_DEGREE:
        given["degree"] = basis.size - 1
    for k in range(basis.size):
        true = ORACLES[name].values(k, x, **given)
        error = np.abs(values[:, k] - true).max()
        allowed = 1e-12 * np.abs(true).max()
        assert error <= allowed, f"B_{k}: off by {error:.1e}, allowed {allowed:.1e}"


@pytest.mark.parametrize(("name", "arguments"), TRIED, ids=str)
def test_gradients_match_finite_differences(name, arguments):
    basis = highest(name, **arguments).double()
    low, high = DOMAINS[basis.squash]
    points = torch.linspace(0.97 * low + 0.013, 0.97 * high, 12, dtype=torch.float64)[:, None]
    x = on_channels(basis, points).clone().requires_grad_()
    assert torch.autograd.gradcheck(basis, x)
    for parameter in basis.parameters():
        assert torch.autograd.gradcheck(lambda _: basis(x.detach()), parameter)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 2, 3), (0, 3)], ids=str)
def test_shape(name, dtype, shape):
    basis = make_basis(name)
    channels = basis.groups or shape[-1]
    shape = (*shape[:-1], channels)
    basis = basis.bound(channels)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(dtype)
    values = basis(x)
    assert values.shape == (*shape[:-1], basis.size, shape[-1])
    assert values.dtype == dtype
    for channel in range(channels):  # each is a function of its own channel alone
        others = x.clone()
        others[..., [other for other in range(channels) if other != channel]] = 0.25
        assert torch.equal(values[..., channel], basis(others)[..., channel])


@pytest.mark.parametrize("name", WITH_DEGREE)
@pytest.mark.parametrize("degree", DEGREES)
def test_size_of_a_degree(name, degree):
    degree = min(degree, limit_of(name))
    assert make_basis(name, degree=degree).size == degree + 1


@pytest.mark.parametrize("name", [name for name in ALL if BASES[name].constant])
def test_the_constant_function_is_constant(name):
    basis = make_basis(name)
    first = basis(torch.from_numpy(points_of(basis))[:, None])[:, 0]
    assert torch.equal(first, first[:1].expand_as(first))
    assert first[0] != 0


EXTREMES = torch.cat([-torch.logspace(-4, 4, 50), torch.zeros(1), torch.logspace(-4, 4, 50)])


@pytest.mark.parametrize(("name", "arguments"), TRIED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_inputs_keep_values_and_slopes_finite(name, arguments, dtype):
    basis = highest(name, degree=16, **arguments).to(dtype)
    if basis.squash == "norm":  # one token with all of them; else one each
        x = EXTREMES[None].to(dtype).requires_grad_()
    else:
        x = on_channels(basis, EXTREMES[:, None]).to(dtype).clone().requires_grad_()
    values = basis(SQUASHES[basis.squash](x))
    assert values.isfinite().all()
    for k in range(basis.size):
        (slopes,) = torch.autograd.grad(values[..., k, :].sum(), x, retain_graph=True)
        assert slopes.isfinite().all(), k
    assert x.grad_fn is None


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_inputs_keep_a_layer_finite(name, dtype):
    basis = highest(name)
    channels = len(EXTREMES) if basis.squash == "norm" else basis.groups or 1
    layer = KANLinear(channels, 3, basis).to(dtype)
    x = EXTREMES[None] if basis.squash == "norm" else on_channels(basis, EXTREMES[:, None])
    x = x.to(dtype).clone().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.float().mean(), x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert (dx != 0).any()


@pytest.mark.parametrize("name", sorted(SQUASHES))
def test_a_squash_sees_one_token_at_a_time(name):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    whole = SQUASHES[name](x)
    changed = x.clone()
    changed[1, 2] = 7.0
    same = torch.ones(3, 5, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(SQUASHES[name](changed)[same], whole[same])
    assert torch.equal(SQUASHES[name](x[1:2, 2:3])[0, 0], whole[1, 2])


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
        ("gegenbauer:lam=0", "lam = 0 makes all but the constant vanish"),
        ("gegenbauer:lam=1e-200", "makes all but the constant vanish"),
        ("charlier:a=1e-320", "numerically safe limit is 0"),
        ("jacobi:a=-1", "a must be a number above -1"),
        ("hermite:degree=9", "safe limit is 8"),
        ("krawtchouk:n=3,degree=4", "safe limit is 3"),
        ("bspline:order=9", "order must be a whole number from 1 to 5"),
        ("rational:numerator=6", "may exceed denominator 4 by 1"),
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
