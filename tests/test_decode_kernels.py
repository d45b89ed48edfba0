"""The kernels of a decoding step against plain attention, and replies that they give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from kernel_checks import DEVICE, assert_as_exact, poisoned
from torch import Tensor

from kallm_bench.bbh import kernels
from kallm_bench.bbh.attention import FusedSight, Neighbours, StepSight, UnsupportedError
from kallm_bench.bbh.comparison import check
from kallm_bench.bbh.decoding import CPU_GRAIN, Grain
from kallm_bench.bbh.jobs import Job
from kallm_bench.bbh.refill import Refill, Way
from kallm_bench.bbh.shapes import layers_of
from kallm_bench.bbh.stops import Ending

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each."""
    monkeypatch.setattr(kernels, "MOST_PARTS", 2)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOM = 75
"""Tokens that a row has room for: not a multiple of what a kernel reads at once."""


@dataclass(frozen=True)
class Case:
    """A step.

    Args:
        heads, groups: of queries, of keys.
        widths: of a key, of a value.
        rows: in the step; there are some more.
        block: rows that share a beginning.
        beginnings: tokens of each block's own.
    """

    heads: int
    groups: int
    widths: tuple[int, int]
    rows: int
    block: int
    beginnings: tuple[int, ...]


CASES = {
    "as the bundled model": Case(9, 3, (64, 64), 5, 4, (130, 7)),
    "one row": Case(4, 2, (16, 16), 1, 4, (40,)),
    "some without a beginning": Case(2, 2, (8, 8), 8, 4, (0, 33)),
    "none with a beginning": Case(4, 1, (32, 32), 3, 2, (0, 0)),
    "odd widths": Case(6, 2, (20, 11), 7, 4, (64, 1)),
    "tiles of a block": Case(20, 1, (16, 16), 5, 4, (32, 90)),
    "widest": Case(2, 1, (128, 128), 2, 2, (70,)),
}


@dataclass
class Step:
    """What a step is given, in float64; `own` and `common` hold NaN where nothing may be read."""

    query: Tensor
    key: Tensor
    value: Tensor
    own: tuple[Tensor, Tensor]
    positions: Tensor
    common: tuple[Tensor, Tensor]
    starts: Tensor
    lengths: Tensor
    case: Case

    def to(self, dtype: torch.dtype) -> Step:
        changed = {name: getattr(self, name).to(DEVICE, dtype, copy=True) for name in ("query", "key", "value")} | {
            name: tuple(each.to(DEVICE, dtype, copy=True) for each in getattr(self, name)) for name in ("own", "common")
        }
        places = {name: getattr(self, name).to(DEVICE) for name in ("positions", "starts", "lengths")}
        return Step(**changed, **places, case=self.case)

    def fused(self) -> Tensor:
        sight = FusedSight([self.own], self.positions, [self.common], self.starts, self.lengths, self.case.block)
        return sight.look(0, self.query, self.key, self.value, 0.3)

    def plain(self) -> Tensor:
        rows, block = self.case.rows, self.case.block
        keys, values = (torch.nan_to_num(each[:rows]) for each in self.own)
        at = torch.arange(rows, device=keys.device)
        keys[at, :, self.positions[:rows]] = self.key[:, :, 0]
        values[at, :, self.positions[:rows]] = self.value[:, :, 0]
        neighbours = [
            Neighbours(slice(first, min(first + block, rows)), slice(int(start), int(start + length)))
            for first, start, length in zip(
                range(0, rows, block), self.starts[:rows:block], self.lengths[:rows:block], strict=True
            )
        ]
        visible = torch.arange(ROOM, device=keys.device) <= self.positions[:rows, None]
        return StepSight([self.common], neighbours, visible[:, None, None]).look(0, self.query, keys, values, 0.3)


