"""The kernels of a decoding step against plain attention, and replies that they give."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact, poisoned
from torch import Tensor

from kallm_bench.bbh import kernels
from kallm_bench.bbh.attention import FusedSight, Neighbours, StepSight

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

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
    "as the bundled model": Case(9, 3, (64, 64), 9, 4, (130, 7, 65)),
    "one row": Case(4, 2, (16, 16), 1, 4, (40,)),
    "some without a beginning": Case(4, 4, (8, 8), 8, 4, (0, 33)),
    "none with a beginning": Case(4, 1, (32, 32), 5, 2, (0, 0, 0)),
    "odd widths": Case(6, 2, (20, 11), 7, 4, (64, 1)),
    "tiles of a block": Case(20, 1, (16, 16), 10, 8, (32, 90)),
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
            for first, start, length in zip(range(0, rows, block), self.starts[::block], self.lengths[::block])
        ]
        visible = torch.arange(ROOM, device=keys.device) <= self.positions[:rows, None]
        return StepSight([self.common], neighbours, visible[:, None, None]).look(0, self.query, keys, values, 0.3)


def make_step(case: Case, positions: list[int] | None = None) -> Step:
    """Random numbers that float16 and bfloat16 hold exactly, so that all begin with the same."""
    generator = torch.Generator().manual_seed(len(case.beginnings) + case.rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().half().double()

    width, value_width = case.widths
    room = len(case.beginnings) * case.block
    longest = max(case.beginnings) + 3
    query = random(case.rows, 1, case.heads, width).transpose(1, 2)  # as models have it
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


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_a_beginning_in_any_number_of_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_PARTS", parts)
    assert_step_is_as_exact(make_step(CASES["as the bundled model"]), torch.float32)


@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, 64, ROOM - 1])
def test_any_number_of_tokens_so_far(position: int) -> None:
    case = Case(2, 1, (16, 16), 2, 2, (5,))
    assert_step_is_as_exact(make_step(case, [position, ROOM - 1 - position]), torch.float32)


def test_large_scores_do_not_overflow() -> None:
    step = make_step(CASES["one row"])
    step.query *= 500
    assert_step_is_as_exact(step, torch.float32)


def test_what_a_row_gets_does_not_depend_on_the_others() -> None:
    """To the bit, wherever it stands in its block, as long as the step has as many rows."""
    step = make_step(CASES["as the bundled model"]).to(torch.bfloat16)
    found = step.fused()
    turned = make_step(CASES["as the bundled model"])
    for name in ("query", "key", "value"):
        setattr(turned, name, getattr(turned, name)[[3, 0, 1, 2, *range(4, 9)]])
    order = [3, 0, 1, 2, *range(4, 12)]
    turned.own = tuple(each[order] for each in turned.own)
    turned.positions = turned.positions[order]
    turned.query[5:8] = 7.0
    again = turned.to(torch.bfloat16).fused()
    assert torch.equal(again[[1, 2, 3, 0, 4, 8]], found[[0, 1, 2, 3, 4, 8]])
    assert not torch.equal(again[5:8], found[5:8])
