"""What goes into a site: built from a spec, without values yet."""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, KANFeedForward, make_basis
from kallm_bench.kan.layers import has_degree, names_degree, read_mix
from kallm_bench.models.convert import conversion
from kallm_bench.models.sites import NoFeedForward, activation_of, find_sites, intermediate_size
from kallm_bench.models.spec import KANSpec

FAR = 0.1
"""A change of basis that misses by more is made only where it is asked for."""


def complete(spec: KANSpec, originals: list[nn.Module], hidden_size: int, before: list[KANSpec]) -> KANSpec:
    """A resolved spec with start, degree, sizes and groups written out; a basis's other arguments keep their defaults.

    Args:
        originals: the untouched feed-forward of every block of the model.
        before: the retrofits that the model has had, in order.

    Raises:
        SpecError: no default for `hidden`, in blocks that differ in their inner width; a number of parameters that no
            hidden size comes near.
    """
    degree, hidden, kept = spec.degree, spec.hidden, _kept(spec, before)
    if kept:
        linear = spec.linear or kept.linear
        spec = dataclasses.replace(spec, start="convert", linear=linear, scaled=kept.scaled, seed=0)  # nothing is drawn
        hidden = kept.hidden
    elif spec.start == "auto":
        spec = dataclasses.replace(spec, start="random")
    elif spec.is_basis and spec.form != "glu" and set(spec.start.split("+")) & {"lstsq", "distill", "sequence"}:
        spec = dataclasses.replace(spec, scaled=True)
    single_family = spec.is_basis and not set(spec.basis) & set("+>")
    if single_family and degree is None and has_degree(spec.basis) and not names_degree(spec.basis):
        degree = BASES[spec.family].arguments()["degree"].default
    groups = spec.groups
    if spec.is_basis and spec.form == "glu" and groups is None and not make_basis(spec.basis).groups:
        groups = 8
    spec = dataclasses.replace(spec, degree=degree, groups=groups)
    if spec.params is not None:
        return dataclasses.replace(spec, hidden=_hidden_for(spec, originals, hidden_size), params=None)
    if hidden is None and spec.is_basis and spec.form != "single":
        widths = {intermediate_size(originals[int(block)], hidden_size) for block in spec.blocks}
        if len(widths) > 1:
            raise SpecError(f"the blocks' inner widths differ ({sorted(widths)}); pass hidden")
        hidden = widths.pop() // (1 if spec.form == "glu" else 4)
    inherits = "inherit" in spec.start.split("+") and hidden is not None
    least = min(intermediate_size(originals[int(block)], hidden_size) for block in spec.blocks) if inherits else hidden
    if hidden is not None and least is not None and hidden > least:
        raise SpecError(f"{hidden} hidden units cannot be inherited from {least}; take fewer")
    return dataclasses.replace(spec, hidden=hidden)


def _kept(spec: KANSpec, before: list[KANSpec]) -> KANSpec | None:
    """The one retrofit that all these blocks hold, where its functions are what `spec` shall start from; else None."""
    holds = winning_specs(before)
    held = [holds.get(int(block)) for block in spec.blocks]
    first = held[0]
    if spec.start not in ("auto", "convert") or first is None or any(each != first for each in held):
        if spec.start == "convert":
            raise SpecError("start 'convert' needs blocks that hold KANs of one retrofit already")
        return None
    alike = spec.is_basis and first.is_basis and spec.form == first.form != "glu"
    same_shape = alike and spec.params is None and spec.hidden in (None, first.hidden)
    mixed = set(spec.basis + first.basis) & set("+>")
    if same_shape and not mixed and not _learned(spec) and not _learned(first):
        _check_near(first, spec)
        return first
    if spec.start == "convert":
        raise SpecError(
            "a basis is changed within one form and hidden size, between single bases without learned parts"
        )
    return None


def _check_near(old: KANSpec, new: KANSpec) -> None:
    """Refuses a change of basis that nobody asked for by name and that would lose what was learned."""
    error = conversion(make_basis(old.basis, degree=old.degree), make_basis(new.basis, degree=new.degree)).error
    if new.start == "auto" and error > FAR:
        raise SpecError(
            f"these blocks hold '{old.basis}', whose functions '{new.basis}' misses by up to {error:.0%}; take "
            "--start convert to change them all the same, --start random to begin anew, or more functions"
        )


def _learned(spec: KANSpec) -> bool:
    return any(True for _ in BASES[spec.family]().parameters())


def count_parameters(spec: KANSpec, originals: list[nn.Module], hidden_size: int) -> int:
    """How many parameters a spec with `hidden` puts into all of its blocks."""
    with torch.device("meta"):
        modules = [make_replacement(originals[int(block)], hidden_size, spec) for block in spec.blocks]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _hidden_for(spec: KANSpec, originals: list[nn.Module], hidden_size: int) -> int:
    """The hidden size whose parameter count is nearest to `spec.params`."""
    wanted = spec.params
    if wanted == "original":
        wanted = sum(p.numel() for block in spec.blocks for p in originals[int(block)].parameters())
    assert isinstance(wanted, int)
    unit = _unit(spec)

    def count(units: int) -> int:
        return count_parameters(dataclasses.replace(spec, hidden=units * unit, params=None), originals, hidden_size)

    low, high = 1, 2
    while count(high) < wanted and high < 2**16:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    best = min((low, high), key=lambda units: abs(count(units) - wanted))
    if not 0.5 < count(best) / wanted < 2:
        raise SpecError(
            f"no hidden size of '{spec.basis}' comes near {wanted:,} parameters; {count(best):,} is nearest"
        )
    return best * unit


def _unit(spec: KANSpec) -> int:
    """What a hidden size must be a multiple of: the groups of a "glu", the parts of a mix, a basis's own groups."""
    if not spec.is_basis:
        return 1
    own = [basis.groups or 1 for part in spec.basis.split(">") for basis in read_mix(part)]
    if spec.form == "glu":
        return max(own[0], spec.groups or (own[0] if own[0] > 1 else 8))
    parts = [len(part.split("+")) for part in spec.basis.split(">")]
    return math.lcm(*parts, *own) if spec.form == "stack" else 1


def make_replacement(original: nn.Module, hidden_size: int, spec: KANSpec) -> nn.Module:
    """What a complete spec puts in the place of `original`: on the default device, with arbitrary values."""
    if spec.basis == "drop":
        return NoFeedForward()
    if spec.basis == "linear":
        return _resized(original, hidden_size, spec.hidden)
    return KANFeedForward(
        hidden_size,
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
