"""Which row each reply has: whatever ends and comes, blocks hold one group each, and moves leave as few as can be."""

from __future__ import annotations

import random

import pytest

from kallm_bench.bbh.seats import Seats


def fewest_blocks(seats: Seats) -> int:
    groups = list(seats.taken.values())
    return sum(-(-groups.count(group) // seats.block) for group in set(groups))


@pytest.mark.parametrize(("rows", "block"), [(4, 4), (12, 4), (32, 8), (7, 1)])
@pytest.mark.parametrize("seed", range(5))
def test_blocks_hold_one_group_and_moves_leave_few(rows: int, block: int, seed: int) -> None:
    chance = random.Random(seed)
    seats = Seats(rows, block)
    for _ in range(200):
        for row in [row for row in seats.taken if chance.random() < 0.4]:
            del seats.taken[row]
        group = chance.randrange(3)
        free = seats.free(group)
        seats.taken.update(dict.fromkeys(free[: chance.randrange(rows)], group))
        before = dict(seats.taken)
        blocks: dict[int, set[int]] = {}
        for row, member in before.items():
            blocks.setdefault(row // block, set()).add(member)
        assert all(len(members) == 1 for members in blocks.values())
        needed = seats.needed()
        assert needed >= len(before)
        moves = seats.together(needed)
        assert sorted(seats.taken.values()) == sorted(before.values())
        assert all(seats.taken[target] == before[source] for source, target in moves.items())
        assert {moves.get(row, row) for row in before} == set(seats.taken)
        assert all(row < max(needed, 1) for row in seats.taken)
        assert len({row // block for row in seats.taken}) == fewest_blocks(seats)
        assert not seats.together(needed), "nothing is left to move"


def test_a_group_takes_holes_of_its_own_before_blocks_that_are_empty() -> None:
    seats = Seats(12, 4)
    seats.taken = {1: 7, 2: 7, 4: 8}
    assert seats.free(7) == [0, 3, 8, 9, 10, 11]
    assert seats.free(8) == [5, 6, 7, 8, 9, 10, 11]
    assert seats.free(9) == [8, 9, 10, 11]


def test_of_a_block_alone_only_rows_in_use_are_needed() -> None:
    seats = Seats(12, 4)
    seats.taken = {6: 1, 7: 1}
    assert seats.needed() == 2
    assert seats.together(2) == {6: 0, 7: 1}
    seats.taken[8] = 2
    assert seats.needed() == 8


def test_the_fullest_blocks_stay() -> None:
    seats = Seats(12, 4)
    seats.taken = {0: 1, 4: 1, 5: 1, 6: 1}
    assert seats.together(12) == {0: 7}
