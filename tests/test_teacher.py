"""Distillation: the loss against its plain formula, and a teacher that stays what the untouched model was."""

from __future__ import annotations

import copy
import functools
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from architectures import make
from test_curriculum import draw
from test_forward import Largest, some_rows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kallm_bench.errors import Interrupted, TrainingError
from kallm_bench.models import KANSpec, replaced_modules, retrofit
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.training import (
    SCOPES,
    Forward,
    TrainResult,
    TrainSettings,
    apply_scope,
    make_curriculum,
    teacher,
    train,
)
from kallm_bench.training.curriculum import Curriculum, CurriculumSettings
from kallm_bench.training.forward import make_batch
from kallm_bench.training.loss import Head, HeadShape
from kallm_bench.training.teacher import DistillationSettings, Teacher, distilled_loss_sum

OTHERS = ["gpt_neox", "opt", "bloom", "gemma2", "gemma3_text", "phi", "mixtral", "gptj", "cohere2", "falcon_h1"]
TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
HALF = DistillationSettings(0.5)
POSITIONS = torch.arange(6).repeat(2)[None].expand(2, 12)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_head(weight: Tensor, shape: HeadShape | None = None) -> Head:
    """A plain head with this very tensor as its matrix."""
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    del layer.weight
    layer.weight = weight
    return Head(layer, shape or HeadShape())


class Wrapped(nn.Module):
    """A head of another kind."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


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
@pytest.mark.parametrize("kind", ["plain", "biased", "bent", "of another kind"])
def test_the_formula_whatever_the_chunks_and_the_heads(
    monkeypatch: pytest.MonkeyPatch, chunk: int, weight: float, temperature: float, kind: str
) -> None:
    monkeypatch.setitem(teacher.CHUNK, "cpu", chunk)
    hidden, head, targets, other, other_head = problem()
    shapes = [HeadShape(0.5, 2.0), HeadShape(1.5, None)] if kind == "bent" else [HeadShape(), HeadShape()]
    heads = [linear_head(each, shape) for each, shape in zip((head, other_head), shapes, strict=True)]
    inputs = [hidden, head]
    if kind == "biased":
        for seed, each in enumerate(heads):
            each.layer.bias = nn.Parameter(normal(len(head), seed=seed + 7))
        inputs.append(heads[0].layer.bias)
    if kind == "of another kind":
        heads = [Head(Wrapped(each.layer)) for each in heads]
    settings = DistillationSettings(weight, temperature)
    found = distilled_loss_sum(heads[0], hidden, targets, heads[1], other, settings)
    logits = heads[0](hidden)
    expected = plain(logits, heads[1](other).detach(), targets, weight, temperature)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum").detach()
    torch.testing.assert_close(found.cross_entropy, cross_entropy, rtol=1e-12, atol=1e-12)
    assert not found.cross_entropy.requires_grad
    gradients = torch.autograd.grad(found.total, inputs)
    for got, wanted in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_gradients_match_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(teacher.CHUNK, "cpu", 2)
    hidden, head, targets, other, other_head = (each.detach() for each in problem(positions=3, width=2, words=4))
    shape = HeadShape(0.7, 1.5)

    def total(hidden: Tensor, head: Tensor) -> Tensor:
        settings, heads = DistillationSettings(0.6, 2.0), (linear_head(head, shape), linear_head(other_head, shape))
        return distilled_loss_sum(heads[0], hidden, targets, heads[1], other, settings).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), head.requires_grad_()))


def test_the_teacher_gets_no_gradient() -> None:
    hidden, head, targets, other, other_head = problem()
    settings = DistillationSettings(1.0)
    found = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings)
    assert torch.autograd.grad(found.total, [other, other_head], allow_unused=True) == (None, None)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_student_that_is_its_teacher_learns_nothing(temperature: float) -> None:
    hidden, head, targets, _, _ = problem()
    settings = DistillationSettings(1.0, temperature)
    found = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(head), hidden, settings)
    assert float(found.total.detach()) == 0.0
    for gradient in torch.autograd.grad(found.total, [hidden, head]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-13)


def test_a_high_temperature_compares_the_logits_themselves() -> None:
    """T² KL tends to half the variance of the logits' difference over the words (Hinton et al. 2015, section 2.1)."""
    hidden, head, targets, other, other_head = problem()
    settings = DistillationSettings(1.0, 5000.0)
    found = distilled_loss_sum(linear_head(head), hidden, targets, linear_head(other_head), other, settings)
    difference = hidden @ head.T - other @ other_head.T
    expected = 0.5 * difference.var(dim=-1, correction=0).sum()
    torch.testing.assert_close(found.total, expected, rtol=3e-3, atol=0)


