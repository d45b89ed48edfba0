"""The inherited start: the strongest hidden units of the replaced module go on in its replacement."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward, KANLinear
from kallm_bench.models.calibration import Activations
from kallm_bench.models.least_squares import OutputLayer
from kallm_bench.models.sites import LINEAR, Site, activation_of, intermediate_size, output_layer


@torch.no_grad()
def inherit(modules: Mapping[Site, nn.Module], activations: Activations) -> dict[Site, int]:
    """Copies into each module the strongest hidden units of the one at its site, in their old order.

    A unit's strength is the weighted mean of what it adds to the output, h_j² |w_j|², over calibration rows.

    Returns:
        How many units were left behind; 0 at full width.

    Raises:
        SpecError: a form without the original's linear layers, or more units than the original has.
    """
    for site, original in activations.modules.items():
        if isinstance(original, KANFeedForward):
            raise SpecError(
                f"block {site.block} holds a KAN; units are inherited from a model's own feed-forward alone"
            )
    left = {}
    for site, strength in _strengths(activations).items():
        module, original, block = modules[site], activations.modules[site], site.block
        units, hidden = len(strength), _hidden_of(module, activations.width)
        if hidden > units:
            raise SpecError(f"block {block}: {hidden} hidden units cannot be inherited from {units}; take fewer")
        kept = strength.topk(hidden).indices.sort().values
        if isinstance(module, KANFeedForward):
            _into_glu(original, module, kept, block)
        else:
            _into_copy(original, module, kept, units)
        left[site] = units - hidden
    return left


def _strengths(activations: Activations) -> dict[Site, Tensor]:
    """(units,) strength of each hidden unit of the module at each site."""
    layers = {site: OutputLayer(module, activations.width) for site, module in activations.modules.items()}
    totals: dict[Site, Tensor] = {}
    for part in activations.parts("fit"):
        for site, (x, y) in part.seen.items():
            strength = (layers[site].features(x).double().square() * activations.weights(site, y)[:, None]).sum(0)
            totals[site] = totals[site] + strength if site in totals else strength
    for site, module in activations.modules.items():
        layer = output_layer(module, activations.width)
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        totals[site] *= weight.double().square().sum(0)
    return totals


@torch.no_grad()
def keep_matrix(original: nn.Module, module: nn.Module) -> None:
    """Makes a KAN layer with a linear path compute what the linear layer did that it replaces: its functions are zero.

    Raises:
        SpecError: what is replaced is no linear layer any more.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, KANLinear)]
    if not isinstance(original, LINEAR):
        raise SpecError("only a linear layer can be inherited from, and this one was replaced before")
    matrix = original.weight if isinstance(original, nn.Linear) else original.weight.T
    begin = 0
    for layer in layers:
        assert layer.linear is not None
        layer.coefficients.zero_()
        layer.linear.copy_(matrix[:, begin : begin + layer.in_features])
        begin += layer.in_features
    if original.bias is not None:
        layers[0].add_constant(original.bias)


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
