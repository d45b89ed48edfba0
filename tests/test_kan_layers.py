"""KANLinear and KANFeedForward: what they represent, how large they are, how they start, that they are good modules."""

import copy
import pickle

import pytest
import torch

from kallm_bench.errors import SpecError
from kallm_bench.kan import (
    BASES,
    CONSTANTS,
    FORMS,
    GroupKANLinear,
    KANFeedForward,
    KANLinear,
    ParallelKANLinear,
    kan_linear,
    make_basis,
)
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.kan.feedforward import ACTIVATIONS
from kallm_bench.kan.layers import make_layer as kan_layer

ALL = sorted(BASES)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_layer(name, constant="bias", in_features=8, out_features=5):
    """A layer of which every parameter is drawn, the bias too."""
    layer = KANLinear(in_features, out_features, name, constant=constant)
    layer.reset_parameters(torch.Generator().manual_seed(1))
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
    return layer


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_the_formula(name, constant):
    layer = make_layer(name, constant).double()
    x = normal(7, 8, dtype=torch.float64)
    squashed = SQUASHES[layer.basis.squash](x)
    values = layer.basis(squashed)  # (7, K, 8)
    offset = layer.basis.size - layer.coefficients.shape[1]
    for o in range(5):
        y = torch.zeros(7, dtype=torch.float64) if layer.bias is None else layer.bias[o].expand(7)
        for i in range(8):
            y = y + values[:, offset:, i] @ layer.coefficients[o, :, i]
        torch.testing.assert_close(layer(x)[:, o], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in ALL if BASES[name].constant])
