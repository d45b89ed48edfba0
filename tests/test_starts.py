"""Warm starts, change of basis, matching of parameters, inspection: what a retrofit keeps of what the model knew."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, FORMS, KANLinear, make_basis
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.models import Calibration, KANSpec, complete_spec, replaced_modules, retrofit, retrofit_reporting
from kallm_bench.models import calibration as calibration_room
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.calibration import Activations
from kallm_bench.models.convert import conversion
from kallm_bench.models.inspect import inspect_model
from kallm_bench.models.least_squares import Equations
from kallm_bench.models.retrofit import parameters_of

ALL = sorted(BASES)
PLAIN = [name for name in ALL if not list(make_basis(name).parameters())]
POLYNOMIALS = [name for name in PLAIN if "degree" in BASES[name].arguments()]
WORDS = {"vocab_size": 97}


@pytest.fixture
def text() -> Calibration:
    tokens = torch.randint(0, 97, (40, 64), generator=torch.Generator().manual_seed(0))
    return Calibration(tokens, torch.arange(64).expand(40, -1), heldout=8)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_a_later_one(tiny_llama: Any, name: str, form: str) -> None:
    """Of the whole model, bit for bit: a squash over a batch or a row would break this."""
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("all", name, form=form))
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 97
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[0, :7], after[0, :7])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 7:], after[0, 7:])


@pytest.mark.parametrize("name", [*ALL, "linear"])
@pytest.mark.parametrize("up", [False, True])
def test_inherited_at_full_width_no_logit_changes(tiny_llama: Any, text: Calibration, name: str, up: bool) -> None:
    model = tiny_llama(**WORDS)
    before = logits(model, text.tokens[:2])
    options = {} if name == "linear" else {"form": "glu", "up": up}
    _, report = retrofit_reporting(model, KANSpec("1-3", name, start="inherit", **options), text)
    torch.testing.assert_close(logits(model, text.tokens[:2]), before, rtol=0, atol=1e-5)
    assert all(r2 == pytest.approx(1.0, abs=1e-9) for r2 in report.r2.values())


@pytest.mark.parametrize(("basis", "form"), [("linear", "stack"), ("rational", "glu"), ("cheby2", "glu")])
def test_the_strongest_units_are_inherited(tiny_llama: Any, text: Calibration, basis: str, form: str) -> None:
    model = tiny_llama(**WORDS)
    old = model.model.layers[2].mlp
    strong = list(range(0, 64, 4))  # sixteen units that matter and 48 that hardly do
    with torch.no_grad():
        old.down_proj.weight[:, [unit for unit in range(64) if unit not in strong]] *= 1e-3
    kept = old.gate_proj.weight[strong].clone()
    _, report = retrofit_reporting(model, KANSpec("2", basis, hidden=16, form=form, start="inherit"), text)
    assert torch.equal(model.model.layers[2].mlp.gate_proj.weight, kept)
    assert report.r2["2"] > 0.999


@pytest.mark.parametrize("name", PLAIN)
def test_least_squares_finds_a_function_that_the_basis_holds(tiny_llama: Any, text: Calibration, name: str) -> None:
    """The module that is replaced is such a layer itself, with other coefficients."""
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", name, form="single", start="random"))
    spec = KANSpec("2", name, form="single", start="lstsq", scaled=False)
    again = copy.deepcopy(model)
    _, report = retrofit_reporting(again, spec, text)
    assert report.r2["2"] > 0.95, name  # its own input scale is another than the old one's 1


def test_streamed_equations_are_those_of_all_rows_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 7, generator=generator, dtype=torch.float64)
    truth = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y = torch.cat([features, torch.ones(500, 1)], dim=1) @ truth + 0.1 * torch.randn(500, 3, generator=generator)
    weights = torch.rand(500, generator=generator, dtype=torch.float64)
    equations = Equations.empty(7, 3, torch.device("cpu"))
    for start in range(0, 500, 60):
        part = slice(start, start + 60)
        equations.add(features[part], y[part], weights[part])
    root = weights.sqrt()[:, None].numpy()
    direct = np.linalg.lstsq(root * np.c_[features.numpy(), np.ones(500)], root * y.numpy(), rcond=None)[0]
    np.testing.assert_allclose(equations.solve(1e-14, constant=True).numpy(), direct, rtol=1e-8, atol=1e-10)
    missed = (
        weights[:, None] * (y - torch.cat([features, torch.ones(500, 1)], 1) @ torch.from_numpy(direct)) ** 2
    ).sum()
    assert equations.missed(torch.from_numpy(direct)) == pytest.approx(
        float(missed / (weights[:, None] * y**2).sum()), rel=1e-6
    )


@pytest.mark.parametrize("form", ["stack", "single", "gated"])
def test_memory_does_not_decide_the_start(
    tiny_llama: Any, text: Calibration, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where activations do not fit they are computed again, to the same end."""
    spec = KANSpec("1-2", "cheby2", form=form, linear=True, start="lstsq+distill+sequence", start_steps=4)
    kept, computed = tiny_llama(**WORDS), tiny_llama(**WORDS)
    retrofit(kept, spec, text)
    monkeypatch.setattr(calibration_room, "KEEP", 0.0)
    retrofit(computed, spec, text)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, computed.state_dict()[name]), name


