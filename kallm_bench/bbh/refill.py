"""Replies by a Decoder: prompts of several beginnings at once, and a row is given to the next as soon as it is free.

Prompts are taken group by group, the longest beginning first and in each the longest prompt first, so that little is
padded. Groups overlap: while the last replies of one are under way, the next ones have begun.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kallm_bench.bbh.decoding import NOWHERE, Decoder, Grain, Room
from kallm_bench.bbh.jobs import Job
from kallm_bench.bbh.seats import Seats
from kallm_bench.bbh.shapes import LayerShape
from kallm_bench.bbh.stops import Suspects

COPIES = 16
"""Prompts that go through the model at once look at this many times their tokens, at most: a beginning is copied for
each of them."""

Ended = tuple[Job, list[int], str]
"""A job, its reply with the token that ended it, and why it ended."""


@dataclass(frozen=True)
class Way:
    """What all jobs of one run have in common.

    Args:
        own: tokens that a row has room for.
        fused: whether steps attend by the kernels.
        fixed: whether every shape follows from the prompt, for batch-invariant mode.
    """

    model: PreTrainedModel
    tokenizer: Any
    grain: Grain
    layers: tuple[LayerShape, ...]
    own: int
    fused: bool
    fixed: bool


@dataclass
class _Live:
    """A row in use."""

    job: Job
    reply: list[int] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """In use before the next step."""
        return len(self.job.own) - 1 + len(self.reply)


class Refill:
    """Jobs that wait, and those whose replies are under way.

    Args:
        most: replies at once.
    """

    def __init__(self, way: Way, jobs: Sequence[Job], most: int) -> None:
        self.way, self.most = way, most
        grain = way.grain
        rows = -(-(grain.fixed_rows if way.fixed else most) // grain.block) * grain.block
        self.waiting: dict[int, deque[Job]] = {}
        for job in sorted(jobs, key=lambda job: (-len(job.beginning), job.group, -len(job.own), job.number)):
            self.waiting.setdefault(job.group, deque()).append(job)
        beginning = max(len(job.beginning) for job in jobs)
        self.places: dict[int, int] = {}  # of groups whose beginning is in memory
        self.free_places = list(range(self._places(rows, beginning))) if beginning else []
        self.decoder = Decoder(
            way.model,
            way.layers,
            Room(rows, way.own, beginning, len(self.free_places)),
            grain,
            fused=way.fused,
            alone=way.fixed,
        )
        self.seats = Seats(rows, grain.block)
        self.live: dict[int, _Live] = {}
        vocabulary = way.model.config.get_text_config(decoder=True).vocab_size
        self.suspects = Suspects(way.tokenizer, {job.ending for job in jobs}, vocabulary)

    def replies(self) -> Iterator[Ended]:
        """All of them, each as it ends."""
        while self.waiting or self.live:
            few = self.most - len(self.live) < max(1, self.most // 8)  # to fill so few is not worth a prefill
            if self.waiting and not (self.live and few):
                self._fill()
            yield from self._step()

    def _places(self, rows: int, beginning: int) -> int:
        """Beginnings in memory at once: all, as long as they take no more than a quarter of what replies take."""
        groups = sum(bool(queue[0].beginning) for queue in self.waiting.values())
        fitting = max(2, rows * self.way.own // (4 * beginning))
        return min(groups, rows // self.way.grain.block, fitting)

    def _fill(self) -> None:
        """Gives free rows to the next jobs."""
        self._move(self.seats.rows)
        for group in list(self.waiting):
            if len(self.live) == self.most:
                return
            queue, free = self.waiting[group], self.seats.free(group)
            count = min(len(queue), len(free), self.most - len(self.live))
            if not count or not self._begin(group, queue[0]):
                continue
            self.decoder.share(free[:count], self.places.get(group, NOWHERE))
            for chunk in self._chunks([(row, queue.popleft()) for row in free[:count]]):
                self.decoder.admit({row: job.own for row, job in chunk})
                self.live.update({row: _Live(job) for row, job in chunk})
                self.seats.taken.update({row: group for row, _ in chunk})
            if not queue:
                del self.waiting[group]

    def _begin(self, group: int, job: Job) -> bool:
        """Whether the group's beginning is in memory, which it now is if there is a place."""
        if not job.beginning or group in self.places:
            return True
        if not self.free_places:
            return False
        self.places[group] = self.free_places.pop(0)
        self.decoder.begin(self.places[group], job.beginning)
        return True

    def _chunks(self, admitted: Sequence[tuple[int, Job]]) -> Iterator[list[tuple[int, Job]]]:
        """What goes through the model at once: of about so many tokens; in batch-invariant mode one prompt."""
        chunk: list[tuple[int, Job]] = []
        for row, job in admitted:
            widest = max(len(each.own) for _, each in (*chunk[:1], (row, job)))  # the longest come first
            most = self.way.grain.prefill_tokens
            read = COPIES * most < (len(job.beginning) + widest) * (len(chunk) + 1)
            if chunk and (self.way.fixed or read or widest * (len(chunk) + 1) > most):
                yield chunk
                chunk = []
            chunk.append((row, job))
        yield chunk

    def _step(self) -> Iterator[Ended]:
        """Takes a few steps, and gives the replies that ended in them."""
        grain, decoder = self.way.grain, self.decoder
        count = min(grain.steps, max(each.job.ending.most - len(each.reply) for each in self.live.values()))
        rows, columns = self.seats.rows, self.way.own
        if not self.way.fixed:
            rows = self._fewest_rows()
            if any(row >= rows for row in self.seats.taken):
                self._move(rows)
            columns = min(columns, -(-(self._columns() + count) // grain.own) * grain.own)
        chosen = decoder.steps(count, rows, columns)
        suspicious: list[bool] = np.any(self.suspects.among(chosen), axis=1).tolist()
        ended: list[tuple[int, tuple[int, str]]] = []
        for row, tokens in zip(range(rows), chosen.tolist(), strict=True):
            if (each := self.live.get(row)) is None:
                continue
            seen = len(each.reply)
            each.reply += tokens
            if not (suspicious[row] or len(each.reply) >= each.job.ending.most):
                continue
            if end := each.job.ending.find(self.way.tokenizer, each.reply, seen):
                ended.append((row, end))
        found = [(self.live[row].job, self.live[row].reply[: end[0]], end[1]) for row, end in ended]
        self._release([row for row, _ in ended])
        yield from found

    def _release(self, rows: Sequence[int]) -> None:
        """Frees rows, blocks without a reply, and places of beginnings that nobody needs any more."""
        if not rows:
            return
        block = self.way.grain.block
        for row in rows:
            del self.live[row], self.seats.taken[row]
        self.decoder.release(rows)
        used = {row // block for row in self.seats.taken}
        if empty := [row for row in rows if row // block not in used]:
            self.decoder.share(empty, NOWHERE)
        needed = {*self.seats.taken.values(), *self.waiting}
        for group in [group for group in self.places if group not in needed]:
            self.free_places.append(self.places.pop(group))

    def _fewest_rows(self) -> int:
        """Of a step that has room for all rows in use."""
        rows, grain, needed = self.seats.rows, self.way.grain, self.seats.needed()
        while rows > grain.least_rows and -(-rows // grain.rows) >= needed:
            rows = max(grain.least_rows, -(-rows // grain.rows))
        return rows

    def _columns(self) -> int:
        return max((each.columns for each in self.live.values()), default=0)

    def _move(self, within: int) -> None:
        """Moves rows in use together, into the first so many rows."""
        moves = self.seats.together(within)
        if not moves:
            return
        self.decoder.move(moves, self._columns())
        left = {*moves} - {*moves.values()}
        self.decoder.release(sorted(left))
        self.live = {moves.get(row, row): each for row, each in self.live.items()}
        used = {row // self.way.grain.block for row in self.seats.taken}
        if empty := [row for row in left if row // self.way.grain.block not in used]:
            self.decoder.share(empty, NOWHERE)


def own_tokens(job: Job, grain: Grain, multiple: int) -> int:
    """That a row needs for it, which may run on beyond its end; a multiple of so many."""
    return -(-(len(job.own) + job.ending.most + grain.steps) // multiple) * multiple


def free_memory(model: PreTrainedModel) -> None:
    """Gives what nothing holds any more back to the device."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
