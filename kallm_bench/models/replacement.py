"""What goes into a site: built from a spec, without values yet."""

from __future__ import annotations

import copy
import dataclasses

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, KANFeedForward
from kallm_bench.models.sites import NoFeedForward, find_sites, intermediate_size
from kallm_bench.models.spec import KANSpec


def complete(spec: KANSpec, originals: list[nn.Module], hidden_size: int) -> KANSpec:
    """A resolved spec with every default written out, so that it means the same when defaults change.

    Args:
        originals: the untouched feed-forward of every block of the model.

    Raises:
        SpecError: a "stack" without `hidden`, in blocks that differ in their inner width.
    """
    degree, hidden = spec.degree, spec.hidden
    if spec.is_basis and degree is None and "degree" in BASES[spec.family].arguments() and "degree=" not in spec.basis:
        degree = BASES[spec.family].arguments()["degree"].default
    if hidden is None and spec.is_basis and spec.form == "stack":
        widths = {intermediate_size(originals[int(block)], hidden_size) for block in spec.blocks}
        if len(widths) > 1:
            raise SpecError(f"the blocks' inner widths differ ({sorted(widths)}); pass hidden")
        hidden = widths.pop() // 4
    return dataclasses.replace(spec, degree=degree, hidden=hidden)


def make_replacement(original: nn.Module, hidden_size: int, spec: KANSpec) -> nn.Module:
    """What a complete spec puts in the place of `original`: on the default device, with arbitrary values."""
    if spec.basis == "drop":
        return NoFeedForward()
    if spec.basis == "linear":
        return _resized(original, hidden_size, spec.hidden)
    return KANFeedForward(
        hidden_size, spec.hidden or 0, spec.basis, degree=spec.degree, form=spec.form, constant=spec.constant
    )


def winning_specs(specs: list[KANSpec]) -> dict[int, KANSpec]:
    """Block number -> the spec that holds there: a later retrofit wins over an earlier one. Specs must be resolved."""
    return {int(block): spec for spec in specs for block in spec.blocks}


def install(model: PreTrainedModel, specs: list[KANSpec]) -> None:
    """Changes `model`, whose feed-forwards are all original, into the shape that `specs` left behind."""
    sites = find_sites(model)
    width = model.config.get_text_config(decoder=True).hidden_size
    for block, spec in winning_specs([spec.resolved(len(sites)) for spec in specs]).items():
        sites[block].replace(make_replacement(sites[block].module, width, spec))


def _resized(original: nn.Module, hidden_size: int, hidden: int | None) -> nn.Module:
    """A copy of a feed-forward module, with another inner width where `hidden` is given."""
    module = copy.deepcopy(original)
    inner = intermediate_size(original, hidden_size)
    if hidden is None or hidden == inner:
        return module

    def swapped(width: int) -> int:
        return hidden if width == inner else width

    for name, layer in list(module.named_modules()):
        new: nn.Module
        if isinstance(layer, nn.Linear):
            new = nn.Linear(swapped(layer.in_features), swapped(layer.out_features), bias=layer.bias is not None)
        elif isinstance(layer, Conv1D):
            new = Conv1D(swapped(layer.nf), swapped(layer.weight.shape[0]))
        else:
            continue
        module.set_submodule(name, new)
    return module
