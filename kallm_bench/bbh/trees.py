"""Questions and their choices laid out for a model: every token that several choices share stands there once.

A question is a tree: its prompt is the trunk, its choices branch off where their tokens differ, and the last token of
a choice is left out, since nothing comes after it. Nodes are numbered so that each comes before all that hangs on it,
and knows where that ends: then node j is above node i, or i itself, exactly if j <= i < ends[j]. This one comparison is
the whole attention mask, also where several trees stand side by side in a row.

What the prompts of a task begin with, in tokens, is no part of the trees: it is computed once (see scoring.py).
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kallm_bench.bbh.encoding import Encoded, Tokens

ROW = 256
"""Slots that a row of trees should have, or up to twice as many; more only where one tree is longer.

Attention is computed between all slots of a row, so long rows cost more than they use; short ones are harder to fill.
"""


@dataclass(frozen=True)
class Branches:
    """What choices put behind a trunk; nodes are counted from 0 behind it, and -1 is its last one.

    Args:
        tokens, depths, ends: of each node; a depth of 1 is the first behind the trunk.
        paths: for each choice the nodes its tokens are read off at, the first always -1.
    """

    tokens: Tokens
    depths: Tokens
    ends: Tokens
    paths: tuple[Tokens, ...]


@dataclass(frozen=True)
class Tree:
    """One question, or some of its choices, as a model reads it.

    Args:
        question: its number among all.
        choices: the numbers of the choices that `branches` belong to.
        trunk: tokens before them, at least one.
        targets: the tokens of each of these choices.
        start: how many tokens come before the trunk.
    """

    question: int
    choices: Tokens
    trunk: Tokens
    branches: Branches
    targets: tuple[Tokens, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.trunk) + len(self.branches.tokens)


@dataclass(frozen=True)
class Batch:
    """Trees that go through the model together.

    Args:
        rows: trees side by side, whose slots do not see each other.
        shares: whether what their task begins with comes before them, and rows may hold several; else they are chains,
            one in a row, that a model reads as it reads any text.
    """

    rows: list[list[Tree]]
    shares: bool

    @property
    def width(self) -> int:
        return max(sum(map(len, row)) for row in self.rows)

    @property
    def slots(self) -> int:
        """What the model computes: tokens, padding included."""
        return len(self.rows) * self.width

    @property
    def trees(self) -> list[Tree]:
        return [tree for row in self.rows for tree in row]


@functools.lru_cache(maxsize=1024)
def branches_of(continuations: tuple[Tokens, ...]) -> Branches:
    """The branches of these choices, each one token or more."""
    tokens: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    paths: list[Tokens] = [()] * len(continuations)
    above: list[int] = []  # the nodes from the trunk to where the last choice ended
    for number in sorted(range(len(continuations)), key=lambda number: continuations[number][:-1]):
        inner = continuations[number][:-1]
        common = _common([tokens[node] for node in above], inner)
        for node in above[common:]:
            ends[node] = len(tokens)
        del above[common:]
        for token in inner[common:]:
            above.append(len(tokens))
            tokens.append(token)
            depths.append(len(above))
            ends.append(0)
        paths[number] = (-1, *above)
    for node in above:
        ends[node] = len(tokens)
    return Branches(tuple(tokens), tuple(depths), tuple(ends), tuple(paths))


def shared_beginning(questions: Sequence[Encoded]) -> int:
    """How many tokens all contexts have in common at their beginning, one of each left over at least."""
    contexts = [question.context for question in questions]
    return min(_common(min(contexts), max(contexts)), min(map(len, contexts)) - 1)


def tree_of(number: int, question: Encoded, start: int) -> Tree:
    """The question with all its choices, without its first `start` tokens."""
    choices = tuple(range(len(question.continuations)))
    branches = branches_of(question.continuations)
    return Tree(number, choices, question.context[start:], branches, question.continuations, start)


def chains_of(number: int, question: Encoded, most: int) -> list[Tree]:
    """The question as a model is asked that computes every choice in full.

    A chain for each choice, or for several that differ in their last token alone; of tokens beyond the `most` that the
    model's context holds, the first are left out.
    """
    found: dict[tuple[int, Tokens], list[int]] = {}
    for choice, continuation in enumerate(question.continuations):
        whole = (question.context + continuation)[-(most + 1) :]
        found.setdefault((len(continuation), whole[:-1]), []).append(choice)
    trees = []
    for (length, chain), choices in found.items():
        trunk, inner = chain[: len(chain) - length + 1], chain[len(chain) - length + 1 :]
        nodes = tuple(range(len(inner)))
        depths, ends = tuple(node + 1 for node in nodes), (len(inner),) * len(inner)
        branches = Branches(inner, depths, ends, ((-1, *nodes),) * len(choices))
        targets = tuple(question.continuations[choice] for choice in choices)
        trees.append(Tree(number, tuple(choices), trunk, branches, targets))
    return trees


def batches_of(trees: Sequence[Tree], slots: int, shares: bool) -> list[Batch]:
    """Batches of about so many slots, the longest questions first.

    Args:
        shares: see Batch.
    """
    batches: list[list[Tree]] = []
    used = widest = 0
    for tree in sorted(trees, key=lambda tree: (-len(tree.trunk), tree.question, tree.choices)):
        widest = max(widest, len(tree))
        needed = used + len(tree) if shares else widest * (len(batches[-1]) + 1 if batches else 1)
        if not batches or needed > slots:
            batches.append([])
            used, widest = 0, len(tree)
        batches[-1].append(tree)
        used += len(tree)
    return [batch_of(batch, shares) for batch in batches]


def batch_of(trees: Sequence[Tree], shares: bool) -> Batch:
    """A batch of these trees, in as many rows as leave the fewest slots empty."""
    ordered = sorted(trees, key=lambda tree: (-len(tree), tree.question, tree.choices))
    if not shares:
        return Batch([[tree] for tree in ordered], shares=False)
    filled = sum(map(len, trees))
    most = -(-filled // max(ROW, len(ordered[0])))
    tried = (Batch(_spread(ordered, rows), shares=True) for rows in range(-(-most // 2), most + 1))
    return min(tried, key=lambda batch: batch.slots)


def _spread(ordered: Sequence[Tree], count: int) -> list[list[Tree]]:
    """So many rows, each tree in the one that is emptiest."""
    rows: list[list[Tree]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for tree in ordered:
        used, row = filled[0]
        rows[row].append(tree)
        heapq.heapreplace(filled, (used + len(tree), row))
    return rows


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many items both have in common at their beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
