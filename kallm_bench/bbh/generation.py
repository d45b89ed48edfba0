"""Greedy answers to many prompts at once: a row is refilled as soon as its answer has ended.

Prompts that begin alike share what was computed of their beginning. See `decoding` for a step, `stops` for endings; a
model that `decoding` cannot run as it runs itself is asked by transformers' `generate`, batch by batch.

What a row gets depends on the others by rounding alone: a matrix product of another shape adds in another order. In
batch-invariant mode every shape follows from the prompt: steps have a fixed number of rows, in use or not, columns that
the prompt decides, and prompts are prefilled one by one.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.bbh import plain
from kallm_bench.bbh.attention import UnsupportedError
from kallm_bench.bbh.decoding import Decoder, Grain, check, grain_of
from kallm_bench.bbh.encoding import Encoder, Tokens, context_of, tokens_of
from kallm_bench.bbh.prompts import Prompt
from kallm_bench.bbh.stops import Ending
from kallm_bench.errors import BBHError
from kallm_bench.progress import Watch, nobody

SHORTEST_BEGINNING = 64
"""Tokens of a beginning that is worth sharing: replies with different beginnings are never decoded together."""

FIXED_COLUMNS = 256
"""In batch-invariant mode the columns of a step are a multiple of this."""


@dataclass(frozen=True)
class Reply:
    """What a model said to a prompt.

    Args:
        number: of the prompt, in the sequence that was given.
        tokens: ids, with the one that ended it.
        text: of the tokens without special ones, up to the first stop.
        why: what ended it: "eos" (a token of the model's own), "stop" (a text) or "length".
        prompt_tokens: in the prompt, as it was asked.
        shared_tokens: how many of them are the beginning that was computed once for many prompts.
        cut_tokens: how many were cut from the left, because the prompt and its reply exceed the model's context.
    """

    number: int
    tokens: tuple[int, ...]
    text: str
    why: str
    prompt_tokens: int
    shared_tokens: int
    cut_tokens: int


@dataclass(frozen=True)
class _Job:
    """A prompt in tokens: the beginning it shares, maybe empty, and its own, at least one."""

    number: int
    beginning: tuple[int, ...]
    own: tuple[int, ...]
    ending: Ending
    cut_tokens: int

    def shape(self, grain: Grain, columns: int) -> tuple[int, int]:
        """The columns of its own and of its beginning that it needs; a row may run on beyond its end."""
        own = len(self.own) + self.ending.most + grain.steps
        return -(-own // columns) * columns, -(-len(self.beginning) // grain.beginning) * grain.beginning


@dataclass
class _Live:
    """A row in use."""

    job: _Job
    reply: list[int] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """In use before the next step."""
        return len(self.job.own) - 1 + len(self.reply)


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    batch_invariant: bool = False,
    watch: Watch = nobody,
    grain: Grain | None = None,
) -> Iterator[Reply]:
    """Greedy replies to prompts, each as soon as it is there, in any order. The model's weights and settings stay.

    Args:
        prompts: none may be empty.
        batch_size: replies at once; halved where memory runs out.
        batch_invariant: replies do not depend on the batch size and on what else is asked, and take longer. Steps have
            `grain.fixed_rows` rows, which is the most that are asked at once.
        grain: of shapes; None for the device's.

    Raises:
        BBHError: an empty prompt, or more new tokens than the model's context has room for.
    """
    grain = grain or grain_of(model.device)
    jobs = _jobs(model, tokenizer, prompts)
    if not jobs:
        return
    progress = _Progress(watch, len(jobs))
    if cut := sum(job.cut_tokens > 0 for job in jobs):
        progress.tell(f"{cut} prompts cut from the left to fit the context of {context_of(model, tokenizer):,} tokens")
    try:
        check(model, max(len(job.beginning) + len(job.own) + job.ending.most for job in jobs))
    except UnsupportedError as error:
        progress.tell(f"by transformers' generate ({error})")
        yield from _by_generate(model, tokenizer, jobs, 1 if batch_invariant else batch_size, progress)
        return
    if not batch_invariant:
        shapes = [job.shape(grain, grain.own) for job in jobs]
        shape = (max(own for own, _ in shapes), max(beginning for _, beginning in shapes))
        yield from _by_decoder(_Run(model, tokenizer, grain, shape, progress), jobs, min(batch_size, len(jobs)))
        return
    by_shape = sorted(jobs, key=lambda job: job.shape(grain, FIXED_COLUMNS))
    for shape, alike in itertools.groupby(by_shape, key=lambda job: job.shape(grain, FIXED_COLUMNS)):
        run = _Run(model, tokenizer, grain, shape, progress, fixed=True)
        yield from _by_decoder(run, list(alike), min(batch_size, grain.fixed_rows))


class _Progress:
    """Tells how many replies there are, and how fast tokens come."""

    def __init__(self, watch: Watch, total: int) -> None:
        self.watch, self.total, self.done, self.tokens = watch, total, 0, 0
        self.start = time.perf_counter()

    def add(self, tokens: int) -> None:
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        self.tell(f"{self.tokens / (time.perf_counter() - self.start):,.0f} tokens/s")

    def tell(self, note: str) -> None:
        self.watch("replies", self.done, self.total, note)


@dataclass(frozen=True)
class _Run:
    """What all jobs of a Decoder have in common; `shape` as of `_Job.shape`, `fixed` in batch-invariant mode."""

    model: PreTrainedModel
    tokenizer: Any
    grain: Grain
    shape: tuple[int, int]
    progress: _Progress
    fixed: bool = False


def _jobs(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Prompt]) -> list[_Job]:
    """The prompts in tokens. A beginning is shared as far as its tokens are the same with and without a question."""
    context = context_of(model, tokenizer)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    tokens = frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)
    jobs = []
    for number, (prompt, (ids, beginning)) in enumerate(zip(prompts, _encode(tokenizer, prompts), strict=True)):
        room = context - prompt.max_new_tokens
        if not ids:
            raise BBHError(f"{prompt.task} {prompt.index}: the prompt is empty")
        if prompt.max_new_tokens < 1 or room < 1:
            raise BBHError(
                f"{prompt.task} {prompt.index}: {prompt.max_new_tokens} new tokens; the model's context has {context}, "
                "and the prompt needs one at least; ask for fewer"
            )
        cut = max(0, len(ids) - room)
        shared = 0 if cut else _agreeing(ids[:-1], beginning)
        shared = shared if shared >= SHORTEST_BEGINNING else 0
        ending = Ending(tokens, tuple(stop for stop in prompt.stops if stop), prompt.max_new_tokens)
        jobs.append(_Job(number, ids[cut : cut + shared], ids[cut + shared :], ending, cut))
    return jobs


def _encode(tokenizer: Any, prompts: Sequence[Prompt]) -> list[tuple[Tokens, Tokens]]:
    """Prompts in tokens, each with what the beginning that it shares comes to by itself."""
    encoder = Encoder(tokenizer)
    alike: dict[tuple[str, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        alike.setdefault((prompt.shared, prompt.templated), []).append(number)
    found: dict[int, tuple[Tokens, Tokens]] = {}
    for (shared, templated), numbers in alike.items():
        [beginning] = tokens_of(tokenizer, [shared], templated) if shared else [()]
        cut = encoder.contexts([prompts[number].text for number in numbers], len(shared), templated)
        found |= {number: (tokens, beginning) for number, tokens in zip(numbers, cut, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _agreeing(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, beginning, strict=False)))


def _by_decoder(run: _Run, jobs: Iterable[_Job], rows: int) -> Iterator[Reply]:
    """Replies by a Decoder of so many rows, and of half as many where memory runs out."""
    missing = {job.number: job for job in jobs}
    while missing:
        try:
            for reply in _decode(run, list(missing.values()), rows):
                del missing[reply.number]
                yield reply
            return
        except torch.OutOfMemoryError:
            if rows == 1 or run.fixed:
                raise
        rows //= 2  # outside the handler, which keeps what was allocated
        _free_memory(run)
        run.progress.tell(f"out of memory, {rows} at once from here")


def _decode(run: _Run, jobs: Sequence[_Job], most: int) -> Iterator[Reply]:
    """Replies to jobs, `most` at once; beginnings one after the other, the longest of what follows first."""
    rows = run.grain.fixed_rows if run.fixed else most
    decoder = Decoder(run.model, rows, *run.shape, run.grain)
    ordered = sorted(jobs, key=lambda job: (-len(job.beginning), job.beginning, -len(job.own), job.number))
    for beginning, group in itertools.groupby(ordered, key=lambda job: job.beginning):
        decoder.begin(beginning)
        queue, live = deque(group), dict[int, _Live]()
        while queue or live:
            if queue and (not live or most - len(live) >= max(1, most // 8)):  # a few at once: prefilling has a price
                _fill(run, decoder, queue, live, most)
            yield from _step(run, decoder, live)


def _fill(run: _Run, decoder: Decoder, queue: deque[_Job], live: dict[int, _Live], most: int) -> None:
    """Gives the free rows to the next jobs. Changes `queue` and `live`."""
    free = (row for row in range(most) if row not in live)
    new: dict[int, _Job] = {}
    for row in list(free):
        if not queue:
            break
        widest = max(len(job.own) for job in (*new.values(), queue[0]))
        if new and (run.fixed or widest * (len(new) + 1) > run.grain.prefill_tokens):
            _admit(decoder, new, live)
            new = {}
        new[row] = queue.popleft()
    if new:
        _admit(decoder, new, live)


def _admit(decoder: Decoder, new: dict[int, _Job], live: dict[int, _Live]) -> None:
    decoder.admit({row: job.own for row, job in new.items()})
    live.update({row: _Live(job) for row, job in new.items()})


def _step(run: _Run, decoder: Decoder, live: dict[int, _Live]) -> Iterator[Reply]:
    """Takes a few steps, and gives the replies that ended in them. Changes `live`."""
    count = min(run.grain.steps, max(each.job.ending.most - len(each.reply) for each in live.values()))
    rows, columns = decoder.rows, decoder.own
    if not run.fixed:
        rows = _gather(run, decoder, live)
        needed = max(each.columns for each in live.values()) + count
        columns = min(columns, -(-needed // run.grain.own) * run.grain.own)
    chosen = decoder.steps(count, rows, columns)
    for row, each in list(live.items()):
        seen = len(each.reply)
        each.reply += chosen[row]
        if end := each.job.ending.find(run.tokenizer, each.reply, seen):
            del live[row]
            yield _reply(run.tokenizer, run.progress, each.job, each.reply[: end[0]], end[1])


def _gather(run: _Run, decoder: Decoder, live: dict[int, _Live]) -> int:
    """Moves the rows in use together, where a smaller step then does; how many rows that has. Changes `live`."""
    rows = decoder.rows
    while -(-rows // run.grain.rows) >= len(live) and rows > 1:
        rows = -(-rows // run.grain.rows)
    free = iter([row for row in range(rows) if row not in live])
    for row in [row for row in live if row >= rows]:
        target = next(free)
        decoder.move(row, target)
        live[target] = live.pop(row)
    return rows


def _by_generate(
    model: PreTrainedModel, tokenizer: Any, jobs: Sequence[_Job], batch_size: int, progress: _Progress
) -> Iterator[Reply]:
    """Replies by transformers' generate; the longest prompts first, so that little is padded."""
    missing = sorted(jobs, key=lambda job: (-len(job.beginning) - len(job.own), job.number))
    while missing:
        batch = missing[:batch_size]
        try:
            found = plain.replies(
                model, tokenizer, [job.beginning + job.own for job in batch], [job.ending for job in batch]
            )
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            found = []
        if not found:
            batch_size = max(1, len(batch) // 2)
            progress.tell(f"out of memory, {batch_size} at once from here")
            continue
        del missing[:batch_size]
        for job, (tokens, why) in zip(batch, found, strict=True):
            yield _reply(tokenizer, progress, job, tokens, why)


def _reply(tokenizer: Any, progress: _Progress, job: _Job, tokens: Sequence[int], why: str) -> Reply:
    progress.add(len(tokens))
    text = job.ending.cut(tokenizer.decode(tokens, skip_special_tokens=True))
    length, shared = len(job.beginning) + len(job.own), len(job.beginning)
    return Reply(job.number, tuple(tokens), text, why, length, shared, job.cut_tokens)


def _free_memory(run: _Run) -> None:
    if run.model.device.type == "cuda":
        torch.cuda.empty_cache()
