"""Calibration: what the replaced modules are fed and what they answer, on real text, without ever keeping all of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.models.sites import Site, listen, standing_in

TOKENS_AT_ONCE = 4096
KEEP = 0.5
"""Share of the free memory that may hold what was seen."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Which text a start is calibrated on.

    Args:
        data, heldout: conversations, as for training; heldout None holds out a part of `data`.
        tokens: how many to learn from.
        heldout_tokens: how many to judge on.
        row_length: tokens in a row.

    Raises:
        SpecError: too little to learn from or to judge on.
    """

    data: str = "bundled"
    heldout: str | None = None
    tokens: int = 20_480
    heldout_tokens: int = 8_192
    row_length: int = 512

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.tokens < 2 * self.row_length or self.heldout_tokens < self.row_length:
            raise SpecError(
                "calibration needs at least two rows to learn from and one to judge on, got "
                f"{self.tokens} and {self.heldout_tokens} tokens in rows of {self.row_length}"
            )


@dataclass(frozen=True)
class Calibration:
    """Rows of tokens to start from, and rows to judge the start on.

    Args:
        tokens, positions: (N, T) int64: token ids, and their positions, which begin again with each document.
        heldout: how many of the N rows, the last ones, are only judged on.
        seen: what the same model showed on the same rows before, and where what it shows now is kept for the next
            start; None where nothing is.

    Raises:
        SpecError: no row left to learn from, or none to judge on.
    """

    tokens: Tensor
    positions: Tensor
    heldout: int
    seen: Seen | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.heldout < len(self.tokens):
            raise SpecError(f"calibration needs rows to learn from and to judge on, got {len(self.tokens)} in all")


@dataclass(frozen=True)
class Part:
    """What one batch of rows showed: site -> (fed, answered), each (M, its width)."""

    seen: Mapping[Site, tuple[Tensor, Tensor]]
    rows: int


@dataclass
class Seen:
    """What a model showed at some sites, from one start to the next.

    Args:
        sites: which; what was seen at others goes.
        parts: first row -> what the batch that begins there showed.
        typical: see Activations.
        room: bytes that parts may still take; None before the first start.
    """

    sites: tuple[Site, ...] = ()
    parts: dict[int, Part] = field(default_factory=dict)
    typical: dict[Site, Tensor] = field(default_factory=dict)
    room: int | None = None

    def at(self, sites: tuple[Site, ...]) -> Seen:
        """Itself, empty where it has seen other sites."""
        if self.sites != sites:
            self.sites, self.parts, self.typical, self.room = sites, {}, {}, None
        return self


class Activations:
    """What the modules at some sites are fed and answer over calibration rows, a batch at a time.

    Kept after the first pass as long as they take no more than KEEP of the device's free memory; what does not fit is
    computed again in every pass. So memory is bounded, and the rows may be any number.

    Args:
        model: called with `modules` in place; not changed.
        modules: what stands at the sites that are looked at.
        calibration: the rows. The last eighth of those to learn from decides (on ridge, scale), so that those to judge
            on decide nothing.
    """

    def __init__(self, model: PreTrainedModel, modules: Mapping[Site, nn.Module], calibration: Calibration) -> None:
        self.model, self.modules, self.calibration = model, modules, calibration
        self.width: int = model.config.get_text_config(decoder=True).hidden_size
        learning = len(calibration.tokens) - calibration.heldout
        deciding = max(1, learning // 8)
        if learning < 2:
            raise SpecError(f"calibration needs at least 3 rows, got {len(calibration.tokens)}")
        self._spans = {
            "fit": range(learning - deciding),
            "decide": range(learning - deciding, learning),
            "judge": range(learning, len(calibration.tokens)),
        }
        self._seen = (calibration.seen or Seen()).at(tuple(modules))
        if self._seen.room is None:
            self._seen.room = int(KEEP * _free_bytes(model.device))
        self.typical = self._seen.typical
        """The median of |y|² over the first batch."""

    @property
    def fit_tokens(self) -> int:
        return len(self._spans["fit"]) * self.calibration.tokens.shape[1]

    def parts(self, span: str, tokens_at_once: int = TOKENS_AT_ONCE) -> Iterator[Part]:
        """The batches of "fit", "decide" or "judge", in order."""
        rows = self._spans[span]
        at_once = max(1, min(tokens_at_once, TOKENS_AT_ONCE) // self.calibration.tokens.shape[1])
        for start in range(rows.start, rows.stop, at_once):
            yield self._part(start, min(start + at_once, rows.stop))

    def endless(self, tokens_at_once: int) -> Iterator[Part]:
        """The batches of "fit" round and round."""
        while True:
            yield from self.parts("fit", tokens_at_once)

    @torch.no_grad()
    def in_sequence(self, modules: Mapping[Site, nn.Module], tokens_at_once: int) -> Iterator[Part]:
        """As `endless`, with `modules` at the sites: what they feed each other, and what the originals say to it."""
        rows, at_once = self._spans["fit"], max(1, tokens_at_once // self.calibration.tokens.shape[1])
        while True:
            for start in range(rows.start, rows.stop, at_once):
                tokens, positions = self._rows(start, min(start + at_once, rows.stop))
                with standing_in(self.model, {site: _InDtypeOf(module) for site, module in modules.items()}):
                    seen = answers(self.model, self.modules, tokens, positions)
                yield Part({site: (x, _first(self.modules[site](x))) for site, (x, _) in seen.items()}, len(tokens))

    def weights(self, site: Site, y: Tensor) -> Tensor:
        """(M,) weights of rows, (|y|² + the typical |y|²)^-½.

        The last blocks of many models answer a few tokens with outputs hundreds of times the usual size. Unweighted,
        those rows are all that a fit cares for; weighted by their relative error they would count no more than any
        other. Half way, a row a hundred times as large counts as much as a hundred.
        """
        return (y.double().square().sum(-1) + self.typical[site]).rsqrt()

    def _part(self, start: int, stop: int) -> Part:
        kept = self._seen.parts.get(start)
        if kept and kept.rows == stop - start:
            return kept
        tokens, positions = self._rows(start, stop)
        part = Part(answers(self.model, self.modules, tokens, positions), stop - start)
        for site, (_, y) in part.seen.items():
            if not y.any():
                raise SpecError(
                    f"block {site.name} holds a feed-forward that answers nothing, so there is nothing to start from; "
                    "take --start random"
                )
            self.typical.setdefault(site, y.double().square().sum(-1).median().clamp_min(1e-30))
        size = sum(tensor.nbytes for pair in part.seen.values() for tensor in pair)
        if self._seen.room is not None and size <= self._seen.room:
            self._seen.room -= size
            self._seen.parts[start] = part
        return part

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.calibration
        return rows.tokens[start:stop].to(self.model.device), rows.positions[start:stop].to(self.model.device)


class _InDtypeOf(nn.Module):
    """A module in the middle of a model of another dtype: takes and gives the model's, computes in its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x.to(next(self.module.parameters()).dtype))
        return y.to(x.dtype)


