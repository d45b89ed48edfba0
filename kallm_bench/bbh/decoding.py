"""One token for every reply at a step, from memory that is laid out once.

Each reply has a row of a cache of fixed size. Rows stand in blocks, and all rows of a block share a beginning; the
beginnings lie beside the rows, each once, several at a time. The last token of a prompt is not prefilled: it is the
first that a step takes, so that every token of a reply comes out of a step. A step reads what it needs from tensors
that never move and leaves its tokens in one of them, so that on a GPU it is recorded once for each number of rows and
replayed, and Python looks at the tokens only every so many steps.

Rows beyond those in use are left out of a step in coarse strides: so there are few to record.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kallm_bench.bbh.attention import FusedSight, Neighbours, Pair, PromptSight, Sight, StepSight, replies_attention
from kallm_bench.bbh.norms import norms_in_one
from kallm_bench.bbh.shapes import LayerShape

NOWHERE = -1
"""The place of a block whose rows have no beginning."""


@dataclass(frozen=True)
class Grain:
    """How coarse shapes are.

    Args:
        steps: between looks at the tokens; each look waits for the device.
        rows: rows in a step are those of the decoder over powers of this.
        least_rows: in a step.
        block: rows that share a beginning.
        own: columns in a step are a multiple of this, where they are part of its shape.
        fixed_rows: of every step in batch-invariant mode.
        prefill_tokens: that go through the model at once, about.
    """

    steps: int
    rows: int
    least_rows: int
    block: int
    own: int
    fixed_rows: int
    prefill_tokens: int


GRAINS = {
    "cuda": Grain(steps=16, rows=4, least_rows=16, block=16, own=256, fixed_rows=64, prefill_tokens=32768),
}
CPU_GRAIN = Grain(steps=2, rows=2, least_rows=1, block=4, own=32, fixed_rows=16, prefill_tokens=1024)


def grain_of(device: torch.device) -> Grain:
    return GRAINS.get(device.type, CPU_GRAIN)


@dataclass(frozen=True)
class Room:
    """How much a Decoder has memory for.

    Args:
        rows: replies at once, a multiple of the grain's block.
        own: tokens of a row: what follows the beginning in its prompt, and the reply.
        beginning: tokens of a beginning, at most.
        places: beginnings at once.
    """

    rows: int
    own: int
    beginning: int
    places: int


class _Rows(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer: (R, N, L, D) each, of which a step sees the first rows and columns."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, numbers: Tensor, fused: bool) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.positions, self.numbers, self.columns = positions, numbers, keys.shape[2]
        self.fused = fused

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What there is to look at; for the kernels only what is new, which they keep themselves."""
        if self.fused:
            return key_states, value_states
        rows = len(key_states)
        where = (self.numbers[:rows], slice(None), self.positions[:rows])
        self.keys[where] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[where] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:rows, :, : self.columns], self.values[:rows, :, : self.columns]


