"""Greedy answers to many prompts at once: a row is refilled as soon as its answer has ended.

Prompts that begin alike share what was computed of their beginning. See `decoding` for a step, `refill` for who takes
it, `stops` for endings; a model that `decoding` cannot run as it runs itself is asked by transformers' `generate`,
batch by batch.

What a row gets depends on the others by rounding alone: a matrix product of another shape adds in another order. In
batch-invariant mode every shape follows from the prompt: steps have a fixed number of rows, in use or not, columns that
the prompt decides, and prompts are prefilled one by one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.bbh import plain
from kallm_bench.bbh.attention import UnsupportedError
from kallm_bench.bbh.comparison import check
from kallm_bench.bbh.decoding import Grain, grain_of
from kallm_bench.bbh.encoding import context_of
from kallm_bench.bbh.jobs import Job, make_jobs
from kallm_bench.bbh.prompts import Prompt
from kallm_bench.bbh.refill import Refill, Way, free_memory, own_tokens
from kallm_bench.bbh.shapes import ROWS_ELSEWHERE, kernels_fit, layers_of, rows_that_fit
from kallm_bench.progress import Watch, nobody

FIXED_COLUMNS = 256
"""In batch-invariant mode the columns of a step are a multiple of this, where its shape has columns."""


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


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | None = None,
    batch_invariant: bool = False,
    watch: Watch = nobody,
    grain: Grain | None = None,
    kernels: bool = True,
) -> Iterator[Reply]:
    """Greedy replies to prompts, each as soon as it is there, in any order. The model's weights and settings stay.

    Args:
        prompts: none may be empty.
        batch_size: replies at once, halved where memory runs out; None for as many as fit, see `shapes`.
        batch_invariant: replies do not depend on the batch size and on what else is asked, and take longer. Steps have
            `grain.fixed_rows` rows, which is the most that are asked at once.
        grain: of shapes; None for the device's.
        kernels: whether steps may attend by the kernels, where these fit.

    Raises:
        BBHError: an empty prompt, or more new tokens than the model's context has room for.
    """
    jobs = make_jobs(model, tokenizer, prompts)
    if not jobs:
        return
    progress = _Progress(watch, len(jobs))
    if cut := sum(job.cut_tokens > 0 for job in jobs):
        progress.tell(f"{cut} prompts cut from the left to fit the context of {context_of(model, tokenizer):,} tokens")
    try:
        way = _way(model, tokenizer, jobs, grain or grain_of(model.device), kernels, batch_invariant, progress)
    except UnsupportedError as error:
        progress.tell(f"by transformers' generate ({error})")
        at_once = 1 if batch_invariant else batch_size or ROWS_ELSEWHERE
        yield from _by_generate(model, tokenizer, jobs, at_once, progress)
        return
    for own, alike in _by_columns(way, jobs):
        run = replace(way, own=own)
        most = min(batch_size or rows_that_fit(model.device, way.layers, own), len(alike))
        yield from _by_decoder(run, alike, min(most, way.grain.fixed_rows) if batch_invariant else most, progress)


def _way(
    model: PreTrainedModel,
    tokenizer: Any,
    jobs: Sequence[Job],
    grain: Grain,
    kernels: bool,
    fixed: bool,
    progress: _Progress,
) -> Way:
    """How the jobs are done: by the kernels if they fit and agree, else in plain PyTorch. UnsupportedError: neither."""
    layers = layers_of(model, max(len(job.tokens) + job.ending.most for job in jobs))
    own = max(own_tokens(job, grain, grain.own) for job in jobs)
    way = Way(model, tokenizer, grain, layers, own, fused=kernels and kernels_fit(model.device, layers), fixed=fixed)
    if way.fused:
        try:
            check(model, layers, grain, fused=True)
            return way
        except UnsupportedError as error:
            progress.tell(f"attention without kernels ({error})")
    check(model, layers, grain, fused=False)
    return replace(way, fused=False)


def _by_columns(way: Way, jobs: Sequence[Job]) -> Iterator[tuple[int, list[Job]]]:
    """Jobs that may stand beside each other, and the columns they have: in batch-invariant mode only of as many."""
    if not way.fixed or way.fused:
        yield way.own, list(jobs)
        return

    def columns(job: Job) -> int:
        return own_tokens(job, way.grain, FIXED_COLUMNS)

    for own, alike in itertools.groupby(sorted(jobs, key=columns), key=columns):
        yield own, list(alike)


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


def _by_decoder(way: Way, jobs: Sequence[Job], most: int, progress: _Progress) -> Iterator[Reply]:
    """Replies by a Decoder, so many at once, and half as many where memory runs out."""
    missing = {job.number: job for job in jobs}
    while missing:
        try:
            for job, tokens, why in Refill(way, list(missing.values()), most).replies():
                del missing[job.number]
                yield _reply(way.tokenizer, progress, job, tokens, why)
            return
        except torch.OutOfMemoryError:
            if most == 1 or way.fixed:
                raise
        most //= 2  # outside the handler, which keeps what was allocated
        free_memory(way.model)
        progress.tell(f"out of memory, {most} at once from here")


def _by_generate(
    model: PreTrainedModel, tokenizer: Any, jobs: Sequence[Job], batch_size: int, progress: _Progress
) -> Iterator[Reply]:
    """Replies by transformers' generate; the longest prompts first, so that little is padded."""
    missing = sorted(jobs, key=lambda job: (-len(job.tokens), job.number))
    while missing:
        batch = missing[:batch_size]
        try:
            found = plain.replies(model, tokenizer, [job.tokens for job in batch], [job.ending for job in batch])
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


def _reply(tokenizer: Any, progress: _Progress, job: Job, tokens: Sequence[int], why: str) -> Reply:
    progress.add(len(tokens))
    text = job.ending.cut(tokenizer.decode(tokens, skip_special_tokens=True))
    return Reply(job.number, tuple(tokens), text, why, len(job.tokens), len(job.beginning), job.cut_tokens)