@pytest.mark.parametrize("kind", ["plain", "of another kind"])
def test_sums_are_float32_under_autocast_and_logits_exist_for_a_chunk_at_a_time(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(teacher.CHUNK, "cpu", 4)
    hidden, head, targets, other, other_head = (
        each.detach().float() if each.is_floating_point() else each for each in problem(positions=101, words=53)
    )
    heads = [linear_head(head), linear_head(other_head)]
    if kind != "plain":
        heads = [Head(Wrapped(each.layer)) for each in heads]
    arguments = heads[0], hidden.requires_grad_(), targets, heads[1], other, DistillationSettings(0.5)
    with torch.autocast("cpu", torch.bfloat16), Largest() as largest:
        found = distilled_loss_sum(*arguments)
    torch.autograd.backward(found.total)
    assert found.total.dtype == found.cross_entropy.dtype == torch.float32
    assert 4 * 53 <= largest.values <= 101 * 6  # four rows of logits, and all hidden states
    with torch.no_grad():
        exact = distilled_loss_sum(*arguments).total
    assert float(exact) == pytest.approx(float(found.total.detach()), rel=1e-2)
    assert float(exact) != float(found.total.detach())


@pytest.mark.parametrize("kind", ["plain", "of another kind"])
def test_a_plain_head_is_run_once_and_never_again_in_backward(kind: str) -> None:
    hidden, head, targets, other, other_head = problem()
    heads = [linear_head(head), linear_head(other_head)]
    if kind != "plain":
        heads = [Head(Wrapped(each.layer)) for each in heads]
    counts = []
    with FlopCounterMode(display=False) as counter:
        found = distilled_loss_sum(heads[0], hidden, targets, heads[1], other, DistillationSettings(0.5))
        torch.autograd.backward(found.total)
        counts.append(counter.get_total_flops())
    product = 2 * head.numel() * len(hidden)
    assert counts == [(2 + 2) * product if kind == "plain" else (2 + 2 + 2) * product]


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"weight": 1.5}, {"temperature": 0.0}, {"temperature": math.nan}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        DistillationSettings(**wrong)


# --- the teacher ------------------------------------------------------------------------------------------------------


def pupil(base: Any, scope: str = "tail", **spec: Any) -> tuple[Any, list[nn.Parameter]]:
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("last:1", "cheby2", hidden=8, experts=True, **spec))
    return model, apply_scope(model, scope)


def hidden_of(model: Any, tokens: Tensor = TOKENS, positions: Tensor = POSITIONS) -> Tensor:
    with torch.no_grad():
        return model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)[0]


@contextmanager
def hearing(model: Any, block: int) -> Iterator[list[Tensor]]:
    """Inside, each forward pass leaves in the list what enters a block; nothing for block 0."""
    heard: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        heard[:] = [output if isinstance(output, Tensor) else output[0]]

    handle = find_blocks(model)[block - 1].register_forward_hook(note) if block else None
    yield heard
    if handle:
        handle.remove()


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
    master = Teacher(model, base, HALF)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    whole = scope == "all" or (scope == "tail+head" and tied)
    assert master.enters_at == (0 if whole else 3)
    for _ in range(2):
        with hearing(model, master.enters_at) as heard:
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
    master = Teacher(model, base, HALF)
    own = {name for name, parameter in base.named_parameters() if parameter not in set(model.parameters())}
    assert own == {name for name, _ in base.named_parameters() if ".layers.3." in name or name == "model.norm.weight"}
    assert base.lm_head.weight is model.lm_head.weight
    called: list[int] = []
    for number, block in enumerate(base.model.layers):
        block.self_attn.register_forward_hook(lambda *seen, number=number: called.append(number))
    with hearing(model, master.enters_at) as heard:
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
    assert Teacher(model, copy.deepcopy(base), HALF).enters_at == 1
    apply_scope(model, "tail", tail_from=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] += 1
    assert Teacher(model, base, HALF).enters_at == 0


