"""The forward pass of training: shortcuts that change nothing but time, and what they fall back to."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    PhiConfig,
)

from kallm_bench.files import DiskError
from kallm_bench.models import KANSpec, retrofit
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.sites import Site
from kallm_bench.training import Forward, apply_scope, loss
from kallm_bench.training import attention as packed
from kallm_bench.training.checks import agrees_with_model
from kallm_bench.training.data import FIRST, IGNORE, LEARN, Rows
from kallm_bench.training.entry import first_learning
from kallm_bench.training.forward import batch_of, make_batch
from kallm_bench.training.prefix_cache import PrefixCache

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SIZES | {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2}
OTHERS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**SIZES, hidden_size=32, intermediate_size=64),
    "phi, a bias at the head": PhiConfig(**WIDE),
    "gemma 2, logits capped": Gemma2Config(**WIDE, head_dim=8, sliding_window=8, final_logit_softcapping=0.5),
    "cohere, logits scaled": CohereConfig(**WIDE, logit_scale=0.25),
}


def some_rows(count: int = 6, length: int = 24) -> Rows:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, VOCABULARY, (count, length)).astype(np.uint16)
    flags = np.where(generator.random((count, length)) < 0.4, LEARN, 0).astype(np.uint8)
    flags |= np.where(generator.random((count, length)) < 0.15, FIRST, 0).astype(np.uint8)
    return Rows(tokens, flags, "some rows", "a fingerprint")


def truth(model: Any, rows: Rows, numbers: list[int]) -> Tensor:
    """Summed loss by the model's own logits, one document at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for number in numbers:
        starts = np.flatnonzero(rows.flags[number] & FIRST)
        for begin, end in zip([0, *starts], [*starts, rows.tokens.shape[1]], strict=True):
            if end - begin < 2:
                continue
            tokens = torch.from_numpy(rows.tokens[number, begin:end].astype(np.int64))
            bears = torch.from_numpy((rows.flags[number, begin + 1 : end] & LEARN).astype(bool))
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits[bears].double(), tokens[1:][bears], reduction="sum")
    return total


def learning(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("scope", ["replaced", "tail", "tail+head", "all"])
@pytest.mark.parametrize("basis", ["linear", "cheby2"])
def test_loss_and_gradients_are_those_of_the_documents_by_themselves(tiny_llama: Any, scope: str, basis: str) -> None:
    model = tiny_llama(vocab_size=VOCABULARY, dtype=torch.float64)
    retrofit(model, KANSpec("2-3", basis))
    rows, numbers = some_rows(), [1, 4]
    apply_scope(model, scope)
    expected = truth(model, rows, numbers)
    with Forward(model) as forward:
        assert forward.first == (0 if scope == "all" else 2)
        found, count = forward.loss_sum(make_batch(rows, numbers))
        assert count == len(make_batch(rows, numbers).targets) > 5
        torch.testing.assert_close(found.double(), expected, rtol=1e-9, atol=0)
        ours = torch.autograd.grad(found, learning(model), allow_unused=True)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, learning(model), allow_unused=True), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_other_architectures_are_entered_too(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[name], dtype=torch.float64).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    retrofit(model, KANSpec("3", "cheby2"))
    apply_scope(model, "tail")
    rows = some_rows()
    with Forward(model) as forward:
        assert forward.first == 3
        found, _ = forward.loss_sum(make_batch(rows, [0, 5]))
    torch.testing.assert_close(found.double(), truth(model, rows, [0, 5]), rtol=1e-6, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", architectures.KINDS)
def test_every_architecture_is_trained_rightly_or_refused(kind: str) -> None:
    if architectures.examine(kind).status != "covered":
        pytest.skip("no retrofit")
    model = next(made for depth in (2, 4) if (made := architectures.made(kind, depth)) is not None)
    places = Anatomy(model).covered()
    last = [number for number, place in enumerate(places) if isinstance(place, Site)][-1]
    retrofit(model, KANSpec((last,), "cheby2", hidden=8, experts=True))
    ids = torch.randint(3, 90, (1, 16))
    if not agrees_with_model(model, ids):
        pytest.skip("refused by train")
    apply_scope(model, "tail")
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORE)], dim=1)
    with Forward(model) as forward:
        loss, count = forward.loss_sum(batch_of(ids, torch.arange(16)[None], targets))
        loss.backward()
    expected = F.cross_entropy(
        model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:], reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    assert count == 15
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in learning(model))


