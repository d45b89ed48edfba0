"""Curricula: what is computed at each step, that a raise and an end change nothing they should not, and resuming."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import transformers
from architectures import TOKENS, make
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kallm_bench.errors import KallmError, SpecError, TrainingError
from kallm_bench.kan import BASES, CONSTANTS, KANLinear, make_basis
from kallm_bench.kan.bases.three_term import ThreeTerm
from kallm_bench.kan.layers import GroupFunction
from kallm_bench.models import KANSpec, replaced_modules, retrofit, revert
from kallm_bench.training import apply_scope
from kallm_bench.training.curriculum import Curriculum, CurriculumSettings

STEPS = 12
POLYNOMIALS = sorted(name for name, family in BASES.items() if issubclass(family, ThreeTerm))
ARCHITECTURES = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "phi"]
ALL_AT_ONCE = CurriculumSettings(start_degree=1, stages="backwards", stages_over=0.5, anneal="cosine", anneal_over=0.3)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(module: nn.Module) -> None:
    """Gives every parameter a value that is not zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def retrofitted(base: Any, blocks: str = "2-3", basis: str = "cheby2", **spec: Any) -> Any:
    model = copy.deepcopy(base)
    retrofit(model, KANSpec(blocks, basis, **spec))
    return model


def adam(model: Any, scope: str = "tail") -> torch.optim.AdamW:
    return torch.optim.AdamW(apply_scope(model, scope), lr=1e-2, weight_decay=0.1)


# --- degrees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BASES))
def test_a_basis_of_a_lower_degree_is_the_first_of_its_functions_or_is_refused(name: str) -> None:
    basis, x = make_basis(name), normal(7, 8).sigmoid()
    basis = basis.bound(8)
    if name not in POLYNOMIALS:
        with pytest.raises(SpecError, match=f"basis '{name}' cannot rise"):
            basis.of_degree(1)
        return
    basis, lower = make_basis(name, degree=3), make_basis(name, degree=2)
    assert torch.equal(basis.of_degree(2)(x), lower(x))
    assert torch.equal(lower(x), basis(x)[..., :3, :])
    assert basis.size == 4
    with pytest.raises(SpecError, match="from 1 to 3, got 4"):
        basis.of_degree(4)


def test_those_that_are_refused_have_other_functions_at_each_degree() -> None:
    for name in sorted(set(BASES) - set(POLYNOMIALS)):
        if "degree" in BASES[name].arguments():
            x = normal(7, 8).sigmoid()
            assert not torch.allclose(make_basis(name, degree=3)(x)[..., :3, :], make_basis(name, degree=2)(x))


@pytest.mark.parametrize("name", POLYNOMIALS)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_layer_at_a_lower_degree_is_itself_without_what_is_above(name: str, constant: str) -> None:
    layer = KANLinear(8, 5, make_basis(name, degree=3), constant=constant, linear=True, scaled=True).double()
    group = GroupFunction(8, make_basis(name, degree=3), groups=2).double()
    x = normal(7, 8)
    for each in (layer, group):
        draw(each)
        lower = each.basis.of_degree(2)
        before, whole = each.by_lower(lower, x), each(x)
        each.zero_above(lower)
        torch.testing.assert_close(each(x), before, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(whole, before)


FORMS = [
    {"form": "stack", "degree": 4, "hidden": 8},
    {"form": "gated", "degree": 4, "hidden": 8, "constant": "edge", "linear": True},
    {"form": "glu", "degree": 4, "hidden": 8, "groups": 4},
    {"basis": "legendre:degree=4+hermite:degree=3", "hidden": 8},
    {"target": "linears", "degree": 4},
]


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: spec.get("form") or spec.get("basis") or spec["target"])
def test_raises_come_when_they_should_and_leave_the_function_as_it_is(tiny_llama: Any, spec: dict[str, Any]) -> None:
    model = retrofitted(tiny_llama(vocab_size=97, dtype=torch.float64), **spec)
    curriculum = Curriculum(model, CurriculumSettings(start_degree=1, raise_at=(0.25, 0.5, 0.7)), STEPS)
    layers = [layer for layer in model.modules() if isinstance(layer, KANLinear | GroupFunction)]
    optimiser, degrees = adam(model), []
    for step in range(STEPS):
        train(model, curriculum, optimiser, range(step, step + 1))
        degrees.append(curriculum.degree(step))
        for layer in layers:
            above = max(0, layer.basis.size - 1 - degrees[-1])
            used, unused = layer.coefficients.tensor_split([layer.coefficients.shape[1] - above], dim=1)
            assert used.all()
            assert not unused.any()
        with torch.no_grad():
            before = model(input_ids=TOKENS).logits
            curriculum.set(step + 1)
            torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=1e-11, atol=1e-11)
    assert degrees == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4]
    curriculum.finish()
    torch.testing.assert_close(model(input_ids=TOKENS).logits, before, rtol=1e-11, atol=1e-11)