@pytest.mark.parametrize(
    ("basis", "form", "start"),
    [
        ("cheby2", "stack", "distill"),
        ("cheby2", "stack", "lstsq"),
        ("cheby2", "gated", "lstsq+distill"),
        ("rational", "glu", "distill"),
        ("linear", "stack", "lstsq"),
        ("linear", "stack", "distill"),
        ("cheby2+rbf", "stack", "lstsq"),
        ("cheby2>legendre", "stack", "lstsq"),
    ],
)
def test_every_start_beats_a_random_one(tiny_llama: Any, text: Calibration, basis: str, form: str, start: str) -> None:
    before, scores = logits(tiny_llama(**WORDS), text.tokens[:2]), {}
    for way in ("random", start):
        model = tiny_llama(**WORDS)
        spec = KANSpec("1-2", basis, form=form, start=way, start_steps=60)
        _, report = retrofit_reporting(model, spec, text)
        scores[way] = min(report.r2.values()), float((logits(model, text.tokens[:2]) - before).square().mean())
    assert scores[start][0] > scores["random"][0]
    assert scores[start][0] > 0.1
    assert scores[start][1] < scores["random"][1]


@pytest.mark.parametrize(("basis", "form"), [*((name, "stack") for name in ALL), ("cheby2", "gated"), ("rbf", "glu")])
def test_a_random_start_has_the_variance_of_what_it_replaces(
    tiny_llama: Any, text: Calibration, basis: str, form: str
) -> None:
    model = tiny_llama(**WORDS)
    (site,) = Anatomy(model).sites(KANSpec((2,), "linear"))
    x, y = next(Activations(model, {site: model.model.layers[2].mlp}, text).parts("fit")).seen[site]
    retrofit(model, KANSpec("2", basis, form=form, start="random", seed=3), text)
    with torch.no_grad():
        assert model.model.layers[2].mlp(x).var().item() == pytest.approx(y.var().item(), rel=0.1)


def test_a_start_leaves_the_rest_of_the_model_alone(tiny_llama: Any, text: Calibration) -> None:
    model, untouched = tiny_llama(**WORDS), tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", "cheby2", start="lstsq+distill+sequence", start_steps=4), text)
    for name, value in untouched.state_dict().items():
        if "layers.2.mlp" not in name:
            assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("old", POLYNOMIALS)
@pytest.mark.parametrize("new", POLYNOMIALS)
def test_polynomials_of_equal_squash_change_into_each_other_exactly(old: str, new: str) -> None:
    if BASES[old].squash != BASES[new].squash:
        pytest.skip("other squash")
    assert conversion(make_basis(old, degree=4), make_basis(new, degree=4)).error < 1e-9


@pytest.mark.parametrize("form", ["stack", "single", "gated"])
@pytest.mark.parametrize("constant", ["bias", "edge"])
@pytest.mark.parametrize("new", ["legendre", "jacobi:a=0.3,b=2", "cheby2:degree=5"])
def test_a_change_of_basis_keeps_every_logit(tiny_llama: Any, form: str, constant: str, new: str) -> None:
    model, tokens = tiny_llama(**WORDS), torch.arange(24).reshape(2, 12)
    retrofit(model, KANSpec("1-2", "cheby2", form=form, linear=True, constant=constant))
    before = logits(model, tokens)
    degree = None if "degree" in new else 3
    spec, report = retrofit_reporting(model, KANSpec("1-2", new, form=form, degree=degree))
    assert spec.start == "convert"
    assert report.conversion_error is not None
    assert report.conversion_error < 1e-9
    torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-5)


