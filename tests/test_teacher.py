"""Distillation: the loss against its plain formula, and a teacher that stays what the untouched model was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import make
from torch import Tensor, nn

from kallm_bench.errors import TrainingError
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.training import SCOPES, apply_scope, teacher
from kallm_bench.training.curriculum import Curriculum, CurriculumSettings
from kallm_bench.training.teacher import DistillationSettings, Teacher, distilled_loss_sum

OTHERS = ["gpt_neox", "opt", "bloom", "gemma2", "gemma3_text", "phi", "mixtral", "gptj", "cohere2", "falcon_h1"]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(6).repeat(2)[None].expand(2, 12)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_head(weight: Tensor) -> Any:
    return lambda hidden: hidden @ weight.T


def plain(logits: Tensor, wanted: Tensor, targets: Tensor, weight: float, temperature: float) -> Tensor:
    """The formula, word by word."""
    teachers, students = (wanted / temperature).softmax(-1), (logits / temperature).softmax(-1)
    divergence = (teachers * (teachers.log() - students.log())).sum()
    cross_entropy = -logits.softmax(-1)[torch.arange(len(targets)), targets].log().sum()
    return (1 - weight) * cross_entropy + weight * temperature**2 * divergence


def problem(positions: int = 11, width: int = 6, words: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden (P, H), head (V, H), targets (P,), the teacher's hidden (P, H) and head (V, H)."""
    targets = torch.arange(positions) * 5 % words
    shapes = [(positions, width), (words, width), (positions, width), (words, width)]
    hidden, head, other, other_head = (normal(*shape, seed=seed) for seed, shape in enumerate(shapes))
    return hidden.requires_grad_(), head.requires_grad_(), targets, other.requires_grad_(), other_head.requires_grad_()


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 11, 1024])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_formula_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch, chunk: int, weight: float, temperature: float
) -> None:
    monkeypatch.setattr(teacher, "CHUNK", chunk)
    hidden, head, targets, other, other_head = problem()
    settings = DistillationSettings(weight, temperature)
    loss = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings)
    expected = plain(hidden @ head.T, other @ other_head.T, targets, weight, temperature)
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=1e-12)
    cross_entropy = F.cross_entropy(hidden @ head.T, targets, reduction="sum").detach()
    torch.testing.assert_close(loss.cross_entropy, cross_entropy, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss.total, [hidden, head])
    for got, wanted in zip(gradients, torch.autograd.grad(expected, [hidden, head]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_gradients_match_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "CHUNK", 2)
    hidden, head, targets, other, other_head = (each.detach() for each in problem(positions=3, width=2, words=4))

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        settings = DistillationSettings(0.6, 2.0)
        return distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings).total

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_()))


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head, targets, other, other_head = problem()
    settings = DistillationSettings(1.0)
    loss = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings)
    assert torch.autograd.grad(loss.total, [other, other_head], allow_unused=True) == (None, None)


def test_without_weight_it_is_cross_entropy_to_the_bit_and_the_teacher_is_not_asked() -> None:
    hidden, head, targets, other, _ = problem()

    def never(hidden: Tensor) -> Tensor:
        raise AssertionError("the teacher was asked")

    loss = distilled_loss_sum(linear_head(head), hidden, targets, never, other, DistillationSettings())
    expected = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    assert torch.equal(loss.total, expected)
    assert not DistillationSettings().active
    for got, wanted in zip(
        torch.autograd.grad(loss.total, [hidden, head]), torch.autograd.grad(expected, [hidden, head]), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_student_that_is_its_teacher_learns_nothing(temperature: float) -> None:
    hidden, head, targets, _, _ = problem()
    settings = DistillationSettings(1.0, temperature)
    loss = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(head), hidden, settings)
    assert float(loss.total.detach()) == 0.0
    for gradient in torch.autograd.grad(loss.total, [hidden, head]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


def test_a_high_temperature_compares_the_logits_themselves() -> None:
    """T² KL tends to half the variance of the logits' difference over the words (Hinton et al. 2015, section 2.1)."""
    hidden, head, targets, other, other_head = problem()
    settings = DistillationSettings(1.0, 5000.0)
    loss = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings)
    difference = hidden @ head.T - other @ other_head.T
    expected = 0.5 * difference.var(dim=-1, correction=0).sum()
    torch.testing.assert_close(loss.total, expected, rtol=3e-3, atol=0)


def test_sums_are_float32_under_autocast_and_logits_exist_for_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher, "CHUNK", 4)
    hidden, head, targets, other, other_head = (
        each.detach().float() if each.is_floating_point() else each for each in problem()
    )
    sizes: list[int] = []

    def student(part: Tensor) -> Tensor:
        sizes.append(len(part))
        return F.linear(part, head)

    arguments = student, hidden.requires_grad_(), targets, linear_head(other_head), other, DistillationSettings(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distilled_loss_sum(*arguments)
    torch.autograd.backward(loss.total)
    assert loss.total.dtype == loss.cross_entropy.dtype == torch.float32
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]  # forward, and again in backward
    sizes.clear()
    with torch.no_grad():
        assert float(distilled_loss_sum(*arguments).total) == pytest.approx(float(loss.total.detach()), rel=1e-2)
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"weight": 1.5}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        DistillationSettings(**wrong)


