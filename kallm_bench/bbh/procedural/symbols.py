"""Expressions, brackets and words: the tasks whose questions are strings of symbols."""

from __future__ import annotations

import random
from functools import cache

from kallm_bench.bbh.procedural.vocabulary import WORDS

BOOLEAN_TOKENS = 8  # every BBH expression has just as many
OPENING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def boolean_expressions(rng: random.Random) -> tuple[str, str]:
    """One of the 2,122 expressions of eight tokens, each as likely as any other."""
    expression, value = rng.choice(list(_disjunctions(BOOLEAN_TOKENS).items()))
    return f"{expression} is", str(value)


# The three ranks of Python's grammar. Each text is derived in one way only, so counting texts is counting derivations.
@cache
def _disjunctions(tokens: int) -> dict[str, bool]:
    found = dict(_conjunctions(tokens))
    for first in range(1, tokens - 1):
        for left, x in _conjunctions(first).items():
            found |= {f"{left} or {right}": x or y for right, y in _disjunctions(tokens - first - 1).items()}
    return found


@cache
def _conjunctions(tokens: int) -> dict[str, bool]:
    found = dict(_negations(tokens))
    for first in range(1, tokens - 1):
        for left, x in _negations(first).items():
            found |= {f"{left} and {right}": x and y for right, y in _conjunctions(tokens - first - 1).items()}
    return found


@cache
def _negations(tokens: int) -> dict[str, bool]:
    if tokens < 1:
        return {}
    if tokens == 1:
        return {"True": True, "False": False}
    found = {f"not {text}": not value for text, value in _negations(tokens - 1).items()}
    return found | {f"( {text} )": value for text, value in _disjunctions(tokens - 2).items()}


def multistep_arithmetic_two(rng: random.Random) -> tuple[str, str]:
    """Two groups of four numbers from -9 to 9, all operators equally likely."""
    (left, x), (right, y), operator = _group(rng), _group(rng), rng.choice("+-*")
    value = {"+": x + y, "-": x - y, "*": x * y}[operator]
    return f"(({left}) {operator} ({right})) =", str(value)


def _group(rng: random.Random) -> tuple[str, int]:
    term = rng.randint(-9, 9)
    text, total = str(term), 0
    for _ in range(3):
        operator, number = rng.choice("+-*"), rng.randint(-9, 9)
        text += f" {operator} {number}"
        if operator == "*":
            term *= number
        else:
            total, term = total + term, number if operator == "+" else -number
    return text, total + term


def dyck_languages(rng: random.Random) -> tuple[str, str]:
    """A balanced word of four kinds of brackets, at most 100 long, without its last one to three closing brackets.

    The words come from the grammar S -> ( S ) with 1/2, S S with 1/4, nothing with 1/4, which has BBH's lengths and
    depths. BBH has no question twice, so it has fewer of the 32 shortest words: one in five is kept.
    """
    while True:
        word, missing = _balanced_word(rng), rng.randint(1, 3)
        long_enough = 6 <= len(word) <= 100 or (len(word) == 4 and rng.random() < 0.2)
        if long_enough and all(bracket in OPENING.values() for bracket in word[-missing:]):
            break
    question = "Complete the rest of the sequence, making sure that the parentheses are closed properly. Input: "
    return question + " ".join(word[:-missing]), " ".join(word[-missing:])


def _balanced_word(rng: random.Random) -> list[str]:
    """A word of the grammar; cut off where it grows past 100 brackets."""
    word: list[str] = []
    pending = ["S"]
    while pending and len(word) <= 100:
        symbol, chance = pending.pop(), rng.random()
        if symbol != "S":
            word.append(symbol)
        elif chance < 1 / 2:
            word.append(rng.choice(list(OPENING)))
            pending += [OPENING[word[-1]], "S"]
        elif chance < 3 / 4:
            pending += ["S", "S"]
    return word


def word_sorting(rng: random.Random) -> tuple[str, str]:
    """Two to twenty different words to sort."""
    words = rng.sample(WORDS, rng.randint(2, 20))
    return f"Sort the following words alphabetically: List: {' '.join(words)}", " ".join(sorted(words))
