"""Logical deduction: from a few true statements, each of them needed, to the one order that fits them all.

The orders that statements leave open are the bits of one integer, so joining statements is `&`, and a question is
decided when one bit is left.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache, reduce
from itertools import permutations
from operator import and_

from kallm_bench.bbh.procedural.wording import COUNTS, ORDINALS, a, listed, with_options

PLACE_SHARE = 0.2  # of the statements drawn that name a place; the others compare two things

Statement = tuple[int, ...]  # (thing, other): thing comes before other; (thing,): thing is at its place


@dataclass(frozen=True)
class _Row:
    """One kind of row and how it is spoken of, from its first place to its last."""

    opening: str  # {} is the count
    things: tuple[str, ...]
    articles: bool  # whether the list of things gives each an article
    subject: str  # {} is the thing
    before: str
    after: str
    first: str
    last: str
    from_first: str  # {} is an ordinal
    from_last: str


SIDES = (
    *("is to the left of", "is to the right of", "is the leftmost", "is the rightmost"),
    *("is the {} from the left", "is the {} from the right"),
)
AGES = ("is newer than", "is older than", "is the newest", "is the oldest", "is the {}-newest", "is the {}-oldest")
PRICES = (
    *("are more expensive than", "are less expensive than", "are the most expensive", "are the cheapest"),
    *("are the {}-most expensive", "are the {}-cheapest"),
)
RANKS = ("finished above", "finished below", "finished first", "finished last", "finished {}", "finished {}-to-last")

BIRDS = ("cardinal", "crow", "dove", "falcon", "heron", "jay", "owl", "robin", "sparrow", "woodpecker")
BOOKS = ("black", "blue", "brown", "gray", "green", "orange", "purple", "red", "white", "yellow")
VEHICLES = (
    *("bus", "convertible", "coupe", "fire engine", "jeep"),
    *("limousine", "motorcycle", "pickup", "sedan", "tractor"),
)
FRUITS = ("apples", "bananas", "cherries", "figs", "kiwis", "mangoes", "oranges", "pears", "pineapples", "watermelons")
GOLFERS = ("Amy", "Ben", "Dan", "Eve", "Ian", "Joe", "Kim", "Liz", "Max", "Sue")

ROWS = (
    _Row("On a branch, there are {} birds: ", BIRDS, True, "The {}", *SIDES),
    _Row("On a shelf, there are {} books: ", tuple(f"{color} book" for color in BOOKS), True, "The {}", *SIDES),
    _Row("In an antique car show, there are {} vehicles: ", VEHICLES, True, "The {}", *AGES),
    _Row("A fruit stand sells {} fruits: ", FRUITS, False, "The {}", *PRICES),
    _Row("In a golf tournament, there were {} golfers: ", GOLFERS, False, "{}", *RANKS),
)


def logical_deduction(rng: random.Random, count: int) -> tuple[str, str]:
    """`count` things in a row, count - 1 statements or rarely one more, and one place asked for."""
    row = rng.choice(ROWS)
    things = rng.sample(row.things, count)
    places = tuple(rng.sample(range(count), count))  # of each thing
    facts = [_sentence(rng, row, things, places, statement) for statement in _statements(rng, places)]
    asked = rng.randrange(count)
    options = [_placed(row, thing, asked, count) for thing in things]
    text = (
        f"The following paragraphs each describe a set of {COUNTS[count]} objects arranged in a fixed order. "
        "The statements are logically consistent within each paragraph. "
        f"{row.opening.format(COUNTS[count])}{listed([a(thing) if row.articles else thing for thing in things])}. "
        f"{' '.join(facts)}"
    )
    return with_options(text, options, options[places.index(asked)])


def _statements(rng: random.Random, places: tuple[int, ...]) -> list[Statement]:
    """True statements that leave only this order, none of which could be spared."""
    things = range(len(places))
    orders = _orders(len(places))
    told: list[Statement] = []
    left = orders.all
    while left.bit_count() > 1:
        one, other = sorted(rng.sample(things, 2), key=lambda thing: places[thing])
        statement: Statement = (rng.choice(things),) if rng.random() < PLACE_SHARE else (one, other)
        if left & orders.fitting(statement, places) != left:
            told.append(statement)
            left &= orders.fitting(statement, places)
    for statement in rng.sample(told, len(told)):
        rest = [other for other in told if other != statement]
        if reduce(and_, (orders.fitting(other, places) for other in rest), orders.all) == left:
            told = rest
    return rng.sample(told, len(told))


@dataclass(frozen=True)
class _Orders:
    """Every order of so many things as one bit, and which of them fit what could be said."""

    all: int
    at: dict[tuple[int, int], int]  # (thing, place)
    before: dict[tuple[int, int], int]  # (thing, thing)

    def fitting(self, statement: Statement, places: tuple[int, ...]) -> int:
        if len(statement) == 1:
            return self.at[statement[0], places[statement[0]]]
        return self.before[statement[0], statement[1]]


@cache
def _orders(count: int) -> _Orders:
    pairs = [(one, other) for one in range(count) for other in range(count)]
    at, before = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
    bit = 1
    for places in permutations(range(count)):
        for one, other in pairs:
            if places[one] == other:
                at[one, other] |= bit
            if places[one] < places[other]:
                before[one, other] |= bit
        bit <<= 1
    return _Orders(bit - 1, at, before)


def _sentence(rng: random.Random, row: _Row, things: list[str], places: tuple[int, ...], statement: Statement) -> str:
    if len(statement) == 1:
        (thing,) = statement
        return f"{_placed(row, things[thing], places[thing], len(things))}."
    one, other = (row.subject.format(things[thing]) for thing in statement)
    if rng.random() < 0.5:
        return f"{one} {row.before} {other.replace('The ', 'the ')}."
    return f"{other} {row.after} {one.replace('The ', 'the ')}."


def _placed(row: _Row, thing: str, place: int, count: int) -> str:
    """That the thing is at a place, counted from the nearer end."""
    if place in (0, count - 1):
        where = row.first if place == 0 else row.last
    elif place <= count // 2:
        where = row.from_first.format(ORDINALS[place])
    else:
        where = row.from_last.format(ORDINALS[count - 1 - place])
    return f"{row.subject.format(thing)} {where}"