# --- the teacher ------------------------------------------------------------------------------------------------------


def pupil(base: Any, scope: str = "tail", **spec: Any) -> tuple[Any, list[nn.Parameter]]:
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("last:1", "cheby2", hidden=8, experts=True, **spec))
    return model, apply_scope(model, scope)


def hidden_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)[0]


def learn(model: Any, learning: list[nn.Parameter]) -> None:
    """Two steps far enough to see; of what has learned, all is another."""
    before = [parameter.detach().clone() for parameter in learning]
    optimiser = torch.optim.SGD(learning, lr=0.3)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert sum(not torch.equal(*pair) for pair in zip(before, learning, strict=True)) > 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "scope"),
    [(kind, scope) for kind in ("llama", "gpt2") for scope in SCOPES] + [(kind, "tail") for kind in OTHERS],
)
def test_a_teacher_stays_the_untouched_model_while_its_student_learns(kind: str, scope: str) -> None:
    base = make(kind, 4)
    untouched = hidden_of(base)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model, learning = pupil(base, scope)
    master = Teacher(model, base)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    whole = scope == "all" or (scope == "tail+head" and tied)
    assert master.enters_at == (0 if whole else 3)
    for _ in range(2):
        with master.hearing() as heard:
            hidden_of(model)
        assert len(heard) == (not whole)
        assert torch.equal(master.hidden(TOKENS, POSITIONS, *heard), untouched)
        assert torch.equal(master.hidden(TOKENS, POSITIONS), untouched)
        learn(model, learning)
    assert not torch.allclose(hidden_of(model), untouched)
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert all(not parameter.requires_grad for parameter in base.parameters() if parameter not in set(learning))
    assert not set(base.parameters()) & set(learning)


def test_it_owns_what_the_student_replaced_or_learns_and_computes_from_there_on(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model, _ = pupil(base)
    master = Teacher(model, base)
    own = {name for name, parameter in base.named_parameters() if parameter not in set(model.parameters())}
    assert own == {name for name, _ in base.named_parameters() if ".layers.3." in name or name == "model.norm.weight"}
    assert base.lm_head.weight is model.lm_head.weight
    called: list[int] = []
    for number, block in enumerate(base.model.layers):
        block.self_attn.register_forward_hook(lambda *seen, number=number: called.append(number))
    with master.hearing() as heard:
        hidden_of(model)
    master.hidden(TOKENS, POSITIONS, *heard)
    assert called == [3]
    master.hidden(TOKENS, POSITIONS)
    assert called == [3, 0, 1, 2, 3]


def test_a_replaced_block_in_front_is_where_it_enters_whatever_learns(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("1,3", "linear"))
    apply_scope(model, "tail", tail_from=2)
    assert Teacher(model, copy.deepcopy(base)).enters_at == 1
    apply_scope(model, "tail", tail_from=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] += 1
    assert Teacher(model, base).enters_at == 0


def test_a_decoder_that_cannot_be_entered_is_run_whole(tiny_llama: Any) -> None:
    """Its last norm adds what the first block said."""
    base, said = tiny_llama(vocab_size=97), list[Tensor]()
    model, _ = pupil(base)
    base.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: said.append(output))
    base.model.norm.register_forward_hook(lambda module, inputs, output: output + said.pop() if said else output)
    untouched = hidden_of(base)
    master = Teacher(model, base)
    assert master.enters_at == 0
    with master.hearing() as heard:
        hidden_of(model)
    assert heard == []
    assert torch.equal(master.hidden(TOKENS, POSITIONS, *heard), untouched)


def test_a_teacher_and_a_curriculum_share_the_untouched_model(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    untouched = hidden_of(base)
    model, learning = pupil(base)
    master = Teacher(model, base)
    curriculum = Curriculum(model, CurriculumSettings(anneal="linear", anneal_over=0.5), 8, base)
    for step in range(4):
        curriculum.set(step)
        learn(model, learning)
        with master.hearing() as heard:
            hidden_of(model)
        assert torch.equal(master.hidden(TOKENS, POSITIONS, *heard), untouched)


def test_distilling_brings_a_student_nearer_to_its_teacher(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # so that there is something to learn
    model, learning = pupil(base)
    master, settings = Teacher(model, base), DistillationSettings(1.0, 1.0)
    optimiser, losses = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0), []
    for _ in range(30):
        with master.hearing() as heard:
            hidden = model.get_decoder()(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)[0]
        wanted = master.hidden(TOKENS, POSITIONS, *heard)
        loss = distilled_loss_sum(
            model.lm_head, hidden.flatten(0, 1), TOKENS.flatten(), base.lm_head, wanted.flatten(0, 1), settings
        )
        torch.autograd.backward(loss.total)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_another_vocabulary_is_refused(tiny_llama: Any) -> None:
    model, _ = pupil(tiny_llama(vocab_size=97))
    with pytest.raises(TrainingError, match="the teacher has 96 words and the student 97"):
        Teacher(model, tiny_llama(vocab_size=96))