def test_a_change_to_another_kind_of_basis_says_its_error(tiny_llama: Any) -> None:
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", "cheby2"))
    _, report = retrofit_reporting(model, KANSpec("2", "bspline"))
    assert report.conversion_error is not None
    assert report.conversion_error < 0.01  # a parabola of tanh, in cubic splines
    with pytest.raises(SpecError, match="single bases without learned parts"):
        retrofit(model, KANSpec("2", "morlet", start="convert"))
    with pytest.raises(SpecError, match="hold KANs of one retrofit already"):
        retrofit(model, KANSpec("1", "legendre", start="convert"))


@pytest.mark.parametrize(
    ("basis", "form"),
    [("linear", "stack"), ("cheby2", "stack"), ("cheby2", "gated"), ("rational", "glu"), ("cheby2+rbf", "stack")],
)
@pytest.mark.parametrize("wanted", ["original", 8000])
def test_params_choose_the_nearest_width(tiny_llama: Any, basis: str, form: str, wanted: str | int) -> None:
    config = tiny_llama(**WORDS).config
    spec = complete_spec(config, KANSpec("1-2", basis, form=form, params=wanted))
    number = 2 * 3 * 32 * 64 if wanted == "original" else wanted
    assert spec.params is None
    assert parameters_of(config, spec) == pytest.approx(number, rel=0.1)
    model = tiny_llama(**WORDS)
    retrofit(model, spec)
    count = sum(p.numel() for module in replaced_modules(model).values() for p in module.parameters())
    assert count == parameters_of(config, spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"basis": "cheby2", "start": "lstsq"}, "needs calibration data"),
        ({"basis": "cheby2", "form": "stack", "start": "inherit", "needs": True}, "no linear layers to inherit"),
        ({"basis": "linear", "hidden": 128, "start": "inherit", "needs": True}, "cannot be inherited from 64"),
        ({"basis": "fourier:frequencies=40", "form": "single", "start": "lstsq", "needs": True}, "take at least"),
        ({"basis": "cheby2", "start": "lstq"}, "Did you mean 'lstsq'?"),
        ({"basis": "cheby2", "start": "convert+distill"}, "stands alone"),
        ({"basis": "cheby2", "start": "lstsq+random"}, "can only come first"),
        ({"basis": "cheby2", "start": "sequence+distill"}, "sequence only last"),
        ({"basis": "cheby2", "up": True}, "for form 'glu'"),
        ({"basis": "cheby2", "form": "glu", "linear": True}, "form 'glu' and controls have none"),
        ({"basis": "cheby2", "params": "lots"}, "a number above 0 or 'original'"),
        ({"basis": "cheby2", "params": 100, "hidden": 4}, "give one of the two"),
        ({"basis": "cheby2", "params": 10**12}, "comes near"),
    ],
)
def test_starts_that_cannot_be(tiny_llama: Any, text: Calibration, spec: dict[str, Any], says: str) -> None:
    model = tiny_llama(**WORDS)
    given = text if spec.pop("needs", False) else None
    with pytest.raises(SpecError, match=says) as refused:
        retrofit(model, KANSpec("2", **spec), given)
    assert "\n" not in str(refused.value)
    assert not replaced_modules(model)


def test_dropout_is_off_while_a_start_is_sought_and_back_on_after(text: Calibration) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)).train()
    _, report = retrofit_reporting(model, KANSpec("last:2", "linear", start="inherit"), text)
    assert all(r2 == pytest.approx(1.0, abs=1e-6) for r2 in report.r2.values())
    assert model.training
    assert all(module.training for module in replaced_modules(model).values())


@pytest.mark.parametrize("start", ["lstsq", "inherit", "distill+sequence"])
def test_a_model_in_half_precision_gets_modules_of_its_dtype(tiny_llama: Any, text: Calibration, start: str) -> None:
    model = tiny_llama(**WORDS, dtype=torch.bfloat16)
    basis, form = ("rational", "glu") if start == "inherit" else ("cheby2", "stack")
    _, report = retrofit_reporting(model, KANSpec("1-2", basis, form=form, start=start, start_steps=20), text)
    assert min(report.r2.values()) > -0.1  # twenty steps of bfloat16 rounding: no more than that it ran
    assert {p.dtype for module in replaced_modules(model).values() for p in module.parameters()} == {torch.bfloat16}
    assert logits(model, text.tokens[:1]).isfinite().all()


