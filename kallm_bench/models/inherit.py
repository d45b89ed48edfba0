"""The inherited start: the strongest hidden units of the replaced module go on in its replacement."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward
from kallm_bench.models.calibration import Activations
from kallm_bench.models.least_squares import OutputLayer
from kallm_bench.models.sites import LINEAR, activation_of, intermediate_size, output_layer


@torch.no_grad()
def inherit(modules: Mapping[int, nn.Module], activations: Activations) -> dict[int, int]:
    """Copies into each module the strongest hidden units of the one at its block, in their old order.

    A unit's strength is the weighted mean of what it adds to the output, h_j² |w_j|², over calibration rows.

    Returns:
        Block number -> how many units were left behind; 0 at full width.

    Raises:
        SpecError: a form without the original's linear layers, or more units than the original has.
    """
    for block in modules:
        if isinstance(activations.module(block), KANFeedForward):
            raise SpecError(f"block {block} holds a KAN; units are inherited from a model's own feed-forward alone")
    left = {}
    for block, strength in _strengths(activations).items():
        module, original = modules[block], activations.module(block)
        units, hidden = len(strength), _hidden_of(module, activations.width)
        if hidden > units:
            raise SpecError(f"block {block}: {hidden} hidden units cannot be inherited from {units}; take fewer")
        kept = strength.topk(hidden).indices.sort().values
        if isinstance(module, KANFeedForward):
            _into_glu(original, module, kept, block)
        else:
            _into_copy(original, module, kept, units)
        left[block] = units - hidden
    return left


def _strengths(activations: Activations) -> dict[int, Tensor]:
    """Block number -> (units,) strength of each hidden unit of the module there."""
    layers = {site.block: OutputLayer(site.module, activations.width) for site in activations.sites}
    totals: dict[int, Tensor] = {}
    for part in activations.parts("fit"):
        for block, (x, y) in part.seen.items():
            strength = (layers[block].features(x).double().square() * activations.weights(block, y)[:, None]).sum(0)
            totals[block] = totals[block] + strength if block in totals else strength
    for site in activations.sites:
        layer = output_layer(site.module, activations.width)
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        totals[site.block] *= weight.double().square().sum(0)
    return totals


def _hidden_of(module: nn.Module, width: int) -> int:
    if not isinstance(module, KANFeedForward):
        return intermediate_size(module, width)
    if module.form != "glu":
        raise SpecError(f"form '{module.form}' has no linear layers to inherit; take form 'glu', or another start")
    return int(module.down_proj.in_features)


def _into_glu(original: nn.Module, module: KANFeedForward, kept: Tensor, block: int) -> None:
    if activation_of(original) is None:
        raise SpecError(f"block {block}: its activation is none that form 'glu' knows, so it cannot be inherited")
    layers = {name: layer for name, layer in original.named_modules() if isinstance(layer, nn.Linear)}
    gates = [name for name in layers if "gate" in name]
    downs = [name for name in layers if layers[name].out_features == module.down_proj.out_features and "down" in name]
    if len(layers) != 3 or len(gates) != 1 or len(downs) != 1 or any(each.bias is not None for each in layers.values()):
        raise SpecError(
            f"block {block}: only a feed-forward of three matrices called gate, up and down, without biases, can be "
            f"inherited by form 'glu'; this one has {', '.join(layers)}"
        )
    (up,) = set(layers) - {gates[0], downs[0]}
    module.gate_proj.weight.copy_(layers[gates[0]].weight[kept])
    module.up_proj.weight.copy_(layers[up].weight[kept])
    module.down_proj.weight.copy_(layers[downs[0]].weight[:, kept])
    module.reset_functions()


def _into_copy(original: nn.Module, module: nn.Module, kept: Tensor, units: int) -> None:
    """Into a narrower copy of the same class: rows of what gives hidden units, columns of what takes them."""
    for name, layer in original.named_modules():
        if not isinstance(layer, LINEAR):
            continue
        target = module.get_submodule(name)
        turned = isinstance(layer, Conv1D)  # (in, out), where nn.Linear is (out, in)
        weight = layer.weight.T if turned else layer.weight
        bias = layer.bias
        if weight.shape[0] == units:
            weight, bias = weight[kept], None if bias is None else bias[kept]
        if weight.shape[1] == units:
            weight = weight[:, kept]
        target.weight.copy_(weight.T if turned else weight)  # type: ignore[operator]
        if bias is not None:
            target.bias.copy_(bias)  # type: ignore[operator]