def test_both_treatments_of_the_constant_represent_the_same_functions(name):
    x = normal(50, 8, dtype=torch.float64)
    edge, bias = make_layer(name, "edge").double(), make_layer(name, "bias").double()
    value = edge.basis(torch.zeros(1, dtype=torch.float64))[0, 0]

    folded = kan_linear(x, edge.coefficients[:, 1:], edge.basis, value * edge.coefficients[:, 0].sum(1))
    torch.testing.assert_close(folded, edge(x), rtol=1e-12, atol=1e-12)

    spread = (bias.bias / value / 8)[:, None, None].expand(5, 1, 8)  # an equal part on each edge
    unfolded = kan_linear(x, torch.cat([spread, bias.coefficients], dim=1), bias.basis)
    torch.testing.assert_close(unfolded, bias(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_layer_parameter_counts(name):
    size, constant = make_basis(name).size, BASES[name].constant
    counts = {kind: sum(p.numel() for p in KANLinear(8, 5, name, constant=kind).parameters()) for kind in CONSTANTS}
    own = sum(p.numel() for p in make_basis(name).bound(8).parameters())
    assert counts["bias"] == 5 * (size - constant) * 8 + 5 + own
    assert counts["edge"] == (5 * size * 8 if constant else counts["bias"])


@pytest.mark.parametrize(
    ("constant", "parameters"),
    [("edge", 1_327_104), ("bias", 2 * 576 * 384 * 2 + 384 + 576)],
)
def test_published_stack_parameter_counts(constant, parameters):
    with torch.device("meta"):
        stack = KANFeedForward(576, 384, "cheby2", degree=2, constant=constant)
    assert sum(p.numel() for p in stack.parameters()) == parameters


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_random_start_keeps_the_mean_square(name, constant, gain):
    x = normal(128, 576)
    generator = torch.Generator().manual_seed(3)
    layer = KANLinear(576, 1024, name, constant=constant)
    layer.reset_parameters(generator, gain)
    assert layer(x).square().mean().item() == pytest.approx(gain**2, rel=0.1)

    for form in FORMS:
        feedforward = KANFeedForward(576, 384, name, form=form, constant=constant)
        feedforward.reset_parameters(generator, gain)
        assert feedforward(x).square().mean().item() == pytest.approx(gain**2, rel=0.1), form


@pytest.mark.parametrize("name", ALL)
def test_each_basis_function_starts_with_an_equal_share(name):
    layer = KANLinear(576, 384, name)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    layer.bias.data.zero_()
    x, functions = normal(256, 576), layer.coefficients.shape[1]
    shares = []
    for k in range(functions):
        alone = copy.deepcopy(layer)
        alone.coefficients.data[:, [other for other in range(functions) if other != k]] = 0
        shares.append(alone(x).square().mean().item())
    assert shares == pytest.approx([1 / functions] * functions, rel=0.1)


def test_the_start_follows_its_generator():
    first, same, other = (KANFeedForward(8, 8, "cheby2") for _ in range(3))
    for stack, seed in ((first, 5), (same, 5), (other, 6)):
        stack.reset_parameters(torch.Generator().manual_seed(seed))
    for a, b, c in zip(first.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or not a.any()  # biases start at zero


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_can_learn(name, constant, form):
    feedforward = KANFeedForward(8, 8, name, form=form, constant=constant)
    feedforward.reset_parameters(torch.Generator().manual_seed(0))
    if form == "glu":  # it starts at zero, where what it multiplies cannot matter yet
        learned = feedforward.gate_function.coefficients
        torch.nn.init.normal_(feedforward.gate_function.basis.numerator if learned is None else learned)
    parameters = dict(feedforward.named_parameters())
    gradients = torch.autograd.grad(feedforward(normal(2000, 8)).square().mean(), list(parameters.values()))
    for what, gradient in zip(parameters, gradients, strict=True):
        assert gradient.isfinite().all(), what
        assert (gradient != 0).all(), what


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_rows_never_see_each_other(name, form):
    feedforward = KANFeedForward(8, 8, name, form=form)
    x = normal(8, 8)
    changed = x.clone()
    changed[5] = 1e4
    before, after = feedforward(x), feedforward(changed)
    others = [0, 1, 2, 3, 4, 6, 7]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[5], after[5])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(name, batch):
    layer = make_layer(name)
    x = normal(*batch, 8)
    y = layer(x)
    assert y.shape == (*batch, 5)
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 8)))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(name, dtype):
    """Rounding may cost what it costs a sum of that many terms, no more: I·K products of numbers of size about 1."""
    layer = make_layer(name)
    x = normal(16, 8).to(dtype)
    y = layer.to(dtype)(x)
    truth = copy.deepcopy(layer).double()(x.double())
    terms = layer.coefficients[0].numel()
    assert y.dtype == dtype
    assert (y.double() - truth).abs().max() <= terms * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_autocast(name, constant):
    stack = KANFeedForward(8, 8, name, constant=constant)
    x = normal(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(x)
    assert y.dtype == torch.bfloat16
    for parameter, gradient in zip(
        stack.parameters(), torch.autograd.grad(y.float().square().mean(), list(stack.parameters())), strict=True
    ):
        assert gradient.dtype == parameter.dtype == torch.float32
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_equal_and_independent(name, constant, copied):
    stack, x = KANFeedForward(8, 8, name, constant=constant), normal(8, 8)
    y = stack(x)
    other = copied(stack)
    assert torch.equal(other(x), y)
    for parameter in other.parameters():
        parameter.data.add_(1)
    assert torch.equal(stack(x), y)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_state_dict_round_trip(name, constant):
    saved, loaded = (KANFeedForward(8, 8, name, constant=constant) for _ in range(2))
    x = normal(8, 8)
    assert not torch.equal(loaded(x), saved(x))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded(x), saved(x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_meta_device(name, constant):
    with torch.device("meta"):
        stack = KANFeedForward(8, 8, name, constant=constant)
        assert stack(torch.empty(2, 8)).shape == (2, 8)
    assert all(parameter.is_meta for parameter in stack.parameters())

    real, direct = stack.to_empty(device="cpu"), KANFeedForward(8, 8, name, constant=constant)
    for made in (real, direct):
        made.reset_parameters(torch.Generator().manual_seed(4))
    assert torch.equal(real(normal(8, 8)), direct(normal(8, 8)))


def test_forms():
    x = normal(8, 6)
    assert [tuple(layer.coefficients.shape) for layer in KANFeedForward(6, 4, "cheby2").layers] == [
        (4, 2, 6),
        (6, 2, 4),
    ]
    single = KANFeedForward(6, 4, "cheby2", form="single", degree=3)
    assert [tuple(layer.coefficients.shape) for layer in single.layers] == [(6, 3, 6)]
    assert single(x).shape == x.shape


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_basis_starts_at_unit_variance_and_stays_there(name, form):
    """Thirty blocks as in a language model: each adds to the stream what it makes of the normalised stream."""
    generator = torch.Generator().manual_seed(0)
    stream = normal(256, 192)
    for _ in range(30):
        feedforward = KANFeedForward(192, 128, name, form=form)
        feedforward.reset_parameters(generator)
        added = feedforward(torch.nn.functional.rms_norm(stream, stream.shape[-1:])).detach()
        assert 0.5 < added.square().mean().item() < 2.0
        stream = stream + added


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(name, form):
    torch._dynamo.reset()
    feedforward, x = KANFeedForward(8, 8, name, form=form), normal(4, 8)
    compiled = torch.compile(feedforward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), feedforward(x))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_good_modules(name, form):
    with torch.device("meta"):
        module = KANFeedForward(16, 8, name, form=form, up=form == "glu")
        assert module(torch.empty(2, 16)).shape == (2, 16)
    module = module.to_empty(device="cpu")
    module.reset_parameters(torch.Generator().manual_seed(0))
    x = normal(8, 16)
    y = module(x)
    assert y.isfinite().all()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), y)
    other = KANFeedForward(16, 8, name, form=form, up=form == "glu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    assert module.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(module).float()(x).dtype == torch.bfloat16


def swiglu(glu, x):
    return torch.nn.functional.linear(torch.nn.functional.silu(glu.gate_proj(x)) * glu.up_proj(x), glu.down_proj.weight)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("up", [False, True])
def test_a_glu_starts_as_swiglu_exactly(name, up):
    glu, x = KANFeedForward(16, 64, name, form="glu", up=up), normal(100, 16)
    exact = swiglu(glu, x)
    assert torch.equal(glu(x), exact)
    learned = glu.gate_function.coefficients
    torch.nn.init.normal_(glu.gate_function.basis.numerator if learned is None else learned)
    assert not torch.equal(glu(x), exact)


@pytest.mark.parametrize("name", [name for name in ALL if make_basis(name).groups])
@pytest.mark.parametrize(
    ("activation", "error"),
    [("silu", 2e-3), ("gelu", 5e-3), ("gelu-tanh", 5e-3), ("relu", 0.1), ("identity", 1e-5)],
)
def test_what_is_learned_for_groups_can_start_as_any_activation(name, activation, error):
    """The largest error on [-8, 8]."""
    basis = make_basis(name).bound(8)
    basis.start_as(activation)
    x = torch.linspace(-8, 8, 1001)[:, None]
    assert (basis(x.expand(-1, 8))[:, 0] - ACTIVATIONS[activation](x)).abs().max() <= error


def test_a_sequential_mix_is_a_layer_for_each_basis():
    stack = KANFeedForward(12, 8, "cheby2:degree=3>rbf>legendre")
    assert [layer.basis.name for layer in stack.layers] == ["cheby2", "rbf", "legendre"]
    assert [(layer.in_features, layer.out_features) for layer in stack.layers] == [(12, 8), (8, 8), (8, 12)]


def test_a_parallel_mix_adds_what_its_parts_make_of_their_channels():
    layer, x = ParallelKANLinear(8, 5, ["cheby2", "rbf"]), normal(20, 8)
    first, second = layer.parts
    torch.testing.assert_close(layer(x), first(x[:, :4]) + second(x[:, 4:]))
    assert first.bias is not None
    assert second.bias is None
    assert KANFeedForward(8, 8, "cheby2+rbf>legendre")(x).shape == x.shape


@pytest.mark.parametrize("name", [*ALL, "cheby2+rbf", "legendre+cheby3"])
@pytest.mark.parametrize("constant", CONSTANTS)
@pytest.mark.parametrize("linear", [False, True])
def test_features_times_matrix_is_the_layer(name, constant, linear):
    channels = 16 if "+" in name else 8
    layer = kan_layer(channels, 5, name, constant=constant, linear=linear, scaled=True).double()
    x = normal(20, channels, dtype=torch.float64)
    features = layer.features(x)
    matrix, bias = normal(5, features.shape[-1], dtype=torch.float64, seed=1), normal(5, dtype=torch.float64, seed=2)
    layer.load_matrix(matrix, bias)
    torch.testing.assert_close(layer(x), features @ matrix.T + bias)


@pytest.mark.parametrize("name", ALL)
def test_a_group_layer_starts_at_unit_variance(name):
    layer = GroupKANLinear(64, 256, name)
    layer.reset_parameters(torch.Generator().manual_seed(0), 0.5)
    assert layer(normal(512, 64)).square().mean().item() == pytest.approx(0.25, rel=0.1)
    if layer.function.coefficients is not None:
        assert len(layer.function.coefficients) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KANLinear(6, 4, "chebby2"), "Did you mean 'cheby2'?"),
        (lambda: KANLinear(6, 4, "cheby2", constant="edges"), "Did you mean 'edge'?"),
        (lambda: KANFeedForward(6, 4, "cheby2", form="stak"), "Did you mean 'stack'?"),
        (lambda: KANFeedForward(6, 4, "chebby2"), "Did you mean 'cheby2'?"),
        (lambda: KANFeedForward(6, 4, "cheby2", degree=0), "degree must be"),
        (lambda: KANLinear(6, 4, "rational"), "6 channels are not divisible by 8 groups"),
        (lambda: KANFeedForward(6, 12, "cheby2", form="glu"), "12 channels are not divisible by 8 groups"),
        (lambda: KANFeedForward(6, 8, "rational", form="glu", groups=4), "write rational:groups=4"),
        (lambda: ParallelKANLinear(7, 4, ["cheby2", "rbf"]), "7 input channels are not divisible by the 2 parts"),
        (lambda: KANFeedForward(6, 8, "cheby2>rbf", form="gated"), "needs form 'stack'"),
        (lambda: KANFeedForward(6, 8, "cheby2+rbf", form="glu"), "no place for"),
        (lambda: KANFeedForward(6, 4, "sinc+rbf", degree=3), "no family of 'sinc+rbf' has a degree"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(SpecError) as refused:
        make()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
