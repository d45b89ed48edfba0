"""One token for every reply at a step, from memory that is laid out once.

Each reply has a row of a cache of fixed size; the beginning that replies share lies beside it, once. The last token of
a prompt is not prefilled: it is the first that a step takes, so that every token of a reply comes out of a step. A step
reads what it needs from tensors that never move and leaves its tokens in one of them, so that on a GPU it is recorded
once for each shape and replayed, and Python looks at the tokens only every so many steps.

Rows beyond those in use, and columns beyond the longest reply, are left out of a step in coarse strides: so there are
few shapes to record.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kallm_bench.bbh.attention import Sight, UnsupportedError, replies_attention

WARM_UPS = 2
"""Steps before a recording: the first compiles, and libraries make what they keep."""

PROBED = 40
"""Tokens that `Decoder` and the model's own attention are compared on, before the first is believed."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-3, torch.float16: 3e-2, torch.bfloat16: 0.15}
"""Norm of the difference of logits over the norm of the logits: a few times what rounding does (tf32 in float32). In
bfloat16 it does 5 % on the bundled model; one wrong token among forty does 18 %."""


@dataclass(frozen=True)
class Grain:
    """How coarse shapes are.

    Args:
        steps: between looks at the tokens; each look waits for the device.
        rows: rows in a step are the batch size over powers of this.
        own, beginning: columns in a step are a multiple of this.
        fixed_rows: of every step in batch-invariant mode.
        prefill_tokens: that go through the model at once, about.
    """

    steps: int
    rows: int
    own: int
    beginning: int
    fixed_rows: int
    prefill_tokens: int


GRAINS = {"cuda": Grain(steps=16, rows=4, own=256, beginning=512, fixed_rows=64, prefill_tokens=16384)}
CPU_GRAIN = Grain(steps=2, rows=2, own=32, beginning=1, fixed_rows=16, prefill_tokens=1024)


def grain_of(device: torch.device) -> Grain:
    return GRAINS.get(device.type, CPU_GRAIN)


class _Rows(DynamicLayer):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of one layer: (R, N, L, D) each, of which a step sees the first rows and columns."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, numbers: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.positions, self.numbers, self.columns = positions, numbers, keys.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows = len(key_states)
        where = (self.numbers[:rows], slice(None), self.positions[:rows])
        self.keys[where] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[where] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[:rows, :, : self.columns], self.values[:rows, :, : self.columns]


