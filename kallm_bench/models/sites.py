"""A place in a decoder for a new module: what is taken out, what is put in, and what flows through.

A site is paths alone, so it is the same in every model of an architecture, with values or without, before a retrofit
and after it. `anatomy` finds sites in the untouched architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import LowRankKAN
from kallm_bench.models.adapted import AdaptedLinear

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Site:
    """A place for one new module.

    Args:
        block: whose it is, from 0.
        path: where the new module stands, from the model's root.
        label: which of several in a block; empty for the whole feed-forward.
        chain: where a feed-forward is two layers and what is between, in order: the new module does what all of them
            did.
        adds: whether what stands at `path` takes the residual stream too and adds it.
        returns: how many values what stands at `path` returns.
        takes: how many it may be given, as a router is given the tokens.
        experts: whether the module that goes routes to experts.
        silent: modules beside it that become identities.
        part: which part of a block it is of, see KANSpec.parts.
    """

    block: int
    path: str
    label: str = ""
    chain: tuple[str, ...] = ()
    adds: bool = False
    returns: int = 1
    takes: int = 1
    experts: bool = False
    silent: tuple[str, ...] = ()
    part: str = "feedforward"

    @property
    def name(self) -> str:
        """For people and metrics: "3", or "3.mlp.up_proj"."""
        return f"{self.block}.{self.label}" if self.label else str(self.block)

    @property
    def paths(self) -> tuple[str, ...]:
        """All that changes: where the new module stands, then what becomes an identity."""
        return (self.path, *self.silent, *(() if self.adds else self.chain[1:]))


class NoFeedForward(nn.Module):
    """What `drop` leaves: zeros of the input's shape, so that the residual stream passes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class AddsResidual(nn.Module):
    """A feed-forward in a block that hands it the residual stream and expects the sum, as Bloom's and MPT's do."""

    def __init__(self, feedforward: nn.Module, hidden_dropout: float) -> None:
        super().__init__()
        self.feedforward, self.hidden_dropout = feedforward, hidden_dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(self.feedforward(x), self.hidden_dropout, self.training)


class RouterPlace(nn.Module):
    """A feed-forward in the place of one that was given and returned more than hidden states.

    What only a router needs is not looked at; what it thought is None now.
    """

    def __init__(self, feedforward: nn.Module, returns: int) -> None:
        super().__init__()
        self.feedforward, self.returns = feedforward, returns

    def forward(self, x: Tensor, *others: object, **named: object) -> Tensor | tuple[Tensor | None, ...]:
        y: Tensor = self.feedforward(x)
        return y if self.returns == 1 else (y, *[None] * (self.returns - 1))


def put(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Changes `model`: `module`, from hidden states to hidden states, takes the place; an adapter goes beside it."""
    before = model.get_submodule(site.path)
    if isinstance(module, LowRankKAN):
        module = AdaptedLinear(before, module)
    if site.adds:
        module = AddsResidual(module, getattr(before, "hidden_dropout", 0.0))
    if site.returns > 1 or site.takes > 1:
        module = RouterPlace(module, site.returns)
    model.set_submodule(site.path, module)
    for path in site.paths[1:]:
        model.set_submodule(path, nn.Identity())


@contextmanager
def standing_in(model: nn.Module, modules: Mapping[Site, nn.Module]) -> Iterator[None]:
    """Inside, `modules` stand in `model`; afterwards it is as it was."""
    before = {path: model.get_submodule(path) for site in modules for path in site.paths}
    try:
        for site, module in modules.items():
            put(model, site, module)
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def answer_by(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Changes `module`: calls of it go to `forward`, and None gives back its own. Its place and its names stay."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


def module_at(model: nn.Module, site: Site) -> nn.Module:
    """The module that `put` has put there: of a layer with an adapter, the adapter."""
    module = model.get_submodule(site.path)
    if isinstance(module, AdaptedLinear):
        return module.adapter
    return module.feedforward if isinstance(module, AddsResidual | RouterPlace) else module


def original_at(model: nn.Module, site: Site) -> nn.Module:
    """What stands there in a model in which nothing was put there, from hidden states to hidden states."""
    if site.chain:
        return nn.Sequential(*(model.get_submodule(path) for path in site.chain))
    return model.get_submodule(site.path)


def listen(model: nn.Module, site: Site, note: Callable[[Tensor, Tensor], None]) -> list[RemovableHandle]:
    """Calls `note` with what the place is fed and what it answers, each (..., hidden_size), in every forward pass."""
    fed: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fed[:] = [each for each in inputs if isinstance(each, Tensor)][:2]

    def leave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        answer = output if isinstance(output, Tensor) else output[0]
        note(fed[0], answer - fed[1] if site.adds else answer)

    last = site.path if site.adds or not site.chain else site.chain[-1]
    return [
        model.get_submodule(site.path).register_forward_pre_hook(enter),
        model.get_submodule(last).register_forward_hook(leave),
    ]


# --- what is inside ---------------------------------------------------------------------------------------------------


def intermediate_size(feedforward: nn.Module, hidden_size: int) -> int:
    """The inner width of a plain or gated feed-forward: what the layer that gives hidden_size takes.

    Raises:
        SpecError: not exactly one such width.
    """
    widths = {inputs_of(layer) for layer in linear_layers(feedforward) if outputs_of(layer) == hidden_size}
    if len(widths) != 1:
        raise SpecError(f"{type(feedforward).__name__}: cannot tell its inner width; pass hidden")
    return widths.pop()


KNOWN_ACTIVATIONS = {
    "silu": "silu", "siluactivation": "silu", "swish": "silu",
    "gelu": "gelu", "geluactivation": "gelu",
    "newgeluactivation": "gelu-tanh", "gelutanh": "gelu-tanh", "pytorchgelutanh": "gelu-tanh",
    "fastgeluactivation": "gelu-tanh",
    "relu": "relu", "reluactivation": "relu",
}  # fmt: skip
"""Classes of activations, in small letters, and their names in kan.feedforward.ACTIVATIONS."""


def activation_of(feedforward: nn.Module) -> str | None:
    """The name of the activation in a model's own feed-forward; None where it is none that kan knows."""
    found = (KNOWN_ACTIVATIONS.get(type(child).__name__.lower()) for child in feedforward.children())
    return next((name for name in found if name), None)


def output_layer(feedforward: nn.Module, hidden_size: int) -> nn.Linear | Conv1D:
    """The layer that gives a feed-forward's output: the last one as wide as the model.

    Raises:
        SpecError: there is none.
    """
    layers = [layer for layer in linear_layers(feedforward) if outputs_of(layer) == hidden_size]
    if not layers:
        raise SpecError(f"{type(feedforward).__name__}: no linear layer gives its output")
    return layers[-1]


def linear_layers(module: nn.Module) -> list[nn.Linear | Conv1D]:
    """Every plain matrix, in order."""
    return [layer for layer in module.modules() if isinstance(layer, LINEAR)]


def inputs_of(layer: nn.Linear | Conv1D) -> int:
    """How wide a row is that a matrix takes."""
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])


def outputs_of(layer: nn.Linear | Conv1D) -> int:
    """How wide a row is that a matrix gives."""
    return int(layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.weight.shape[0])