def test_without_shares_the_degree_rises_evenly_over_the_first_half(tiny_llama: Any) -> None:
    model = retrofitted(tiny_llama(vocab_size=97), degree=4)
    curriculum = Curriculum(model, CurriculumSettings(start_degree=2), 100)
    degrees = [curriculum.degree(step) for step in range(100)]
    assert degrees == [2] * 25 + [3] * 25 + [4] * 50


def test_a_lower_degree_costs_what_it_is(tiny_llama: Any) -> None:
    """Multiplications of a forward pass, as PyTorch counts them."""
    model, counts = retrofitted(tiny_llama(vocab_size=97), "0-3", degree=4), []
    curriculum = Curriculum(model, CurriculumSettings(start_degree=1), 8)
    for step in (0, 4):
        curriculum.set(step)
        with FlopCounterMode(display=False) as counter:
            model.model.layers[0].mlp(torch.randn(1, 6, 32))
        counts.append(counter.get_total_flops())
    assert counts[1] == 4 * counts[0]


# --- stages and annealing ---------------------------------------------------------------------------------------------


def places(settings: CurriculumSettings, steps: int, tiny_llama: Any, blocks: str = "1-3") -> Curriculum:
    base = tiny_llama(vocab_size=97)
    return Curriculum(retrofitted(base, blocks), settings, steps, base)


