"""Where a decoder's feed-forward modules are, found by structure and not by name.

A decoder keeps its blocks in the one ModuleList that is as long as its configuration says. In a block, the feed-forward
is the child that has linear layers, takes the hidden states and nothing about attention, and gives back their width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward

LINEAR = (nn.Linear, Conv1D)


class NoFeedForward(nn.Module):
    """What `drop` leaves: zeros of the input's shape, so that the residual stream passes unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Site:
    """One replaceable place: the feed-forward of block `block`, child `name` of `parent`."""

    block: int
    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        return self.parent.get_submodule(self.name)

    def replace(self, module: nn.Module) -> None:
        """Puts `module` there."""
        setattr(self.parent, self.name, module)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's list of blocks.

    Raises:
        SpecError: none, or more than one, as long as the configuration says.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    lists = [candidate for candidate in lists if len({type(block) for block in candidate}) == 1]
    inner = {part for candidate in lists for part in candidate.modules() if part is not candidate}
    outer = [candidate for candidate in lists if candidate not in inner]
    if len(outer) != 1:
        raise SpecError(f"{type(model).__name__}: found {len(outer)} lists of {count} equal blocks, need one")
    return outer[0]


def find_sites(model: PreTrainedModel) -> list[Site]:
    """The feed-forward of every block, in order.

    Raises:
        SpecError: a block in which not exactly one child is a feed-forward module; says which children it has.
    """
    width = model.config.get_text_config(decoder=True).hidden_size
    sites = []
    for number, block in enumerate(find_blocks(model)):
        names = [name for name, child in block.named_children() if _is_feedforward(child, width)]
        if len(names) != 1:
            children = ", ".join(f"{name} ({type(child).__name__})" for name, child in block.named_children())
            raise SpecError(
                f"{type(model).__name__}: block {number} has {len(names)} feed-forward modules where one can be "
                f"replaced; its parts are {children}"
            )
        sites.append(Site(number, block, names[0]))
    return sites


def intermediate_size(feedforward: nn.Module, hidden_size: int) -> int:
    """The inner width of a plain or gated feed-forward: what the layer that gives hidden_size takes.

    Raises:
        SpecError: not exactly one such width.
    """
    widths = {_inputs(layer) for layer in _linear_layers(feedforward) if _outputs(layer) == hidden_size}
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
    layers = [layer for layer in _linear_layers(feedforward) if _outputs(layer) == hidden_size]
    if not layers:
        raise SpecError(f"{type(feedforward).__name__}: no linear layer gives its output")
    return layers[-1]


def _is_feedforward(module: nn.Module, width: int) -> bool:
    if isinstance(module, KANFeedForward | NoFeedForward):
        return True
    layers = _linear_layers(module)
    fits = any(_inputs(layer) == width for layer in layers) and any(_outputs(layer) == width for layer in layers)
    takes = inspect.signature(module.forward).parameters
    attends = any("attention" in name or "past" in name or "position" in name for name in takes)
    needed = [
        name for name, taken in takes.items() if taken.default is taken.empty and taken.kind < taken.VAR_POSITIONAL
    ]
    return fits and not attends and len(needed) == 1


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, LINEAR)]


def _inputs(layer: nn.Module) -> int:
    return int(layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1])  # type: ignore[index]


def _outputs(layer: nn.Module) -> int:
    return int(layer.weight.shape[1] if isinstance(layer, Conv1D) else layer.weight.shape[0])  # type: ignore[index]
