"""Calibration: what the replaced modules are fed and what they answer, on real text, without ever keeping all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.models.sites import Site

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

    Raises:
        SpecError: no row left to learn from, or none to judge on.
    """

    tokens: Tensor
    positions: Tensor
    heldout: int

    def __post_init__(self) -> None:
        if not 1 <= self.heldout < len(self.tokens):
            raise SpecError(f"calibration needs rows to learn from and to judge on, got {len(self.tokens)} in all")


@dataclass(frozen=True)
class Part:
    """What one batch of rows showed: block number -> (fed, answered), each (M, hidden_size)."""

    seen: Mapping[int, tuple[Tensor, Tensor]]
    rows: int


class Activations:
    """What the modules at some sites are fed and answer over calibration rows, a batch at a time.

    Kept after the first pass as long as they take no more than KEEP of the device's free memory; what does not fit is
    computed again in every pass. So memory is bounded, and the rows may be any number.

    Args:
        model: called with the modules at `sites` in place; not changed.
        sites: of the blocks that are looked at.
        calibration: the rows. The last eighth of those to learn from decides (on ridge, scale), so that those to judge
            on decide nothing.
    """

    def __init__(self, model: PreTrainedModel, sites: list[Site], calibration: Calibration) -> None:
        self.model, self.sites, self.calibration = model, sites, calibration
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
        self._kept: dict[int, Part] = {}
        self._room = int(KEEP * _free_bytes(model.device))
        self.typical: dict[int, Tensor] = {}
        """Block number -> the median of |y|² over the first batch."""

    def module(self, block: int) -> nn.Module:
        """The untouched module at a block."""
        return next(site.module for site in self.sites if site.block == block)

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
    def in_sequence(self, modules: Mapping[int, nn.Module], tokens_at_once: int) -> Iterator[Part]:
        """As `endless`, with `modules` at the sites: what they feed each other, and what the originals say to it."""
        originals = {site.block: site.module for site in self.sites}
        rows, at_once = self._spans["fit"], max(1, tokens_at_once // self.calibration.tokens.shape[1])
        while True:
            for start in range(rows.start, rows.stop, at_once):
                tokens, positions = self._rows(start, min(start + at_once, rows.stop))
                for site in self.sites:
                    site.replace(_InDtypeOf(modules[site.block]))
                try:
                    seen = answers(self.model, self.sites, tokens, positions)
                finally:
                    for site in self.sites:
                        site.replace(originals[site.block])
                yield Part({block: (x, originals[block](x)) for block, (x, _) in seen.items()}, len(tokens))

    def weights(self, block: int, y: Tensor) -> Tensor:
        """(M,) weights of rows, (|y|² + the typical |y|²)^-½.

        The last blocks of many models answer a few tokens with outputs hundreds of times the usual size. Unweighted,
        those rows are all that a fit cares for; weighted by their relative error they would count no more than any
        other. Half way, a row a hundred times as large counts as much as a hundred.
        """
        return (y.double().square().sum(-1) + self.typical[block]).rsqrt()

    def _part(self, start: int, stop: int) -> Part:
        if start in self._kept and self._kept[start].rows == stop - start:
            return self._kept[start]
        tokens, positions = self._rows(start, stop)
        part = Part(answers(self.model, self.sites, tokens, positions), stop - start)
        for block, (_, y) in part.seen.items():
            if not y.any():
                raise SpecError(
                    f"block {block} holds a feed-forward that answers nothing, so there is nothing to start from; "
                    "take --start random"
                )
            self.typical.setdefault(block, y.double().square().sum(-1).median().clamp_min(1e-30))
        size = sum(tensor.nbytes for pair in part.seen.values() for tensor in pair)
        if size <= self._room:
            self._room -= size
            self._kept[start] = part
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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@torch.no_grad()
def answers(
    model: PreTrainedModel, sites: list[Site], tokens: Tensor, positions: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the modules at `sites` are fed in one forward pass, and what they answer. (B, T) -> (B·T, hidden_size)."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(site: Site) -> torch.utils.hooks.RemovableHandle:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[site.block] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        return site.module.register_forward_hook(note)

    handles = [watch(site) for site in sites]
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
def explained(modules: Mapping[int, nn.Module], activations: Activations) -> dict[int, float]:
    """R² of each module as a stand-in for the one at its block, on the rows to judge on."""
    scores = {block: Explained() for block in modules}
    for part in activations.parts("judge"):
        for block, (x, y) in part.seen.items():
            scores[block].add(y, modules[block](x.to(next(modules[block].parameters()).dtype)))
    return {block: score.value for block, score in scores.items()}
