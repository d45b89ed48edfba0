"""The forward pass as training needs it: frozen blocks without a graph, no logits, documents apart without a mask.

What lies below the first block that learns is run in the compute dtype and keeps nothing for backward; what it gives
can be kept on disk for the next seed (see prefix_cache). On a GPU each block is compiled, and attention is told where
documents begin. Nothing here changes what is computed beyond rounding: where an architecture does not allow a shortcut,
which is tried once on a few tokens, the plain way is taken.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from transformers import PreTrainedModel

from kallm_bench.models.anatomy import find_blocks
from kallm_bench.training.attention import UnsupportedError, bounds_of, packed_attention
from kallm_bench.training.compiling import can_compile
from kallm_bench.training.data import IGNORE, Rows
from kallm_bench.training.entry import entered, left, place_to_split
from kallm_bench.training.graphs import FrozenGraph, learning_graph, looking_graph
from kallm_bench.training.loss import Objective, logits_of, loss_of
from kallm_bench.training.prefix_cache import PrefixCache, holds, place_of
from kallm_bench.training.teacher import Teacher

HALF = (torch.float16, torch.bfloat16)
"""What the packed attention's kernel computes in."""


@dataclass(frozen=True)
class Batch:
    """Rows on the device.

    Args:
        input_ids, position_ids: (B, T).
        bearing: (P,) which of the B·T positions bear loss; `targets` (P,), the token that comes after each.
        bounds: where documents begin, for packed attention.
        source, numbers: the rows these are, and the fingerprint of their Rows.
        entering: (B, T, H), what enters the first block that learns, where it is known.
    """

    input_ids: Tensor
    position_ids: Tensor
    bearing: Tensor
    targets: Tensor
    bounds: Mapping[str, Any]
    source: str = ""
    numbers: tuple[int, ...] = ()
    entering: Tensor | None = None


def make_batch(
    rows: Rows, numbers: Sequence[int] | np.ndarray, device: torch.device | str = "cpu", height: int = 0
) -> Batch:
    """The rows of these numbers; a GPU is sent them without waiting for it.

    Args:
        height: rows of the batch, if more: the first one again, bearing no loss.
    """
    chosen = [int(number) for number in numbers]
    chosen += (chosen[:1] or [0]) * (height - len(chosen))
    found = rows.batch(chosen)
    found["targets"][len(numbers) :] = IGNORE
    batch = batch_of(found["input_ids"], found["position_ids"], found["targets"], device)
    return dataclasses.replace(batch, source=rows.fingerprint, numbers=tuple(chosen))


def batch_of(input_ids: Tensor, position_ids: Tensor, targets: Tensor, device: torch.device | str = "cpu") -> Batch:
    """A batch of tensors on the CPU, each (B, T), with IGNORE for targets that bear no loss."""
    targets = targets.flatten()
    bearing = (targets != IGNORE).nonzero().flatten()
    bounds = bounds_of(position_ids)
    here = [input_ids, position_ids, bearing, targets[bearing], bounds["cu_seq_lens_q"]]
    if torch.device(device).type == "cuda":
        here = [each.pin_memory() for each in here]
    ids, positions, bearing, targets, ends = (each.to(device, non_blocking=True) for each in here)
    return Batch(ids, positions, bearing, targets, bounds | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends})