@pytest.mark.parametrize("basis", ["cheby2+rbf", "bspline+cheby2"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_mix_in_a_gated_form_is_solved(tiny_llama: Any, text: Calibration, basis: str, linear: bool) -> None:
    model = tiny_llama(**WORDS)
    spec = KANSpec("2", basis, form="gated", hidden=16, linear=linear, start="lstsq")
    assert retrofit_reporting(model, spec, text)[1].r2["2"] > 0.1


def test_what_a_block_without_an_answer_can_start_from(tiny_llama: Any, text: Calibration) -> None:
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", "drop"))
    for start in ("lstsq", "distill"):
        with pytest.raises(SpecError, match="answers nothing"):
            retrofit(model, KANSpec("2", "linear", hidden=16, start=start), text)
    retrofit(model, KANSpec("2", "cheby2", start="random"))
    with pytest.raises(SpecError, match="holds a KAN"):
        retrofit(model, KANSpec("2", "linear", hidden=16, start="inherit"), text)


@pytest.mark.parametrize("name", ["dog", "rbf", "cheby2", "rational"])
def test_channels_of_a_group_share_one_function_and_inspection_shows_it(tiny_llama: Any, name: str) -> None:
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", name, form="glu", hidden=16))
    module = model.model.layers[2].mlp
    function = module.gate_function
    generator = torch.Generator().manual_seed(0)
    for parameter in function.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    z = torch.linspace(-2, 2, 41)[:, None]
    with torch.no_grad():
        values = function.of_squashed(
            SQUASHES[function.basis.squash](z).expand(-1, 16) if name != "rbf" else z.expand(-1, 16)
        )
    groups = values.reshape(41, 8, 2)
    torch.testing.assert_close(groups[..., 0], groups[..., 1])
    assert not torch.allclose(groups[:, 0], groups[:, 1])
    (facts,), curves = inspect_model(model, top=8)
    assert facts.edges == 8
    curve = next(each for each in curves if each.source == 3)
    true = torch.nn.functional.silu(z[:, 0]) + groups[:, 3, 0]
    shown = torch.from_numpy(np.interp(z[:, 0].numpy(), curve.u, curve.values)).float()
    assert (shown - true).abs().mean() < 0.1 * true.abs().mean()


def test_a_far_change_of_basis_must_be_asked_for(tiny_llama: Any) -> None:
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", "fourier"))
    with pytest.raises(SpecError, match="take --start convert"):
        retrofit(model, KANSpec("2", "rbf"))
    spec, report = retrofit_reporting(model, KANSpec("2", "rbf", start="convert", seed=7))
    assert spec.seed == 0
    assert report.conversion_error is not None
    assert report.conversion_error > 0.1


def test_inspection_tells_lines_from_curves(tiny_llama: Any) -> None:
    model = tiny_llama(**WORDS)
    retrofit(model, KANSpec("2", "cheby2", form="single", linear=True))
    layer = model.model.layers[2].mlp.layers[0]
    assert isinstance(layer, KANLinear)
    with torch.no_grad():
        layer.coefficients.zero_()
        layer.linear.fill_(0.5)
        layer.coefficients[3, 1, 5] = 0.7  # one parabola of tanh, on the edge from 5 to 3
    (facts,), curves = inspect_model(model, top=2)
    assert facts.edges == 32 * 32
    assert facts.linear_edges == facts.edges - 1
    assert facts.energy[0] == 0.0
    assert facts.energy[2] > 0.9
    assert (curves[0].target, curves[0].source) == (3, 5)
    u = torch.tensor(curves[0].u[40:80])
    true = 0.5 * u + 0.7 * (4 * u.tanh() ** 2 - 1)
    torch.testing.assert_close(torch.tensor(curves[0].values[40:80]), true, rtol=0, atol=5e-3)
    with pytest.raises(SpecError, match="holds no KAN"):
        inspect_model(tiny_llama(**WORDS))