def test_a_decoder_that_cannot_be_entered_is_run_whole(tiny_llama: Any) -> None:
    """Its last norm adds what the first block said."""
    base, said = tiny_llama(vocab_size=97), list[Tensor]()
    model, _ = pupil(base)
    base.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: said.append(output))
    base.model.norm.register_forward_hook(lambda module, inputs, output: output + said.pop() if said else output)
    untouched = hidden_of(base)
    master = Teacher(model, base, HALF)
    assert master.enters_at == 0
    with hearing(model, master.enters_at) as heard:
        hidden_of(model)
    assert heard == []
    assert torch.equal(master.hidden(TOKENS, POSITIONS, *heard), untouched)


def test_a_teacher_and_a_curriculum_share_the_untouched_model(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    untouched = hidden_of(base)
    model, learning = pupil(base)
    master = Teacher(model, base, HALF)
    curriculum = Curriculum(model, CurriculumSettings(anneal="linear", anneal_over=0.5), 8, base)
    for step in range(4):
        curriculum.set(step)
        learn(model, learning)
        with hearing(model, master.enters_at) as heard:
            hidden_of(model)
        assert torch.equal(master.hidden(TOKENS, POSITIONS, *heard), untouched)


def test_distilling_brings_a_student_nearer_to_its_teacher(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    with torch.no_grad():
        base.lm_head.weight.mul_(20)  # so that there is something to learn
    model, learning = pupil(base)
    master = Teacher(model, base, DistillationSettings(1.0, 1.0))
    optimiser, losses = torch.optim.AdamW(learning, lr=1e-2, weight_decay=0.0), []
    for _ in range(30):
        with hearing(model, master.enters_at) as heard:
            hidden = model.get_decoder()(input_ids=TOKENS, position_ids=POSITIONS, use_cache=False)[0]
        wanted = master.hidden(TOKENS, POSITIONS, *heard)
        objective = master.loss(hidden.flatten(0, 1), TOKENS.flatten(), wanted.flatten(0, 1))
        torch.autograd.backward(objective.total)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(objective.total.detach()))
    assert losses[-1] < 0.3 * losses[0]


# --- in the forward pass of training, and in a run --------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["replaced", "tail", "tail+head", "all"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_objective_is_the_formula_of_two_whole_models(tiny_llama: Any, scope: str, tied: bool) -> None:
    base = tiny_llama(vocab_size=97, dtype=torch.float64, tie_word_embeddings=tied)
    model, untouched = copy.deepcopy(base), copy.deepcopy(base)
    retrofit(model, KANSpec("2-3", "cheby2"))
    for module in replaced_modules(model).values():
        draw(module)
    batch, settings = make_batch(some_rows(), [1, 4]), DistillationSettings(0.3, 2.0)

    def logits_of(which: Any) -> Tensor:
        whole = which(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        return whole.flatten(0, 1)[batch.bearing]

    learning = apply_scope(model, scope)
    expected = plain(logits_of(model), logits_of(untouched).detach(), batch.targets, 0.3, 2.0)
    theirs = torch.autograd.grad(expected, learning)
    with Forward(model, teacher=Teacher(model, base, settings)) as forward:
        forward.train(True)
        objective = forward.objective(batch)
        torch.testing.assert_close(objective.cross_entropy, forward.loss_sum(batch)[0].detach())
    torch.testing.assert_close(objective.total, expected, rtol=1e-9, atol=0)
    for mine, other in zip(torch.autograd.grad(objective.total, learning), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_what_enters_the_tail_is_computed_once_for_both(tiny_llama: Any, autocast: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("2-3", "cheby2"))
    apply_scope(model, "tail")
    called: list[str] = []
    for who, each in (("student", model), ("teacher", base)):
        for number, block in enumerate(each.model.layers):
            block.self_attn.register_forward_hook(lambda *seen, name=f"{who} {number}": called.append(name))
    with Forward(model, autocast=autocast, teacher=Teacher(model, base, HALF)) as forward:
        called.clear()
        total = forward.objective(make_batch(some_rows(), [1, 4])).total
        assert total.dtype == torch.float32
        torch.autograd.backward(total)
    assert called == [f"student {n}" for n in (0, 1)] + [f"{who} {n}" for who in ("teacher", "student") for n in (2, 3)]


def test_a_replaced_block_that_does_not_learn_is_the_untouched_one_in_the_teacher(tiny_llama: Any) -> None:
    base = tiny_llama(vocab_size=97)
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("1,3", "linear"))
    apply_scope(model, "tail", tail_from=2)
    batch = make_batch(some_rows(), [1, 4])
    wanted = hidden_of(base, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.bearing]
    with Forward(model, teacher=Teacher(model, copy.deepcopy(base), HALF)) as forward:
        assert forward.first == 2
        hidden = forward.hidden(batch).flatten(0, 1)[batch.bearing]
        expected = plain(model.lm_head(hidden).double(), base.lm_head(wanted).double(), batch.targets, 0.5, 2.0)
        torch.testing.assert_close(forward.objective(batch).total.double(), expected, rtol=1e-5, atol=0)


DISTILLED = TrainSettings(tokens=6 * 2 * 24, row_length=24, rows_per_step=2, heldout_rows=4, learning_rate=1e-2)


def distil(
    tiny_llama: Any, folder: Path, weight: float, stop_at: int = 0, curriculum: CurriculumSettings | None = None
) -> tuple[Any, TrainResult]:
    """A run of six steps; stopped by a signal in one of them, or not."""
    base, rows = tiny_llama(vocab_size=97), some_rows(12)
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("2-3", "cheby2"))
    steps = make_curriculum(model, curriculum, DISTILLED, base) if curriculum else None
    settings = DistillationSettings(weight, 1.5)

    def interrupt(work: str, done: int, total: int, note: str = "") -> None:
        if work == "training" and done == stop_at:
            signal.raise_signal(signal.SIGINT)

    teaching = functools.partial(Teacher, base=base, settings=settings) if weight else None
    return model, train(
        model, rows, rows, DISTILLED, folder, watch=interrupt, curriculum=steps, teaching=teaching, batch_rows=1
    )


ALL_AT_ONCE = CurriculumSettings(start_degree=1, stages="backwards", stages_over=0.5, anneal="linear", anneal_over=0.3)


@pytest.mark.parametrize("curriculum", [None, ALL_AT_ONCE], ids=["distilled", "distilled, with a curriculum"])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_ends_with_the_same_bits(
    tiny_llama: Any, tmp_path: Path, stop_at: int, curriculum: CurriculumSettings | None
) -> None:
    whole, expected = distil(tiny_llama, tmp_path / "whole", 0.5, curriculum=curriculum)
    with pytest.raises(Interrupted):
        distil(tiny_llama, tmp_path / "state", 0.5, stop_at, curriculum)
    resumed, result = distil(tiny_llama, tmp_path / "state", 0.5, curriculum=curriculum)
    assert result == expected
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_losses_that_are_told_are_plain_cross_entropy_and_weights_are_others(tiny_llama: Any, tmp_path: Path) -> None:
    """So that arms compare: before anything was learned differently, they are the same."""
    alone, untaught = distil(tiny_llama, tmp_path / "plain", 0.0)
    student, taught = distil(tiny_llama, tmp_path / "distilled", 0.5)
    assert taught.heldout_before == untaught.heldout_before
    assert taught.losses[0] == pytest.approx(untaught.losses[0], rel=1e-6)
    assert taught.losses[1:] != untaught.losses[1:]
    assert taught.trainable_parameters == untaught.trainable_parameters
    assert not torch.equal(student.model.norm.weight, alone.model.norm.weight)
    with Forward(student) as forward:
        total, count = forward.loss_sum(make_batch(some_rows(12), range(4)))
    assert taught.heldout_after == pytest.approx(float(total.detach()) / count, rel=1e-6)


@pytest.mark.parametrize("what", ["curriculum", "teacher"])
def test_split_weights_are_refused_with_either(tiny_llama: Any, tmp_path: Path, what: str) -> None:
    base, rows = tiny_llama(vocab_size=97), some_rows(12)
    model = copy.deepcopy(base)
    retrofit(model, KANSpec("2-3", "cheby2"))
    named: dict[str, Any] = {"teaching": functools.partial(Teacher, base=base, settings=HALF)}
    if what == "curriculum":
        named = {"curriculum": make_curriculum(model, CurriculumSettings(start_degree=1), DISTILLED)}
    with pytest.raises(TrainingError, match="leave --shard out"):
        train(model, rows, rows, DISTILLED, tmp_path, sharded=True, **named)


def test_another_vocabulary_is_refused(tiny_llama: Any) -> None:
    model, _ = pupil(tiny_llama(vocab_size=97))
    with pytest.raises(TrainingError, match="the teacher has 96 words and the student 97"):
        Teacher(model, tiny_llama(vocab_size=96), HALF)