class Forward:
    """A model's forward pass for training, for as long as the context lasts; the model's scope is set before.

    Puts the model in evaluation mode; see `train`.

    Args:
        model: what learns requires gradients, and nothing else does.
        autocast: dtype of the products, while parameters that learn stay as they are; None computes in the model's own.
        fast: whether to compile blocks and attend without masks; needs a GPU, and costs half a minute.
        changes: whether the model's modules change as training goes, so that nothing can be recorded.
        split: whether frozen blocks may be run by themselves; not where blocks are split over processes.
        teacher: whose word counts in what a step makes smaller; it goes the same ways as the model.

    What is frozen below the first learning block is run as in evaluation, in the compute dtype, and what it gives is
    rounded to that dtype, whether or not it is kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        autocast: torch.dtype | None = None,
        fast: bool = False,
        split: bool = True,
        changes: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        self.model = model.eval()
        self._teacher = teacher
        self.autocast = autocast
        self._device = model.device
        # float16 has no room for what some models add up between blocks
        self._dtype = torch.bfloat16 if autocast == torch.bfloat16 else next(model.parameters()).dtype
        self._blocks = find_blocks(model)
        self._changes = changes
        self._fast = fast and can_compile(model.device)
        self._packed = False
        sample = _sample(model)
        self.first, self._in_tuples = (
            place_to_split(model, sample.input_ids, sample.position_ids) if split else (0, False)
        )
        self._caches: dict[str, PrefixCache] = {}
        self._frozen: list[nn.Module] = []
        self._next: tuple[Rows, tuple[int, ...], Future[Batch]] | None = None
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor]] | None = None
        self._pool: Any = None
        self._teachers_pool: Any = None  # its own: it runs between parts whose results still stand
        self._stack = ExitStack()

    def __enter__(self) -> Forward:
        self._worker = self._stack.enter_context(ThreadPoolExecutor(1))
        self._frozen = list(self._blocks[: self.first])
        if any(value.dtype != self._dtype for block in self._frozen for value in block.parameters()):
            self._frozen = [block.to(self._dtype) for block in copy.deepcopy(self._frozen)]
        if self._fast:
            self._attend_packed()
            # what is compiled of one block is used for all that are like it, and guarded by what they are not
            self._stack.enter_context(dynamo_config.patch(recompile_limit=1024, accumulated_recompile_limit=4096))
            teaching = self._teacher.tail if self._teacher else []
            several = (*self._frozen, *self._blocks[self.first :], *teaching)
            for block in {id(block): block for block in several}.values():
                block.compile(dynamic=False)
                self._stack.callback(setattr, block, "_compiled_call_impl", None)
            if self._packed and self.first and not self._changes:
                self._graphs = {}
                # recordings are made on streams of their own, which wait for one another; PyTorch warns of it each time
                warn = torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch
                warn(False)
                self._stack.callback(warn, True)
        return self

    def __exit__(self, *error: object) -> None:
        self._next = None
        if self.recording:
            self.release()
            self._graphs = None
        self._stack.close()
        self._frozen = []
        for cache in self._caches.values():
            cache.close()
        self._caches = {}

    def keep(self, folder: Path | None, several: Mapping[Rows, int]) -> int:
        """From now on keeps what enters the first learning block on disk; returns the bytes that takes.

        0, and nothing is kept, where there is no folder, nothing frozen to run, or embeddings that learn.

        Args:
            several: how many rows of each are needed, from the first one on.

        Raises:
            DiskError: too little room.
        """
        if folder is None or not self._can_keep():
            return 0
        for rows, count in several.items():
            self._caches[rows.fingerprint] = PrefixCache(
                folder, self.model, self.first, self._dtype, rows, count, self.autocast
            )
        return sum(cache.bytes for cache in self._caches.values())

    def kept_all(self, folder: Path, several: Mapping[Rows, int]) -> bool:
        """Whether an earlier run has kept all that `keep` would be asked for; changes nothing."""
        return self._can_keep() and all(
            holds(place_of(folder, self.model, self.first, self._dtype, rows, self.autocast), min(count, len(rows)))
            for rows, count in several.items()
        )

    def _can_keep(self) -> bool:
        embeddings = self.model.get_input_embeddings().parameters()
        return bool(self.first) and not any(parameter.requires_grad for parameter in embeddings)

    def _attend_packed(self) -> None:
        """Turns packed attention on for as long as the context lasts, if it is as near the truth as masks are."""
        text = self.model.config.get_text_config(decoder=True)
        chunks = getattr(text, "attention_chunk_size", None)  # a limit in the masks alone
        if (self.autocast or self._dtype) not in HALF or chunks or _drops_out(self.model):
            return
        sample = _sample(self.model)
        with torch.no_grad(), ExitStack() as trial:
            truth = self._decode(sample)
            with self._precision():
                masked = self.hidden(sample)
                try:
                    others = [self._teacher.base] if self._teacher else []
                    trial.enter_context(packed_attention(self.model, *self._frozen, *others))
                    self._packed = True
                    packed = self.hidden(sample)
                except (UnsupportedError, RuntimeError):  # the latter of the kernel: an older GPU, or heads too wide
                    self._packed = False
                    return
            self._packed = bool((packed - truth).abs().mean() <= 2 * (masked - truth).abs().mean())
            if self._packed:
                self._stack.push(trial.pop_all())

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None)

    @property
    def recording(self) -> bool:
        """Whether all parts are replayed from CUDA graphs."""
        return self._graphs is not None

    def settle(self) -> None:
        """Waits until what was kept so far can be read, by this run and by others."""
        for cache in self._caches.values():
            cache.flush()

    def read_share(self, rows: Rows) -> float | None:
        """What share of the rows asked for so far was read from where they are kept; None where nothing is kept."""
        cache = self._caches.get(rows.fingerprint)
        return cache.found / max(cache.asked, 1) if cache else None

    def fill(self, batch: Batch) -> None:
        """Has a batch's way to the first learning block kept, for those that come."""
        with self._precision():
            self.entering(batch)

    def train(self, mode: bool) -> None:
        """Changes the model's mode: of what learns, and of all of it where nothing below is frozen."""
        self.model.train(mode and not self.first)
        for block in self._blocks[self.first :]:
            block.train(mode)

    def batch(self, rows: Rows, numbers: Sequence[int] | np.ndarray, height: int = 0) -> Batch:
        """The rows of these numbers, from `prefetch` where that was asked for them.

        Args:
            height: rows of the batch if more, so that no other shape is compiled, and none is empty; the others bear no
                loss.
        """
        asked, self._next = self._next, None
        if asked and asked[0] is rows and asked[1] == tuple(numbers):
            return asked[2].result()
        return self._batch(rows, tuple(numbers), height if self._fast or not len(numbers) else 0)

    def prefetch(self, rows: Rows, numbers: Sequence[int] | np.ndarray, height: int = 0) -> None:
        """Gets a batch ready beside other work; arguments as `batch`."""
        height = height if self._fast else 0
        self._next = rows, tuple(numbers), self._worker.submit(self._batch, rows, tuple(numbers), height)

    def _batch(self, rows: Rows, numbers: tuple[int, ...], height: int = 0) -> Batch:
        batch = make_batch(rows, numbers, self._device, height)
        cache = self._caches.get(rows.fingerprint)
        kept = cache.read(batch.numbers) if cache else None
        if kept is not None:
            batch = dataclasses.replace(batch, entering=kept.to(self._device, non_blocking=True))
        return batch

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Summed cross-entropy at the positions that bear loss, and how many these are."""
        with self._precision():
            hidden = self.hidden(batch).flatten(0, 1).index_select(0, batch.bearing)  # (P, H)
            return loss_of(self.model, hidden, batch.targets), len(batch.targets)

    def logits(self, batch: Batch) -> Tensor:
        """What the head says at the positions that bear loss: (P, V)."""
        with self._precision():
            return logits_of(self.model, self.hidden(batch).flatten(0, 1).index_select(0, batch.bearing))

    def objective(self, batch: Batch) -> Objective:
        """What a step makes smaller, and the cross-entropy in it. What enters the learning part is computed once."""
        if self._teacher is None:
            loss, _ = self.loss_sum(batch)
            return Objective(loss, loss.detach())
        with self._precision():
            if self.first:
                batch = dataclasses.replace(batch, entering=self.entering(batch))
            # a copy, since a graph's result stands only until it is replayed
            wanted = self._teachers_word(batch).flatten(0, 1).index_select(0, batch.bearing)
            hidden = self.hidden(batch).flatten(0, 1).index_select(0, batch.bearing)  # (P, H)
            return self._teacher.loss(hidden, batch.targets, wanted)

    def hidden(self, batch: Batch) -> Tensor:
        """What the decoder gives, final norm included: (B, T, H). Called where autocast is on."""
        if not self.first:
            return self._decode(batch)
        entering = self.entering(batch)
        if self.recording:
            return self._recorded("learning", batch, entering)
        return self._learning_part(batch, entering)

    @torch.no_grad()
    def entering(self, batch: Batch) -> Tensor:
        """What enters the first block that learns: (B, T, H), in the compute dtype."""
        if batch.entering is not None:
            return batch.entering
        hidden = self._recorded("frozen", batch) if self.recording else self._frozen_part(batch)
        if (cache := self._caches.get(batch.source)) is not None:
            cache.write(batch.numbers, hidden)
        return hidden

    def _frozen_part(self, batch: Batch) -> Tensor:
        casting = self._frozen[0].register_forward_pre_hook(self._cast_hidden, with_kwargs=True)
        try:
            with left(self._blocks, self._frozen, self._in_tuples) as last:
                self._decode(batch)
        finally:
            casting.remove()
        return last.taken().to(self._dtype)

    def _learning_part(self, batch: Batch, entering: Tensor) -> Tensor:
        with entered(self._blocks, self.first, entering, self._in_tuples):
            return self._decode(batch)

    @torch.no_grad()
    def _teachers_word(self, batch: Batch) -> Tensor:
        """The teacher's final hidden states (B, T, H)."""
        assert self._teacher is not None
        begins = self.first and self.first == self._teacher.enters_at
        entering = [batch.entering] if begins and batch.entering is not None else []
        if self.recording:
            return self._recorded("teaching", batch, *entering)
        return self._teaching_part(batch, *entering)

    def _teaching_part(self, batch: Batch, entering: Tensor | None = None) -> Tensor:
        assert self._teacher is not None
        bounds = batch.bounds if self._packed else {}
        return self._teacher.hidden(batch.input_ids, batch.position_ids, entering, **bounds)

    def _recorded(self, part: str, batch: Batch, *entering: Tensor) -> Tensor:
        """What a part gives, by a CUDA graph of that shape; see graphs. Not by one where it cannot be recorded."""
        assert self._graphs is not None
        ends = batch.bounds["cu_seq_lens_q"]
        inputs = (batch.input_ids, batch.position_ids, ends, *entering)
        key = (part, torch.is_grad_enabled(), self._blocks[-1].training, *batch.input_ids.shape, len(ends))
        longest = batch.bounds["max_length_q"]

        def run(ids: Tensor, positions: Tensor, ends: Tensor, *entering: Tensor) -> Tensor:
            bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest}
            fed = dataclasses.replace(batch, input_ids=ids, position_ids=positions, bounds=bounds)
            if part == "teaching":
                return self._teaching_part(fed, *entering)
            return self._learning_part(fed, *entering) if entering else self._frozen_part(fed)

        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(part, run, inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # something of it waits for the GPU, as routing among experts may
                self._graphs = None
                return run(*inputs)
        return self._graphs[key](*inputs)

    def _record(self, part: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self._rest()
        pools = self._teachers_pool, self._pool
        self._teachers_pool, self._pool = (pool or torch.cuda.graph_pool_handle() for pool in pools)
        precision = torch.autocast("cuda", self.autocast, enabled=self.autocast is not None, cache_enabled=False)
        with precision, torch.cuda.stream(torch.cuda.current_stream()):  # a recording that fails leaves its own behind
            if part == "learning":
                if torch.is_grad_enabled():
                    return learning_graph(run, self.model.get_decoder(), inputs, self._pool)
                return looking_graph(run, inputs, self._pool)
            return FrozenGraph(run, inputs, self._teachers_pool if part == "teaching" else self._pool)

    def release(self) -> None:
        """Forgets recordings and gradients, and gives back the memory that they hold."""
        self._pool = self._teachers_pool = None
        if self._graphs is not None:
            self._graphs = {}
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _rest(self) -> None:
        """Waits until no other thread of ours asks the GPU for anything, as it must not while a graph is recorded."""
        self.settle()
        if self._next:
            self._next[2].result()

    def keep_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Has to be called after a batch's backward if another batch is run before its gradients are used."""
        if self._graphs is not None:
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad.clone()

    def _cast_hidden(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """Embeddings may be in float32; between frozen blocks everything is in the compute dtype."""
        if inputs:
            return (inputs[0].to(self._dtype), *inputs[1:]), named
        return inputs, named | {"hidden_states": named["hidden_states"].to(self._dtype)}

    def _decode(self, batch: Batch) -> Tensor:
        bounds = batch.bounds if self._packed else {}
        decoder = self.model.get_decoder()
        answer = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **bounds)
        hidden: Tensor = answer[0]
        return hidden


def _drops_out(model: PreTrainedModel) -> bool:
    """Whether anything is left out at random in training."""
    text = model.config.get_text_config(decoder=True)
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or any("dropout" in name and value for name, value in text.to_dict().items())


def _sample(model: PreTrainedModel) -> Batch:
    """Two documents of 32 tokens in a row."""
    ids = torch.arange(64)[None] * 7 % model.get_input_embeddings().num_embeddings
    return batch_of(ids, torch.arange(32).repeat(2)[None], ids, model.device)