def is_tight(device: torch.device, needed_bytes: int) -> bool:
    """Whether a model of so many bytes would take so much of a GPU that it should not lie there whole.

    Of a CPU's memory it always would: there a file that is mapped costs no time and no memory of its own.
    """
    return device.type == "cpu" or needed_bytes > KEEP * _free_bytes(device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@torch.no_grad()
def answers(
    model: PreTrainedModel, sites: Iterable[Site], tokens: Tensor, positions: Tensor
) -> dict[Site, tuple[Tensor, Tensor]]:
    """What the modules at `sites` are fed in one forward pass, and what they answer. (B, T) -> (B·T, their width)."""
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def note_of(site: Site) -> Callable[[Tensor, Tensor], None]:
        def note(x: Tensor, y: Tensor) -> None:
            seen[site] = x.flatten(0, -2), y.flatten(0, -2)

        return note

    handles = [handle for site in sites for handle in listen(model, site, note_of(site))]
    try:
        model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Explained:
    """R² of predictions, over all outputs together: 1 - Σ|y - ŷ|² / Σ|y - mean y|², streamed."""

    def __init__(self) -> None:
        self.rows, self.missed, self.squares, self.total = 0, 0.0, 0.0, torch.zeros(())

    def add(self, y: Tensor, predicted: Tensor) -> None:
        """Takes in some rows, each (M, O)."""
        y = y.double()
        self.missed += float((y - predicted.double()).square().sum())
        self.squares += float(y.square().sum())
        self.total = self.total.to(y) + y.sum(0)
        self.rows += len(y)

    @property
    def value(self) -> float:
        spread = self.squares - float(self.total.square().sum()) / self.rows
        return 1 - self.missed / spread


@torch.no_grad()
def explained(modules: Mapping[Site, nn.Module], activations: Activations) -> dict[str, float]:
    """R² of each module as a stand-in for the one at its site, on the rows to judge on, by the site's name."""
    scores = {site: Explained() for site in modules}
    for part in activations.parts("judge"):
        for site, (x, y) in part.seen.items():
            scores[site].add(y, modules[site](x.to(next(modules[site].parameters()).dtype)))
    return {site.name: score.value for site, score in scores.items()}


def _first(answer: Tensor | tuple[Tensor, ...]) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer[0]