def test_shares_follow_the_schedule(tiny_llama: Any) -> None:
    staged = places(CurriculumSettings(stages="backwards", stages_over=0.6), 10, tiny_llama)
    assert [staged.shares(step) for step in (0, 1, 2, 3, 4, 9)] == [
        (0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0),
    ]  # fmt: skip
    forwards = places(CurriculumSettings(stages="forwards", stages_over=0.6), 10, tiny_llama)
    assert [forwards.shares(step) for step in (0, 2, 4)] == [(1.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)]
    linear = places(CurriculumSettings(anneal="linear", anneal_over=0.3), 10, tiny_llama)
    assert [linear.shares(step)[0] for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert len(set(linear.shares(1))) == 1
    cosine = places(CurriculumSettings(anneal="cosine", anneal_over=0.3), 10, tiny_llama)
    assert cosine.shares(0)[0] == pytest.approx(0.5 - 0.5 * math.cos(math.pi / 4))
    assert cosine.shares(3)[0] == 1.0
    both = places(ALL_AT_ONCE, 20, tiny_llama)
    assert [share > 0 for share in both.shares(0)] == [False, False, True]
    assert both.shares(19) == (1.0, 1.0, 1.0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_before_its_turn_a_block_is_the_untouched_models(kind: str) -> None:
    base = make(kind, 2)
    model, last = retrofitted(base, "all", hidden=8), retrofitted(base, "all", hidden=8)
    draw(model)
    last.load_state_dict(model.state_dict())
    revert(last, copy.deepcopy(base), (0,))
    whole = model(input_ids=TOKENS).logits
    curriculum = Curriculum(model, CurriculumSettings(stages="backwards"), 8, base)
    curriculum.set(0)
    assert torch.equal(model(input_ids=TOKENS).logits, last(input_ids=TOKENS).logits)
    assert not torch.equal(model(input_ids=TOKENS).logits, whole)
    curriculum.set(4)
    assert torch.equal(model(input_ids=TOKENS).logits, whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [{}, {"target": "linears"}, {"target": "attention"}, {"basis": "linear"}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
@torch.no_grad()
def test_a_mix_goes_over_from_the_untouched_model_to_the_new_one(kind: str, spec: dict[str, Any]) -> None:
    base = make(kind, 2)
    model = retrofitted(base, "1", **spec)
    draw(replaced_modules(model)[1])
    old, new = base(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits
    steps = 100_000
    curriculum = Curriculum(model, CurriculumSettings(anneal="linear", anneal_over=1 - 1 / steps), steps, base)

    def distances(step: int) -> tuple[float, float]:
        curriculum.set(step)
        now = model(input_ids=TOKENS).logits
        return float((now - old).norm()), float((now - new).norm())

    apart = float((old - new).norm())
    begins, ends = distances(0)[0], distances(steps - 2)[1]
    assert 0 < max(begins, ends) < 0.01 * apart
    assert min(distances(steps // 2)) > 2 * max(begins, ends)
    assert distances(steps - 1)[1] == 0.0


@torch.no_grad()
def test_silenced_activations_take_part(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model = retrofitted(base, "2-3", target="linears", activation="drop")
    curriculum = Curriculum(model, CurriculumSettings(stages="forwards"), 8, base)
    curriculum.set(0)
    revert(expected := retrofitted(base, "2-3", target="linears", activation="drop"), copy.deepcopy(base), (3,))
    assert torch.equal(model(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)


@torch.no_grad()
def test_a_mix_is_the_sum_of_its_shares(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model, x = retrofitted(base, "3"), normal(5, 32).float()
    mlp = model.model.layers[3].mlp
    new, old = mlp(x), base.model.layers[3].mlp(x)
    curriculum = Curriculum(model, CurriculumSettings(anneal="linear", anneal_over=0.3), 10, base)
    curriculum.set(0)
    torch.testing.assert_close(mlp(x), 0.25 * new + 0.75 * old)
    curriculum.set(2)
    torch.testing.assert_close(mlp(x), 0.75 * new + 0.25 * old)
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16


@torch.no_grad()
def test_a_mix_takes_a_layer_at_its_degree(tiny_llama: Any) -> None:
    """Also where the new module is that layer itself."""
    base = tiny_llama(vocab_size=97)
    model, x = retrofitted(base, "3", target="linears", degree=4), normal(5, 32).float()
    layer, old = model.model.layers[3].mlp.up_proj, base.model.layers[3].mlp.up_proj(x)
    whole = layer(x)
    settings = CurriculumSettings(start_degree=1, anneal="linear", anneal_over=0.3)
    curriculum = Curriculum(model, settings, 10, base)
    curriculum.set(0)
    torch.testing.assert_close(layer(x), 0.25 * layer.by_lower(layer.basis.of_degree(1), x) + 0.75 * old)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 5 * 32 * 64  # one function an edge, and the original's one matrix
    curriculum.finish()
    assert not torch.allclose(layer(x), whole)


def test_originals_do_not_learn_are_called_while_they_have_a_share_and_then_go(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model, calls = retrofitted(base), [0, 0]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for number in (2, 3):
        base.model.layers[number].mlp.register_forward_hook(
            lambda *seen, number=number: calls.__setitem__(number - 2, calls[number - 2] + 1)
        )
    curriculum = Curriculum(
        model, CurriculumSettings(stages="backwards", anneal="linear", anneal_over=0.25), STEPS, base
    )
    train(model, curriculum, adam(model), range(STEPS))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert calls == [6, 3]  # block 2 has its turn at step 3, block 3 at once
    gone = weakref.ref(base.model.layers[3].mlp.gate_proj)
    curriculum.finish()
    del base
    gc.collect()
    assert gone() is None


def test_a_new_module_gets_no_gradient_before_its_turn(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model = retrofitted(base)
    curriculum = Curriculum(model, CurriculumSettings(stages="backwards"), STEPS, base)
    apply_scope(model, "tail")
    curriculum.set(0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    early, late = replaced_modules(model).values()
    assert all(parameter.grad is None for parameter in early.parameters())
    assert all(parameter.grad is not None for parameter in late.parameters())
    assert all(parameter.grad is not None for parameter in model.model.layers[2].self_attn.parameters())


# --- the whole run ----------------------------------------------------------------------------------------------------


def train(model: Any, curriculum: Curriculum, optimiser: torch.optim.Optimizer, steps: range) -> None:
    """A loop in which each step is a function of its number."""
    for step in steps:
        curriculum.set(step)
        tokens = torch.randint(0, 96, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def begin(tiny_llama: Any) -> tuple[Any, Curriculum, torch.optim.AdamW]:
    base = tiny_llama(vocab_size=97)
    model = retrofitted(base, degree=3)
    return model, Curriculum(model, ALL_AT_ONCE, STEPS, base), adam(model)


@pytest.mark.parametrize("stop", range(1, STEPS, 2))
def test_a_run_that_is_taken_up_again_ends_with_the_same_bits(tiny_llama: Any, stop: int) -> None:
    whole, curriculum, optimiser = begin(tiny_llama)
    names = [name for name, _ in whole.named_parameters()]
    train(whole, curriculum, optimiser, range(STEPS))

    stopped, curriculum, optimiser = begin(tiny_llama)
    train(stopped, curriculum, optimiser, range(stop))
    assert [name for name, _ in stopped.named_parameters()] == names
    state = copy.deepcopy((stopped.state_dict(), optimiser.state_dict()))
    resumed, curriculum, optimiser = begin(tiny_llama)
    resumed.load_state_dict(state[0])
    optimiser.load_state_dict(state[1])
    train(resumed, curriculum, optimiser, range(stop, STEPS))
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 5, STEPS - 1])
def test_in_the_end_the_model_is_as_if_there_had_been_no_curriculum(tiny_llama: Any, at: int) -> None:
    model, curriculum, _ = begin(tiny_llama)
    plain = begin(tiny_llama)[0]
    curriculum.set(at)
    values = model.state_dict()
    assert values.keys() == plain.state_dict().keys()
    plain.load_state_dict(values)
    at_the_step = model(input_ids=TOKENS).logits
    curriculum.finish()
    assert torch.equal(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    assert torch.equal(at_the_step, plain(input_ids=TOKENS).logits) == (at == STEPS - 1)
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_curriculum_changes_nothing(tiny_llama: Any) -> None:
    model = retrofitted(tiny_llama(vocab_size=97))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    curriculum = Curriculum(model, CurriculumSettings(), STEPS)
    curriculum.set(0)
    assert not CurriculumSettings().active
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"start_degree": 0}, "at least 1, got 0"),
        ({"raise_at": (0.5,)}, "needs a start_degree"),
        ({"start_degree": 1, "raise_at": (0.5, 0.2)}, "rising shares"),
        ({"start_degree": 1, "raise_at": (1.5,)}, "rising shares"),
        ({"start_degree": 1, "raise_at": ("half",)}, "rising shares"),
        ({"stages": "backward"}, "Did you mean 'backwards'"),
        ({"anneal": "cosin"}, "Did you mean 'cosine'"),
        ({"anneal_over": 0.0}, "anneal_over is a share"),
        ({"stages_over": 1.1}, "stages_over is a share"),
        ({"stages": "forwards", "anneal": "linear", "stages_over": 0.9}, "longer than it"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        CurriculumSettings(**wrong)


@pytest.mark.parametrize(
    ("basis", "settings", "said"),
    [
        ("rbf", {"start_degree": 1}, "basis 'rbf' cannot rise: it has no degree"),
        ("bernstein", {"start_degree": 1}, "basis 'bernstein' cannot rise: its functions at a lower degree are others"),
        ("cheby2+rbf", {"start_degree": 1}, "basis 'rbf' cannot rise"),
        ("cheby2", {"start_degree": 2}, r"start_degree 2 is not below any layer's own; their degrees are \[2\]"),
        ("linear", {"start_degree": 1}, "start_degree 1 is for layers of functions, and nothing replaced has any"),
        ("cheby2", {"start_degree": 1, "raise_at": (0.2, 0.5)}, "from degree 1 to 2 it takes 1"),
        ("cheby2", {"stages": "backwards"}, "need the model that this one was made from"),
    ],
    ids=str,
)
def test_what_a_model_cannot_do_is_refused_and_leaves_it_as_it_was(
    tiny_llama: Any, basis: str, settings: dict[str, Any], said: str
) -> None:
    model = retrofitted(tiny_llama(vocab_size=97), basis=basis)
    with pytest.raises(KallmError, match=said):
        Curriculum(model, CurriculumSettings(**settings), STEPS)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_a_feed_forward_that_is_given_more_than_hidden_states_is_refused() -> None:
    base = make("moshi", 2)
    with pytest.raises(TrainingError, match="block 1: its own feed-forward is given more than hidden states"):
        Curriculum(retrofitted(base, "1", hidden=8), CurriculumSettings(stages="forwards"), STEPS, base)


def test_another_base_is_refused(tiny_llama: Any) -> None:
    model, staged = retrofitted(tiny_llama(vocab_size=97)), CurriculumSettings(stages="forwards")
    with pytest.raises(SpecError, match="of another size"):
        Curriculum(model, staged, STEPS, tiny_llama(vocab_size=97, intermediate_size=48))
    with pytest.raises(TrainingError, match="need replaced blocks"):
        Curriculum(tiny_llama(vocab_size=97), staged, STEPS, tiny_llama(vocab_size=97))