class Decoder:
    """Memory for so many replies of a model, and the steps that fill it. Every method works in inference mode.

    Args:
        rows: replies at once.
        own: tokens of a row: what follows the beginning in its prompt, and the reply.
        beginning: tokens of the beginning, at most.
        recorded: whether steps are recorded as CUDA graphs, where that can be done.

    Raises:
        UnsupportedError: the model keeps something else than keys and values of all tokens.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int, own: int, beginning: int, grain: Grain, recorded: bool = True
    ) -> None:
        self.model, self.rows, self.own, self.grain = model, rows, own, grain
        self.recorded = recorded and model.device.type == "cuda"
        shapes = _shapes(model, own + beginning)
        new: Callable[..., Tensor] = torch.zeros
        device = model.device
        with torch.inference_mode():
            self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
            self.positions = torch.zeros(rows, dtype=torch.long, device=device)  # of the next token, in its row
            self.before = torch.zeros(1, dtype=torch.long, device=device)  # tokens of the beginning
            self.chosen = torch.zeros(rows, grain.steps, dtype=torch.long, device=device)
            self.step_number = torch.zeros(1, dtype=torch.long, device=device)
            numbers = torch.arange(rows, device=device)
            self.cache = Cache(
                layers=[
                    _Rows(
                        new(rows, heads, own, width, dtype=dtype, device=device),
                        new(rows, heads, own, value_width, dtype=dtype, device=device),
                        self.positions,
                        numbers,
                    )
                    for heads, width, value_width, dtype in shapes
                ]
            )
            self.common = [
                (
                    new(heads, beginning, width, dtype=dtype, device=device),
                    new(heads, beginning, value_width, dtype=dtype, device=device),
                )
                for heads, width, value_width, dtype in shapes
            ]
        self.length = 0  # of the beginning, as `before` says on the device
        self._graphs: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._last = _positions_of(model) - 1

    @torch.inference_mode()
    def begin(self, beginning: Sequence[int]) -> None:
        """Computes the beginning that all replies from now on have in common; maybe of no token."""
        self.length = len(beginning)
        self.before.fill_(self.length)
        if not beginning:
            return
        found = self._prefill(torch.tensor([list(beginning)], device=self.model.device), Sight((), None), 0)
        for (keys, values), layer in zip(self.common, found, strict=True):
            keys[:, : self.length] = layer.keys[0]
            values[:, : self.length] = layer.values[0]

    @torch.inference_mode()
    def admit(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Prepares rows for new prompts: row -> its tokens without the beginning, at least one. They are padded."""
        width = max(map(len, prompts.values())) - 1  # the last is taken by the first step
        device = self.model.device
        where = torch.tensor(list(prompts), device=device)
        if width:
            padded = [list(tokens[:-1]) + [0] * (width - len(tokens) + 1) for tokens in prompts.values()]
            sight = Sight(self._beginning(self.length), None)
            found = self._prefill(torch.tensor(padded, device=device), sight, self.length)
            for mine, layer in zip(self.cache.layers, found, strict=True):
                mine.keys[where, :, :width] = layer.keys  # what was padded is overwritten before anything looks there
                mine.values[where, :, :width] = layer.values
        self.tokens[where] = torch.tensor([tokens[-1] for tokens in prompts.values()], device=device)
        self.positions[where] = torch.tensor([len(tokens) - 1 for tokens in prompts.values()], device=device)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copies a row over another."""
        for layer in self.cache.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]
        for each in (self.tokens, self.positions):
            each[target] = each[source]

    @torch.inference_mode()
    def steps(self, count: int, rows: int, columns: int) -> list[list[int]]:
        """Takes `count` steps, at most as many as the grain has, of the first `rows`, and gives each row's tokens.

        Args:
            columns: no row is longer after them.
        """
        self.step_number.zero_()
        with replies_attention(self.model):
            step = self._ready(rows, columns)
            for _ in range(count):
                step()
        found: list[list[int]] = self.chosen[:rows, :count].tolist()
        return found

    @torch.inference_mode()
    def logits(self, rows: int, columns: int) -> Tensor:
        """(rows, vocabulary): of the next token of each row, which `tokens` and `positions` still have to be told."""
        shared = min(-(-self.length // self.grain.beginning) * self.grain.beginning, self._capacity())
        for layer in self.cache.layers:
            layer.columns = columns
        device = self.model.device
        own = torch.arange(columns, device=device) <= self.positions[:rows, None]
        common = (torch.arange(shared, device=device) < self.before).expand(rows, -1)
        visible = torch.cat([common, own], dim=1)[:, None, None, :]
        given = self.model(
            input_ids=self.tokens[:rows, None],
            position_ids=(self.before + self.positions[:rows, None]).clamp(max=self._last),
            past_key_values=self.cache,
            use_cache=True,
            kallm_sight=Sight(self._beginning(shared), visible),
        )
        found: Tensor = given.logits[:, -1]
        return found

    def _step(self, rows: int, columns: int) -> None:
        """Takes one step: everything it changes lies in tensors that were there before."""
        tokens = self.logits(rows, columns).argmax(dim=-1)
        self.chosen[:rows].index_copy_(1, self.step_number, tokens[:, None])
        self.tokens[:rows] = tokens
        self.positions[:rows] = (self.positions[:rows] + 1).clamp(max=self.own - 1)  # a row may run on beyond its end
        self.step_number += 1

    def _ready(self, rows: int, columns: int) -> Callable[[], object]:
        """The step of this shape, recorded where it can be."""
        if not self.recorded:
            return lambda: self._step(rows, columns)
        key = (rows, columns, -(-self.length // self.grain.beginning))
        if key not in self._graphs:
            self._record(key)
        return self._graphs[key].replay if key in self._graphs else lambda: self._step(rows, columns)

    def _record(self, key: tuple[int, int, int]) -> None:
        """Keeps a graph of one step, and leaves everything as it was: what a row wrote ahead, its steps write again."""
        rows, columns, _ = key
        device, home = self.model.device, torch.cuda.current_stream(self.model.device)
        changed = (self.tokens, self.positions, self.step_number)
        before = [each.clone() for each in changed]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(home)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.step_number.zero_()
                    self._step(rows, columns)
            home.wait_stream(side)
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(rows, columns)
            self._graphs[key] = graph
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(home)
            raise
        except Exception:  # whatever in foreign code forbids recording, it can still be launched each time
            torch.cuda.set_stream(home)  # a recording that breaks off leaves its own behind
            torch.cuda.synchronize(device)
            self.recorded = False
        for each, value in zip(changed, before, strict=True):
            each.copy_(value)

    def _prefill(self, ids: Tensor, sight: Sight, start: int) -> Any:
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

    def _beginning(self, length: int) -> tuple[tuple[Tensor, Tensor], ...]:
        if not length:
            return ()
        return tuple((keys[:, :length], values[:, :length]) for keys, values in self.common)

    def _capacity(self) -> int:
        return self.common[0][0].shape[1]


def check(model: PreTrainedModel, need: int) -> None:
    """Compares a Decoder's logits with the model's own, on prompts of made-up tokens.

    Args:
        need: tokens in the longest prompt with its reply.

    Raises:
        UnsupportedError: they differ, or the architecture does something that a Decoder does not know.
    """
    config = model.config.get_text_config(decoder=True)
    ropes = [getattr(config, "rope_parameters", None) or {}, getattr(config, "rope_scaling", None) or {}]
    flat = itertools.chain(*([rope, *(each for each in rope.values() if isinstance(each, dict))] for rope in ropes))
    if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in flat):
        raise UnsupportedError("rotary frequencies that depend on the length")
    _shapes(model, need)
    vocabulary = config.vocab_size
    made_up = [(7919 * (each + 1)) % vocabulary for each in range(2 * PROBED)]
    shared, rest = made_up[: PROBED // 2], made_up[PROBED // 2 : PROBED]
    other = made_up[PROBED : PROBED + 5]
    grain = Grain(steps=4, rows=1, own=1, beginning=4, fixed_rows=1, prefill_tokens=1)
    try:
        decoder = Decoder(model, 2, PROBED, PROBED, grain, recorded=False)
        decoder.begin(shared)
        decoder.admit({0: rest[:-3], 1: other[:-3]})
        with torch.inference_mode(), replies_attention(model):
            for after in (3, 2, 1):
                found = decoder.logits(2, PROBED)
                decoder.tokens[:] = torch.tensor([rest[-after], other[-after]], device=model.device)
                decoder.positions += 1
            found = decoder.logits(2, PROBED)
        with torch.inference_mode():
            whole = [torch.tensor([shared + own], device=model.device) for own in (rest, other)]
            truth = torch.cat([model(input_ids=ids, use_cache=False).logits[:, -1] for ids in whole])
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise UnsupportedError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    found, truth = found.double(), truth.double()
    off = float((found - truth).norm() / (truth - truth.mean()).norm())
    if not off <= TOLERANCE.get(model.dtype, 0.15):
        raise UnsupportedError(f"logits differ by {off:.1%} from the model's own")


def _shapes(model: PreTrainedModel, need: int) -> list[tuple[int, int, int, torch.dtype]]:
    """Heads, widths of a key and of a value, and dtype, of each layer's cache."""
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        windowed = type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= need
        if not (type(layer) is DynamicLayer or windowed) or not layer.is_initialized:
            raise UnsupportedError(f"a cache of kind {type(layer).__name__}")
        found.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype))
    return found


def _positions_of(model: PreTrainedModel) -> int:
    """How many positions a model has; very many where its configuration names no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None) or 2**31