def make_step(case: Case, positions: list[int] | None = None) -> Step:
    """Random numbers that float16 and bfloat16 hold exactly, so that all begin with the same."""
    generator = torch.Generator().manual_seed(len(case.beginnings) + case.rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().half().double()

    room = len(case.beginnings) * case.block
    longest = max(case.beginnings) + 3
    query = random(case.rows, 1, case.heads, case.widths[0]).transpose(1, 2)  # as models have it
    key, value = (random(case.rows, 1, case.groups, each).transpose(1, 2) for each in case.widths)
    common = tuple(random(case.groups, len(case.beginnings) * longest, each) for each in case.widths)
    own = tuple(random(room, case.groups, ROOM, each) for each in case.widths)
    found = [(row * 37 + 31) % ROOM for row in range(room)] if positions is None else positions
    for row, position in enumerate(found):
        for each in own:
            each[row, :, position:] = torch.nan
    starts = torch.arange(len(case.beginnings)) * longest
    for block, length in enumerate(case.beginnings):
        for each in common:
            each[:, block * longest + length : (block + 1) * longest] = torch.nan
    lengths = torch.tensor(case.beginnings)
    spread = (each.repeat_interleave(case.block) for each in (starts, lengths))
    return Step(query, key, value, own, torch.tensor(found), common, *spread, case)


def assert_step_is_as_exact(step: Step, dtype: torch.dtype) -> None:
    with poisoned():
        inputs = step.to(dtype)
        found = inputs.fused()
    assert found.dtype == dtype
    truth, plain = step.to(torch.float64).plain(), step.to(dtype).plain()
    assert_as_exact({"attention": truth}, {"attention": plain}, {"attention": found}, dtype)
    written = step.to(dtype)
    rows = torch.arange(step.case.rows, device=DEVICE)
    for kept, before, new in zip(inputs.own, written.own, (written.key, written.value), strict=True):
        before[rows, :, written.positions[: step.case.rows]] = new[:, :, 0]
        torch.testing.assert_close(kept, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_as_exact_as_plain_attention(name: str, dtype: torch.dtype) -> None:
    """And keeps the new keys and values, and nothing else."""
    assert_step_is_as_exact(make_step(CASES[name]), dtype)


@pytest.mark.parametrize("parts", [1, 5])
def test_a_beginning_in_any_number_of_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTS", parts)
    assert_step_is_as_exact(make_step(CASES["as the bundled model"]), torch.float32)


@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, ROOM - 1])
def test_any_number_of_tokens_so_far(position: int) -> None:
    case = Case(2, 1, (16, 16), 2, 2, (5,))
    assert_step_is_as_exact(make_step(case, [position, ROOM - 1 - position]), torch.float32)


def test_large_scores_do_not_overflow() -> None:
    step = make_step(CASES["one row"])
    step.query *= 500
    assert_step_is_as_exact(step, torch.float32)


def test_what_a_row_gets_does_not_depend_on_the_others() -> None:
    """To the bit, wherever it stands in its block, as long as the step has as many rows."""
    case = Case(6, 2, (16, 16), 8, 4, (70, 7))
    found = make_step(case).to(torch.bfloat16).fused()
    turned, order = make_step(case), [3, 0, 1, 2, *range(4, 8)]
    for name in ("query", "key", "value", "positions"):
        setattr(turned, name, getattr(turned, name)[order])
    turned.own = (turned.own[0][order], turned.own[1][order])
    turned.query[5:7] = 7.0
    again = turned.to(torch.bfloat16).fused()
    assert torch.equal(again[[1, 2, 3, 0, 4, 7]], found[[0, 1, 2, 3, 4, 7]])
    assert not torch.equal(again[5:7], found[5:7])


def tiny_model(tiny_llama: Any) -> Any:
    model = tiny_llama(num_hidden_layers=1, num_key_value_heads=1, seed=5, vocab_size=97)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)  # wide apart, so that attention matters
    return model.to(DEVICE)


def test_replies_by_the_kernels(tiny_llama: Any) -> None:
    """Refilled, moved together, of several beginnings, whose blocks have holes: the same as in plain PyTorch."""
    model = tiny_model(tiny_llama)
    layers = layers_of(model, 200)
    grain = Grain(steps=2, rows=2, least_rows=2, block=2, own=32, fixed_rows=4, prefill_tokens=40)
    check(model, layers, grain, fused=True)
    jobs = []
    for number in range(7):
        group = number % 3
        beginning = tuple((7 * at + group) % 97 for at in range((0, 33, 40)[group]))
        own = tuple((11 * at + number) % 97 for at in range(1 + 5 * number % 7))
        jobs.append(Job(number, group, beginning, own, Ending(frozenset(), (), 2 + 3 * (number % 2)), 0))
    found = {}
    for fused in (True, False):
        way = Way(model, None, grain, layers, 32, fused=fused, fixed=False)
        found[fused] = {job.number: reply for job, reply, _ in Refill(way, jobs, 4).replies()}
    assert found[True] == found[False]
    assert len({tuple(reply) for reply in found[True].values()}) == 7


def test_kernels_that_are_wrong_are_noticed(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_llama)
    layers = layers_of(model, 200)
    grain = dataclasses.replace(CPU_GRAIN, block=2)
    look = FusedSight.look
    monkeypatch.setattr(
        FusedSight, "look", lambda self, *a: look(dataclasses.replace(self, starts=self.starts + 1), *a)
    )
    with pytest.raises(UnsupportedError, match="differ by"):
        check(model, layers, grain, fused=True)
    monkeypatch.setattr(FusedSight, "look", lambda self, *a: (_ for _ in ()).throw(triton.TritonError("too small")))
    with pytest.raises(UnsupportedError, match="TritonError: too small"):
        check(model, layers, grain, fused=True)
