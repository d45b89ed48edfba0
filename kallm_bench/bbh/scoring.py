"""Log-likelihoods of the choices of questions, as lm-eval computes them, from a twentieth of the tokens.

lm-eval puts the whole prompt through the model once for each choice: few-shot text, question, choice. Here the tokens
that all prompts of a task begin with are computed once and their keys and values kept; each question follows them once,
with its choices as branches of a tree that do not see each other (trees.py); and many such trees stand side by side.
What a choice's tokens get is the same up to rounding: attention sees exactly the tokens before them.

So it is done, too, for answers behind prompts that a reply is asked with: where the reply would begin, and with as much
of the prompt left out as leaves room for it.

That takes a model which looks at positions and masks as they are given and whose cache holds a key for every token.
One batch is tried both ways; where the two differ, every choice is computed in full, as lm-eval does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.bbh.encoding import Encoded, Encoder, context_of, room_for
from kallm_bench.bbh.prompts import Prompt
from kallm_bench.bbh.tree_forward import Beginning, can_share, loglikelihoods
from kallm_bench.bbh.trees import Batch, batch_of, batches_of, chains_of, shared_beginning, tree_of
from kallm_bench.errors import BBHError
from kallm_bench.progress import Watch, nobody

SLOTS = {"cpu": 2048, "cuda": 32768}
"""Tokens that go through the model at once, padding included."""


@dataclass(frozen=True)
class ChoiceScores:
    """What a model makes of one question with choices.

    Args:
        task, index: which question.
        loglikelihoods: ln p of each choice after the prompt, summed over its tokens, in nats.
        forwarded_tokens: what went through the model for this question, padding included. What questions share is
            counted with one of them, so that a sum over all questions is what a run without interruption forwards.
        left_out_tokens: of the longest choice, from the left, because the model's context holds no more.
    """

    task: str
    index: int
    loglikelihoods: tuple[float, ...]
    forwarded_tokens: int
    left_out_tokens: int = 0


@dataclass(frozen=True)
class Forwarded:
    """Tokens that a set of questions takes: their common beginnings, their own, and what fills rows up."""

    beginnings: int
    questions: int
    padding: int

    @property
    def total(self) -> int:
        return self.beginnings + self.questions + self.padding


def score_choices(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    done: Collection[tuple[str, int]] = (),
    part: tuple[int, int] = (0, 1),
    slots: int | None = None,
    watch: Watch = nobody,
) -> Iterator[ChoiceScores]:
    """The log-likelihoods of all choices, a question at a time as batches are done, not in the order of `prompts`.

    Which questions go through the model together is decided by all `prompts`, also where most of them are done: a run
    that was stopped and went on gives what one in one go gives, to the bit, and computes at most one batch again.

    Args:
        model: in evaluation mode.
        prompts: all of them, with one choice or more each.
        done: (task, index) of those not to be asked again.
        part: this process's number and how many there are; each takes whole tasks.
        slots: tokens at once, padding included; None for what suits the device. Halved where memory runs out.

    Raises:
        BBHError: not even one question fits into memory; the model's context holds no more than a reply.
    """
    run = _Run(model, tokenizer, prompts, slots or SLOTS.get(model.device.type, SLOTS["cpu"]), watch)
    yield from run.scores(frozenset(done), *part)


def count_tokens(tokenizer: Any, prompts: Sequence[Prompt], context: int, slots: int = SLOTS["cuda"]) -> Forwarded:
    """What `score_choices` would put through a model with so long a context, but for the batch it tries both ways."""
    tasks = [
        _plan(name, questions, context, slots) for name, questions in _encoded(tokenizer, prompts, context).items()
    ]
    batches = [batch for task in tasks for batch in task.batches]
    own = sum(len(tree) for batch in batches for tree in batch.trees)
    return Forwarded(sum(len(task.beginning) for task in tasks), own, sum(batch.slots for batch in batches) - own)


@dataclass(frozen=True)
class _Task:
    """What is done for one task: its beginning once, and batches, of which those of trees come behind it."""

    name: str
    beginning: tuple[int, ...]
    batches: list[Batch]

    @property
    def slots(self) -> int:
        return len(self.beginning) + sum(batch.slots for batch in self.batches)


def _encoded(tokenizer: Any, prompts: Sequence[Prompt], context: int) -> dict[str, list[tuple[int, Encoded]]]:
    """The questions of each task, with their numbers among all, in so long a context."""
    encoder = Encoder(tokenizer)

    def fitted(question: Encoded) -> Encoded:
        return question.kept(room_for(question.prompt, context))

    found: dict[str, list[tuple[int, Encoded]]] = {prompt.task: [] for prompt in prompts}
    for task, questions in found.items():
        numbers = [number for number, prompt in enumerate(prompts) if prompt.task == task]
        questions += zip(numbers, map(fitted, encoder.encode([prompts[number] for number in numbers])), strict=True)
    return found


def _plan(name: str, questions: Sequence[tuple[int, Encoded]], context: int, slots: int, sharing: bool = True) -> _Task:
    fitting = [each for each in questions if sharing and not _left_out(each[1], context)]
    start = shared_beginning([question for _, question in fitting]) if fitting else 0
    trees = [tree_of(number, question, start) for number, question in fitting]
    in_trees = {number for number, _ in fitting}
    chains = [chain for each in questions if each[0] not in in_trees for chain in chains_of(*each, context)]
    batches = batches_of(trees, slots, shares=True) + batches_of(chains, slots, shares=False)
    return _Task(name, fitting[0][1].context[:start] if fitting else (), batches)


def _left_out(question: Encoded, context: int) -> int:
    """Tokens that do not fit; the last one of a choice is never read."""
    return question.cut_tokens + max(0, _length(question) - (context + 1))


def _length(question: Encoded) -> int:
    """Tokens of the prompt and its longest choice."""
    return len(question.context) + max(map(len, question.continuations))


def _too_long(what: str, tokens: int) -> BBHError:
    return BBHError(f"out of memory with {what}, of {tokens} tokens; take a smaller --dtype, or another device")


class _Run:
    """One pass over the questions."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt], slots: int, watch: Watch):
        self.model, self.prompts, self.watch = model, prompts, watch
        self.context = context_of(model, tokenizer)
        self.encoded = _encoded(tokenizer, prompts, self.context)
        self.questions = {number: question for each in self.encoded.values() for number, question in each}
        self.slots = slots
        self.told = self.total = 0

    def scores(self, done: frozenset[tuple[str, int]], part: int, parts: int) -> Iterator[ChoiceScores]:
        wanted = {number for number, prompt in enumerate(self.prompts) if (prompt.task, prompt.index) not in done}
        if not wanted:
            return
        try:
            sharing, tried = self._try()
        except torch.OutOfMemoryError as error:
            raise _too_long("the longest question", max(map(_length, self.questions.values()))) from error
        tasks = [_plan(*each, self.context, self.slots, sharing) for each in self.encoded.items()]
        mine = _dealt(tasks, parts)[part]
        self.total = sum(len(self.encoded[task.name]) for task in mine)
        self.told = self.total - sum(number in wanted for task in mine for number, _ in self.encoded[task.name])
        if cut := sum(_left_out(question, self.context) > 0 for question in self.questions.values()):
            self._tell(f"{cut} prompts do not fit into {self.context} tokens of context; their beginnings are left out")
        for task in mine:
            yield from self._task(task, wanted, tried if task is tasks[0] else 0)

    def _try(self) -> tuple[bool, int]:
        """Whether beginnings can be shared, and the tokens it took to find out: on the longest question that fits.

        The longest, since a model may see less far than its context is long, or turn its positions otherwise there.
        """
        fitting = [number for number, question in self.questions.items() if not _left_out(question, self.context)]
        if not fitting:
            return False, 0
        longest = max(fitting, key=lambda number: (len(self.questions[number].context), -number))
        task = self.prompts[longest].task
        several = [each for each in self.encoded[task] if each[0] in set(fitting)]
        start = shared_beginning([question for _, question in several])
        beside = next((each for each in several if each[0] != longest), several[0])
        trees = [tree_of(*each, start) for each in (beside, (longest, self.questions[longest]))]
        sharing, forwarded = can_share(self.model, self.questions[longest], trees)
        if not sharing:
            self._tell("this model does not let questions share what they begin with: every choice is computed in full")
        return sharing, forwarded

    def _task(self, task: _Task, wanted: set[int], extra: int) -> Iterator[ChoiceScores]:
        """Scores of a task's wanted questions; `extra` tokens are counted with its first."""
        beginning: Beginning | None = None
        found: dict[int, dict[int, float]] = defaultdict(dict)
        spent: dict[int, int] = defaultdict(int)
        waiting = deque(task.batches)
        extra += len(task.beginning)
        while waiting:
            batch = waiting.popleft()
            forwarded, extra = extra, 0
            if wanted.isdisjoint(tree.question for tree in batch.trees):
                continue
            try:
                if task.beginning and batch.shares and beginning is None:
                    beginning = Beginning(self.model, task.beginning)
                values = loglikelihoods(self.model, batch, beginning if batch.shares else None)
            except torch.OutOfMemoryError as error:
                if len(batch.trees) == 1:
                    raise _too_long(f"one question of {task.name}", len(task.beginning) + batch.slots) from error
                values = None
            if values is None:  # out here the error is gone, and with it its hold on memory
                torch.cuda.empty_cache()
                extra = forwarded
                waiting.appendleft(batch)
                waiting = self._halved(waiting, batch.slots)
                continue
            trees = batch.trees
            spent[trees[0].question] += forwarded + batch.slots - sum(map(len, trees))
            for tree, of_tree in zip(trees, values, strict=True):
                found[tree.question] |= zip(tree.choices, of_tree, strict=True)
                spent[tree.question] += len(tree)
            for number in dict.fromkeys(tree.question for tree in trees):
                question = self.questions[number]
                if len(found[number]) == len(question.continuations) and number in wanted:
                    yield self._scored(question, found.pop(number), spent.pop(number))

    def _halved(self, batches: deque[Batch], slots: int) -> deque[Batch]:
        """The batches with those of more than half of so many slots in two."""
        self._tell(f"out of memory, {slots // 2} tokens at once from here")
        halves: deque[Batch] = deque()
        for batch in batches:
            trees = batch.trees
            middle = len(trees) // 2 if batch.slots > slots // 2 else 0
            halves += [batch_of(half, batch.shares) for half in (trees[:middle], trees[middle:]) if half]
        return halves

    def _scored(self, question: Encoded, found: dict[int, float], forwarded: int) -> ChoiceScores:
        values = tuple(found[choice] for choice in range(len(question.continuations)))
        self.told += 1
        self._tell("")
        left_out = _left_out(question, self.context)
        return ChoiceScores(question.prompt.task, question.prompt.index, values, forwarded, left_out)

    def _tell(self, note: str) -> None:
        self.watch("questions", self.told, self.total, note)


def _dealt(tasks: Sequence[_Task], parts: int) -> list[list[_Task]]:
    """The tasks over so many processes, so that each has about as much to do."""
    dealt: list[list[_Task]] = [[] for _ in range(parts)]
    load = [0] * parts
    for task in sorted(tasks, key=lambda task: (-task.slots, task.name)):
        least = load.index(min(load))
        dealt[least].append(task)
        load[least] += task.slots
    return dealt