def test_a_decoder_that_cannot_be_entered_is_run_whole(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    retrofit(model, KANSpec("2-3", "cheby2"))
    apply_scope(model, "tail")
    handed_on: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: handed_on.clear())
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: handed_on.append(1))
    model.model.layers[3].register_forward_hook(lambda module, inputs, output: output + len(handed_on))
    with Forward(model) as forward:
        assert forward.first == 0
        forward.loss_sum(make_batch(some_rows(), [0]))


def test_blocks_stand_where_they_stood(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    retrofit(model, KANSpec("2-3", "cheby2"))
    apply_scope(model, "tail")
    before = [id(module) for module in model.modules()]
    with Forward(model, autocast=torch.bfloat16) as forward:
        assert forward.loss_sum(make_batch(some_rows(), [0]))[0].dtype == torch.float32
        names = [name for name, _ in model.named_parameters()]
    assert [id(module) for module in model.modules()] == before
    assert len(names) == len(set(names))


def test_frozen_blocks_never_drop_out_and_learning_ones_do() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    model = AutoModelForCausalLM.from_config(config)
    retrofit(model, KANSpec("2-3", "linear"))
    apply_scope(model, "tail")
    batch = make_batch(some_rows(), [0, 1])
    with Forward(model) as forward:
        forward.train(True)
        first, second = forward.entering(batch), forward.entering(batch)
        assert torch.equal(first, second)
        assert forward.loss_sum(batch)[0].item() != forward.loss_sum(batch)[0].item()
        forward.train(False)
        assert forward.loss_sum(batch)[0].item() == forward.loss_sum(batch)[0].item()


class Largest(TorchDispatchMode):
    """Notes the most values of any tensor that is made."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, inputs: Any = (), named: Any = None) -> Any:
        made = function(*inputs, **(named or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.values = max(self.values, each.numel())
        return made


def test_logits_are_never_whole(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK, "cpu", 8)
    model = tiny_llama()
    retrofit(model, KANSpec("3", "cheby2"))
    apply_scope(model, "tail")
    batch = make_batch(some_rows(), [0, 1, 2, 3])
    assert len(batch.targets) > 2 * 8
    with Forward(model) as forward, Largest() as largest:
        torch.autograd.backward(forward.loss_sum(batch)[0])
    weights = model.get_output_embeddings().weight.numel()
    assert 8 * 49152 <= largest.values <= max(weights, 8 * 49152)


@pytest.mark.parametrize("shape", [loss.HeadShape(), loss.HeadShape(0.5), loss.HeadShape(2.0, 3.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [0, 1, 7, 8, 20])
def test_the_loss_and_all_its_gradients_are_autograds(
    shape: loss.HeadShape, bias: bool, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK, "cpu", 7)
    head = torch.nn.Linear(16, 31, bias=bias, dtype=torch.float64)
    hidden = torch.randn(positions, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (positions,))
    inputs = [hidden, *head.parameters()]
    plain = F.cross_entropy(shape(head(hidden)), targets, reduction="sum")
    monkeypatch.setattr(loss.Head, "of", lambda model: loss.Head(head, shape))
    ours = loss.loss_of(model=None, hidden=hidden, targets=targets)
    torch.testing.assert_close(ours, plain)
    scale = torch.tensor(0.3, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, scale), torch.autograd.grad(plain, inputs, scale), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(loss.loss_of(model=None, hidden=hidden, targets=targets), plain.detach())


def test_a_head_of_another_kind_is_run_as_it_is(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=VOCABULARY, dtype=torch.float64, tie_word_embeddings=False)

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2

    rows = some_rows()
    model.set_output_embeddings(Wrapped(model.get_output_embeddings()))
    with Forward(model) as forward:
        found, _ = forward.loss_sum(make_batch(rows, [0]))
    torch.testing.assert_close(found, truth(model, rows, [0]), check_dtype=False)


# --- attention --------------------------------------------------------------------------------------------------------


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    ends_k: Tensor,
    longest: int,
    longest_k: int,
    **options: Any,
) -> Tensor:
    """What torch's kernel promises, one sequence at a time; every one must be shorter than it was told."""
    left, right = options.pop("window_size")
    assert right == 0
    parts = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert 0 <= end - begin <= longest
        rows = [each[begin:end].transpose(0, 1)[None] for each in (query, key, value)]
        sees = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        sees = sees if left < 0 else sees.triu(-left)
        parts.append(F.scaled_dot_product_attention(*rows, attn_mask=sees, **options)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("knows", [{"window_size"}, {"window_size", "enable_gqa", "scale"}], ids=["bare", "full"])
def test_packed_attention_is_masked_attention(
    tiny_llama: Any, knows: set[str], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself needs a GPU; what it is told is told here to one that does as it says."""
    model = tiny_llama(vocab_size=VOCABULARY, dtype=torch.float64)
    if window:
        model = AutoModelForCausalLM.from_config(
            MistralConfig(**WIDE, sliding_window=window), dtype=torch.float64
        ).eval()
    batch = make_batch(some_rows(), [2, 3])
    named = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    expected = model.get_decoder()(**named)[0]
    with packed.packed_attention(model):
        monkeypatch.setitem(
            packed.AttentionInterface._global_mapping,
            packed.NAME,
            functools.partial(packed.attend, varlen, frozenset(knows)),
        )
        found = model.get_decoder()(**named, **batch.bounds)[0]
        with pytest.raises(packed.UnsupportedError, match="needs bounds"):
            model.get_decoder()(**named)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.get_decoder()(**named)[0], expected)


def test_bounds_are_of_few_lengths() -> None:
    batch = make_batch(some_rows(6, 24), range(6))
    ends = batch.bounds["cu_seq_lens_q"].tolist()
    starts = (batch.position_ids.flatten() == 0).nonzero().flatten().tolist()
    assert ends[: len(starts)] == starts
    assert set(ends[len(starts) :]) == {6 * 24}
    assert len(ends) % 16 == 0


# --- what frozen blocks give, kept ------------------------------------------------------------------------------------


def frozen_model(tiny_llama: Any) -> Any:
    model = tiny_llama(vocab_size=VOCABULARY)
    retrofit(model, KANSpec("2-3", "cheby2"))
    apply_scope(model, "tail")
    return model


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_what_was_kept_is_what_would_be_computed(tiny_llama: Any, tmp_path: Path, autocast: Any) -> None:
    rows, numbers = some_rows(), [4, 1]

    def loss_of(folder: Path | None) -> float:
        model = frozen_model(tiny_llama)
        with Forward(model, autocast=autocast) as forward:
            size = forward.keep(folder, {rows: 6})
            assert size == (0 if folder is None else 6 * 24 * 32 * (4 if autocast is None else 2))
            return forward.loss_sum(forward.batch(rows, numbers))[0].item()

    plain, first = loss_of(None), loss_of(tmp_path)
    (file,) = (tmp_path / "prefix").glob("*/hidden.bin")
    assert plain == first == loss_of(tmp_path)
    with file.open("r+b") as stream:  # what is read is what is used
        stream.seek(4 * 24 * 32 * (4 if autocast is None else 2))
        stream.write(os.urandom(64) if autocast is None else b"\x00\x40" * 32)
    assert loss_of(tmp_path) != plain


def test_other_rows_weights_or_places_are_never_mixed_up(tiny_llama: Any, tmp_path: Path) -> None:
    model, rows = frozen_model(tiny_llama), some_rows()

    def folder(of: Any, first: int = 2, dtype: torch.dtype = torch.float32, source: Rows = rows) -> str:
        cache = PrefixCache(tmp_path, of, first, dtype, source, 6)
        cache.close()
        return cache.folder.name

    changed, embedded, tail = (frozen_model(tiny_llama) for _ in range(3))
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
        embedded.model.embed_tokens.weight[3, 5] += 1e-3
        tail.model.layers[2].self_attn.q_proj.weight += 1
        tail.model.norm.weight += 1
    tail.config.vendor_name_or_path = "elsewhere"
    other = Rows(rows.tokens, rows.flags, rows.source, "another")
    names = [folder(model), folder(changed), folder(model, 1), folder(model, 2, torch.bfloat16)]
    names += [folder(model, source=other), folder(embedded)]
    assert len(set(names)) == 6
    arms = [tiny_llama(vocab_size=VOCABULARY) for _ in range(3)]
    for arm, spec in zip(arms, (KANSpec("2-3", "linear"), KANSpec("3", "legendre", seed=7), None), strict=True):
        if spec:
            retrofit(arm, spec)
    assert {folder(each) for each in (tail, *arms)} == {names[0]}
    retrofit(model, KANSpec("0", "cheby2"))
    assert folder(model) not in names


def test_what_was_not_flushed_is_not_there(tiny_llama: Any, tmp_path: Path) -> None:
    """A process that is killed says nothing more; the next one finds what was said before, and no half-written row."""
    model, rows = frozen_model(tiny_llama), some_rows()
    killed = PrefixCache(tmp_path, model, 2, torch.float32, rows, 6)
    killed.write([0, 1], torch.ones(2, 24, 32))
    killed.flush()
    killed.write([2], torch.full((1, 24, 32), 2.0))
    again = PrefixCache(tmp_path, model, 2, torch.float32, rows, 6)
    assert again.share == pytest.approx(2 / 6)
    assert again.read([2]) is None
    assert again.read([0, 2]) is None
    found = again.read([1, 0])
    assert found is not None
    assert torch.equal(found, torch.ones(2, 24, 32))
    killed.close()
    again.close()
    (tmp_path / "prefix" / again.folder.name / "hidden.bin").unlink()  # as if somebody had made room
    third = PrefixCache(tmp_path, model, 2, torch.float32, rows, 6)
    third.write([3], torch.ones(1, 24, 32))
    third.flush()
    assert third.read([0]) is None
    assert third.read([3]) is not None
    third.close()


def test_a_disk_without_room_is_told_before_the_work(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskError, match=r"needs 0\.00 GB and the disk has 0\.00 GB free"):
        PrefixCache(tmp_path, frozen_model(tiny_llama), 2, torch.float32, some_rows(), 6)


def test_a_write_that_fails_is_told_at_the_next(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PrefixCache(tmp_path, frozen_model(tiny_llama), 2, torch.float32, some_rows(), 6)

    def full(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    cache.write([0], torch.ones(1, 24, 32))
    with pytest.raises(DiskError, match="no space left on the disk"):
        cache.flush()
    assert cache.read([0]) is None


def test_embeddings_that_learn_are_not_kept(tiny_llama: Any, tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=VOCABULARY)
    retrofit(model, KANSpec("2-3", "cheby2"))
    apply_scope(model, "tail+head")  # tied: the head's steps move what the first block is given
    with Forward(model) as forward:
        assert forward.keep(tmp_path, {some_rows(): 6}) == 0


def test_a_batch_that_was_asked_for_is_the_one_that_comes(tiny_llama: Any) -> None:
    rows = some_rows()
    with Forward(frozen_model(tiny_llama)) as forward:
        forward.prefetch(rows, [3, 2])
        assert forward.batch(rows, [1, 0]).numbers == (1, 0)
        forward.prefetch(rows, [3, 2])
        batch = forward.batch(rows, [3, 2])
    assert batch.numbers == (3, 2)
    assert torch.equal(batch.input_ids, torch.from_numpy(rows.tokens[[3, 2]].astype(np.int64)))


def test_rows_that_fill_up_a_batch_bear_no_loss() -> None:
    rows = some_rows()
    full, alone = make_batch(rows, [2, 5], height=4), make_batch(rows, [2, 5])
    assert full.input_ids.shape == (4, 24)
    assert torch.equal(full.bearing, alone.bearing)
    assert torch.equal(full.targets, alone.targets)


def test_the_first_learning_block(tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=VOCABULARY).requires_grad_(False)
    assert first_learning(model) == 3
    model.model.layers[1].mlp.up_proj.requires_grad_(True)
    assert first_learning(model) == 1
