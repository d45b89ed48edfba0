"""What goes into a site: built from a spec, without values yet."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward, LowRankKAN
from kallm_bench.kan.layers import make_layer
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.sites import (
    LINEAR,
    NoFeedForward,
    Site,
    activation_of,
    inputs_of,
    intermediate_size,
    original_at,
    output_layer,
    outputs_of,
    put,
)
from kallm_bench.models.spec import KANSpec


def make_replacement(anatomy: Anatomy, site: Site, spec: KANSpec) -> nn.Module:
    """What a complete spec puts into a site: on the default device, with arbitrary values.

    Raises:
        SpecError: a width that the basis cannot take.
    """
    original = original_at(anatomy.model, site)
    if spec.target != "feedforward":
        return _make_layer(anatomy, site, original, spec)
    if spec.basis == "drop":
        return NoFeedForward()
    if spec.basis == "linear":
        return _resized(original, anatomy.width, spec.hidden)
    return KANFeedForward(
        anatomy.width,
        spec.hidden or 0,
        spec.basis,
        degree=spec.degree,
        form=spec.form,
        constant=spec.constant,
        linear=spec.linear,
        scaled=spec.scaled,
        groups=spec.groups,
        up=spec.up,
        activation=activation_of(original) or "silu",
    )


def winning_specs(specs: list[KANSpec]) -> dict[tuple[int, str], KANSpec]:
    """(block, part) -> the spec that holds there: a later retrofit wins over an earlier one. Specs must be resolved."""
    return {(int(block), part): spec for spec in specs for block in spec.blocks for part in spec.parts}


def winning_sites(anatomy: Anatomy, specs: list[KANSpec]) -> list[tuple[Site, KANSpec]]:
    """Every site that `specs` have filled, with the spec that holds there, in order of blocks."""
    winners = winning_specs([spec.resolved(len(anatomy.blocks)) for spec in specs])
    sites = {id(spec): anatomy.sites(spec) for spec in winners.values()}
    return [
        (site, spec)
        for (block, part), spec in sorted(winners.items(), key=lambda item: item[0])
        for site in sites[id(spec)]
        if (site.block, site.part) == (block, part)
    ]


def install(model: PreTrainedModel, specs: list[KANSpec]) -> None:
    """Changes `model`, whose modules are all its own, into the shape that `specs` left behind."""
    if not specs:
        return
    anatomy = Anatomy(model)
    made = [(site, make_replacement(anatomy, site, spec)) for site, spec in winning_sites(anatomy, specs)]
    for site, module in made:
        put(model, site, module)


def _make_layer(anatomy: Anatomy, site: Site, original: nn.Module, spec: KANSpec) -> nn.Module:
    """In the place of one linear layer, or beside it."""
    assert isinstance(original, LINEAR)
    if spec.is_adapter:
        if type(original).forward not in [each.forward for each in LINEAR]:
            raise SpecError(f"block {site.name}: a {type(original).__name__} computes more than a matrix product")
        assert spec.rank
        return LowRankKAN(
            inputs_of(original), outputs_of(original), spec.rank, spec.basis,
            degree=spec.degree, form=spec.form, constant=spec.constant, linear=spec.linear,
        )  # fmt: skip
    widths = inputs_of(original), outputs_of(original)
    if spec.hidden:
        widths = _widths(original, anatomy.feedforward(site.block), anatomy.width, spec.hidden)
    if spec.basis == "linear":
        return _linear_like(original, *widths)
    return make_layer(*widths, spec.basis, degree=spec.degree, constant=spec.constant, linear=spec.linear,
                      scaled=spec.scaled)  # fmt: skip


def _widths(layer: nn.Linear | Conv1D, feedforward: nn.Module, hidden_size: int, hidden: int) -> tuple[int, int]:
    """(in, out) of a layer of a feed-forward whose inner width becomes `hidden`."""
    inner = intermediate_size(feedforward, hidden_size)
    if layer is output_layer(feedforward, hidden_size):
        return hidden, outputs_of(layer)
    return inputs_of(layer), outputs_of(layer) // inner * hidden  # gate and up may lie in one matrix


def _resized(original: nn.Module, hidden_size: int, hidden: int | None) -> nn.Module:
    """A copy of a feed-forward module, with another inner width where `hidden` is given."""
    module = copy.deepcopy(original)
    if hidden is None or hidden == intermediate_size(original, hidden_size):
        return module
    layers = {name: layer for name, layer in original.named_modules() if isinstance(layer, LINEAR)}
    own = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    if any(id(parameter) not in own for parameter in original.parameters()):
        raise SpecError(f"{type(original).__name__} has more than linear layers inside; leave hidden out")
    for name, layer in layers.items():
        module.set_submodule(name, _linear_like(layer, *_widths(layer, original, hidden_size, hidden)))
    return module


def _linear_like(layer: nn.Linear | Conv1D, into: int, out: int) -> nn.Linear | Conv1D:
    return Conv1D(out, into) if isinstance(layer, Conv1D) else nn.Linear(into, out, bias=layer.bias is not None)