class Decoder:
    """Memory for so many replies of a model, and the steps that fill it. Every method works in inference mode.

    Args:
        layers: of the model's cache, see `shapes.layers_of`.
        fused: whether steps attend by the kernels.
        alone: whether each block attends by products of its own, as batch-invariant mode wants, also where its
            neighbours have the same beginning.
        recorded: whether steps are recorded as CUDA graphs, where that can be done: on a GPU, by the kernels.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[LayerShape],
        room: Room,
        grain: Grain,
        *,
        fused: bool = False,
        alone: bool = False,
        recorded: bool = True,
    ) -> None:
        self.model, self.room, self.grain, self.fused, self.alone = model, room, grain, fused, alone
        self.recorded = recorded and fused and model.device.type == "cuda"
        rows, device = room.rows, model.device
        with torch.inference_mode():
            self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
            self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the next token, in its row
            self.used = torch.zeros(rows, dtype=torch.long, device=device)  # 1 in use, 0 not: there no token is kept
            self.starts = torch.zeros(rows, dtype=torch.long, device=device)  # of the beginning, among all
            self.before = torch.zeros(rows, dtype=torch.long, device=device)  # tokens of the beginning
            self.chosen = torch.zeros(rows, grain.steps, dtype=torch.long, device=device)
            self.step_number = torch.zeros(1, dtype=torch.long, device=device)
            numbers = torch.arange(rows, device=device)
            own = [each.zeros(device, rows, tokens=room.own) for each in layers]
            self.cache = Cache(layers=[_Rows(*pair, self.positions, numbers, fused) for pair in own])
            self.common = [each.zeros(device, tokens=room.places * room.beginning) for each in layers]
        self._lengths = [0] * room.places
        self._places = [NOWHERE] * (rows // grain.block)  # of each block
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        config = model.config.get_text_config(decoder=True)
        self._last = (getattr(config, "max_position_embeddings", None) or 2**31) - 1

    @torch.inference_mode()
    def begin(self, place: int, beginning: Sequence[int]) -> None:
        """Computes a beginning, of one token at least, in a place that no row in use has."""
        start = place * self.room.beginning
        found = self._prefill(torch.tensor([list(beginning)], device=self.model.device), PromptSight(()), 0)
        for (keys, values), layer in zip(self.common, found, strict=True):
            keys[:, start : start + len(beginning)] = layer.keys[0]
            values[:, start : start + len(beginning)] = layer.values[0]
        self._lengths[place] = len(beginning)

    def share(self, rows: Sequence[int], place: int) -> None:
        """The rows' blocks have the beginning in this place from now on, or none where it is NOWHERE."""
        for row in rows:
            self._places[row // self.grain.block] = place
        self._tell_places()

    @torch.inference_mode()
    def admit(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Prepares rows for new prompts: row -> its tokens without the beginning, at least one. They are padded.

        All of these rows have one beginning, see `share`.
        """
        width = max(map(len, prompts.values())) - 1  # the last is taken by the first step
        device = self.model.device
        where = torch.tensor(list(prompts), device=device)
        if width:
            padded = [list(tokens[:-1]) + [0] * (width - len(tokens) + 1) for tokens in prompts.values()]
            tokens = self._beginning(next(iter(prompts)))
            pairs = [(keys[:, tokens], values[:, tokens]) for keys, values in self.common]
            shared = tokens.stop - tokens.start
            found = self._prefill(torch.tensor(padded, device=device), PromptSight(pairs if shared else ()), shared)
            for mine, layer in zip(self.cache.layers, found, strict=True):
                mine.keys[where, :, :width] = layer.keys  # what was padded is overwritten before anything looks there
                mine.values[where, :, :width] = layer.values
        self.tokens[where] = torch.tensor([tokens[-1] for tokens in prompts.values()], device=device)
        self.positions[where] = torch.tensor([len(tokens) - 1 for tokens in prompts.values()], device=device)
        self.used[where] = 1

    @torch.inference_mode()
    def move(self, moves: Mapping[int, int], columns: int) -> None:
        """Copies rows over others, all at once: source -> target; a target's block takes the source's beginning.

        Args:
            columns: no row has more that matter.
        """
        if not moves:
            return
        sources = torch.tensor(list(moves), device=self.model.device)
        targets = torch.tensor(list(moves.values()), device=self.model.device)
        for layer in self.cache.layers:
            layer.keys[targets, :, :columns] = layer.keys[sources, :, :columns]
            layer.values[targets, :, :columns] = layer.values[sources, :, :columns]
        for each in (self.tokens, self.positions, self.used):
            each[targets] = each[sources]
        block, places = self.grain.block, list(self._places)
        for source, target in moves.items():
            self._places[target // block] = places[source // block]
        self._tell_places()

    @torch.inference_mode()
    def release(self, rows: Sequence[int]) -> None:
        """These rows are no longer in use: they go on in steps, but look at one token of their own alone."""
        where = torch.tensor(list(rows), dtype=torch.long, device=self.model.device)
        self.positions[where] = 0
        self.used[where] = 0

    @torch.inference_mode()
    def steps(self, count: int, rows: int, columns: int) -> NDArray[np.int64]:
        """Takes `count` steps, at most as many as the grain has, of the first `rows`: their tokens, (rows, count).

        Args:
            columns: no row in use is longer after them.
        """
        self.step_number.zero_()
        if self.recorded and rows not in self._graphs:
            self._record(rows)
        if rows in self._graphs:
            for _ in range(count):
                self._graphs[rows].replay()
        else:
            with replies_attention(self.model):
                for _ in range(count):
                    self._step(rows, columns)
        found: NDArray[np.int64] = self.chosen[:rows, :count].cpu().numpy()
        return found

    @torch.inference_mode()
    def logits(self, rows: int, columns: int) -> Tensor:
        """(rows, vocabulary): of the next token of each row, which `tokens` and `positions` still have to be told."""
        for layer in self.cache.layers:
            layer.columns = columns
        given = self.model(
            input_ids=self.tokens[:rows, None],
            position_ids=(self.before[:rows, None] + self.positions[:rows, None]).clamp(max=self._last),
            past_key_values=self.cache,
            use_cache=True,
            kallm_sight=self._sight(rows, columns),
        )
        found: Tensor = given.logits[:, -1]
        return found

    def _sight(self, rows: int, columns: int) -> Sight:
        if self.fused:
            own: list[Pair] = [(layer.keys, layer.values) for layer in self.cache.layers]
            return FusedSight(own, self.positions, self.common, self.starts, self.before, self.grain.block)
        visible = torch.arange(columns, device=self.model.device) <= self.positions[:rows, None]
        return StepSight(self.common, self._neighbours(rows), visible[:, None, None, :])

    def _neighbours(self, rows: int) -> list[Neighbours]:
        """Blocks in runs of the same beginning, or one by one."""
        block = self.grain.block
        starts = range(0, rows, block)
        runs = itertools.groupby(starts, key=lambda at: at if self.alone else self._places[at // block])
        found = []
        for _, run in runs:
            first, *others = run
            end = min([first, *others][-1] + block, rows)
            found.append(Neighbours(slice(first, end), self._beginning(first)))
        return found

    def _beginning(self, row: int) -> slice:
        """Where the tokens of a row's beginning are among all."""
        place = self._places[row // self.grain.block]
        start = max(0, place) * self.room.beginning
        return slice(start, start + (0 if place == NOWHERE else self._lengths[place]))

    def _tell_places(self) -> None:
        spans = [self._beginning(at) for at in range(0, self.room.rows, self.grain.block)]
        told = torch.tensor([(span.start, span.stop - span.start) for span in spans]).T  # of each block
        with torch.inference_mode():
            of_rows = told.repeat_interleave(self.grain.block, dim=1).to(self.model.device)
            self.starts.copy_(of_rows[0])
            self.before.copy_(of_rows[1])

    def _step(self, rows: int, columns: int) -> None:
        """Takes one step: everything it changes lies in tensors that were there before."""
        tokens = self.logits(rows, columns).argmax(dim=-1)
        self.chosen[:rows].index_copy_(1, self.step_number, tokens[:, None])
        self.tokens[:rows] = tokens
        following = self.positions[:rows] + self.used[:rows]
        self.positions[:rows] = following.clamp(max=self.room.own - 1)  # a row may run beyond its end
        self.step_number += 1

    def _record(self, rows: int) -> None:
        """Keeps a graph of one step, and leaves everything as it was: what a row wrote ahead, its steps write again."""
        device, home = self.model.device, torch.cuda.current_stream(self.model.device)
        changed = (self.tokens, self.positions, self.step_number)
        before = [each.clone() for each in changed]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(home)
        try:
            with replies_attention(self.model), norms_in_one(self.model):
                with torch.cuda.stream(side):
                    self._step(rows, self.room.own)  # compiles, and libraries make what they keep
                home.wait_stream(side)
                self.step_number.zero_()
                with torch.cuda.graph(graph, pool=self._pool):
                    self._step(rows, self.room.own)
            self._graphs[rows] = graph
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(home)
            raise
        except Exception:  # whatever in foreign code forbids recording, it can still be launched each time
            torch.cuda.set_stream(home)  # a recording that breaks off leaves its own behind
            torch.cuda.synchronize(device)
            self.recorded = False
        for each, value in zip(changed, before, strict=True):
            each.copy_(value)

    def _prefill(self, ids: Tensor, sight: PromptSight, start: int) -> Any:
        """The cache's layers with keys and values (B, N, T, D) of `ids` (B, T) at the positions from `start` on."""
        cache = DynamicCache()
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).clamp(max=self._last)
        with replies_attention(self.model):
            self.model(
                input_ids=ids,
                position_ids=positions.expand_as(ids),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                kallm_sight=sight,
            )
        return cache.layers
