"""A spec with nothing left to defaults: what a retrofit will put into one particular architecture."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from kallm_bench.errors import SpecError
from kallm_bench.kan import BASES, make_basis
from kallm_bench.kan.layers import has_degree, names_degree, read_mix
from kallm_bench.models.anatomy import Anatomy
from kallm_bench.models.convert import conversion
from kallm_bench.models.replacement import make_replacement, winning_specs
from kallm_bench.models.sites import Site, intermediate_size, linear_layers, original_at
from kallm_bench.models.spec import KANSpec

RANK = 16
"""Of an adapter, where none is given: what training's own adapters have."""

FAR = 0.1
"""A change of basis that misses by more is made only where it is asked for."""


def complete(spec: KANSpec, anatomy: Anatomy, before: list[KANSpec]) -> KANSpec:
    """A resolved spec with start, degree, sizes and groups written out; a basis's other arguments keep their defaults.

    Args:
        before: the retrofits that the model has had, in order.

    Raises:
        SpecError: a block without the place that the spec fills; no default for `hidden`, in blocks that differ in
            their inner width; a number of parameters that no hidden size comes near.
    """
    _check_places(spec, anatomy, before)
    degree, hidden, kept = spec.degree, spec.hidden, _kept(spec, before)
    if kept:
        linear = spec.linear or kept.linear
        spec = dataclasses.replace(spec, start="convert", linear=linear, scaled=kept.scaled, seed=0)  # nothing is drawn
        hidden = kept.hidden
    elif spec.start == "auto":
        spec = dataclasses.replace(spec, start="random")
    elif spec.is_basis and spec.form != "glu" and set(spec.start.split("+")) & {"lstsq", "distill", "sequence"}:
        spec = dataclasses.replace(spec, scaled=True)
    inherits = "inherit" in spec.start.split("+")
    if inherits and spec.target != "feedforward":
        spec = dataclasses.replace(spec, linear=True)  # where the old matrix goes on
    single_family = spec.is_basis and not set(spec.basis) & set("+>")
    if single_family and degree is None and has_degree(spec.basis) and not names_degree(spec.basis):
        degree = BASES[spec.family].arguments()["degree"].default
    groups = spec.groups
    if spec.is_basis and spec.form == "glu" and groups is None and not make_basis(spec.basis).groups:
        groups = 8
    spec = dataclasses.replace(spec, degree=degree, groups=groups)
    if spec.is_adapter and spec.rank is None:
        spec = dataclasses.replace(spec, rank=RANK)
    if spec.params is not None:
        return dataclasses.replace(spec, hidden=_hidden_for(spec, anatomy), params=None)
    if spec.target != "feedforward":
        return spec
    if hidden is None and spec.is_basis and spec.form != "single":
        widths = {_inner(anatomy, int(block)) for block in spec.blocks}
        if len(widths) > 1:
            raise SpecError(f"the blocks' inner widths differ ({sorted(widths)}); pass hidden")
        hidden = widths.pop() // (1 if spec.form == "glu" else 4)
    least = min(_inner(anatomy, int(block)) for block in spec.blocks) if inherits and hidden is not None else hidden
    if hidden is not None and least is not None and hidden > least:
        raise SpecError(f"{hidden} hidden units cannot be inherited from {least}; take fewer")
    return dataclasses.replace(spec, hidden=hidden)


def count_parameters(spec: KANSpec, anatomy: Anatomy) -> int:
    """How many parameters a spec with `hidden` puts into all of its blocks."""
    return _count(spec, anatomy, _alike(anatomy, spec))


def _alike(anatomy: Anatomy, spec: KANSpec) -> list[tuple[Site, int]]:
    """Of all places that a spec fills, one of each kind, and how many are of that kind."""
    kinds: dict[Any, list[Site]] = {}
    for site in anatomy.sites(spec):
        shapes = tuple(parameter.shape for parameter in original_at(anatomy.model, site).parameters())
        kinds.setdefault((site.part, site.label, shapes), []).append(site)
    return [(sites[0], len(sites)) for sites in kinds.values()]


def _count(spec: KANSpec, anatomy: Anatomy, alike: Sequence[tuple[Site, int]]) -> int:
    total = 0
    with torch.device("meta"):
        for site, count in alike:
            module = make_replacement(anatomy, site, spec)
            total += count * sum(parameter.numel() for parameter in module.parameters())
    return total


def replaced_parameters(spec: KANSpec, anatomy: Anatomy) -> int:
    """How many parameters the architecture itself has in the places that a spec fills."""
    modules = [original_at(anatomy.model, site) for site in anatomy.sites(spec)]
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _check_places(spec: KANSpec, anatomy: Anatomy, before: list[KANSpec]) -> None:
    """Refuses what the architecture, or an earlier retrofit, has no place for."""
    anatomy.sites(spec)
    if spec.target == "feedforward":
        return
    held = winning_specs(before)
    for block, part in ((int(block), part) for block in spec.blocks for part in spec.parts):
        earlier = held.get((block, part))
        if earlier and earlier.target == "feedforward":
            raise SpecError(
                f"block {block} holds no linear layers any more: its feed-forward was replaced as a whole; "
                "put it back first, with --revert"
            )
        if earlier and spec.is_adapter and not earlier.is_adapter:
            raise SpecError(
                f"block {block} holds other layers than the model's own, which alone take form '{spec.form}'; put them "
                "back first, with --revert"
            )
        if part == "attention":
            continue
        inner = anatomy.feedforward(block)
        own = sum(parameter.numel() for layer in linear_layers(inner) for parameter in layer.parameters())
        if (spec.hidden or spec.params) and own < sum(parameter.numel() for parameter in inner.parameters()):
            raise SpecError(
                f"block {block} has more than linear layers at its inner width; leave hidden and params out"
            )


def _inner(anatomy: Anatomy, block: int) -> int:
    return intermediate_size(anatomy.feedforward(block), anatomy.width)


def _kept(spec: KANSpec, before: list[KANSpec]) -> KANSpec | None:
    """The one retrofit that all these blocks hold, where its functions are what `spec` shall start from; else None."""
    holds = winning_specs(before)
    held = [holds.get((int(block), part)) for block in spec.blocks for part in spec.parts]
    first = held[0]
    if spec.start not in ("auto", "convert") or first is None or any(each != first for each in held):
        if spec.start == "convert":
            raise SpecError("start 'convert' needs blocks that hold KANs of one retrofit already")
        return None
    alike = spec.is_basis and first.is_basis and spec.target == first.target and spec.form == first.form != "glu"
    same_shape = alike and not spec.is_adapter and spec.params is None and spec.hidden in (None, first.hidden)
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


def _hidden_for(spec: KANSpec, anatomy: Anatomy) -> int:
    """The hidden size whose parameter count is nearest to `spec.params`."""
    wanted = replaced_parameters(spec, anatomy) if spec.params == "original" else spec.params
    assert isinstance(wanted, int)
    unit, alike = _unit(spec), _alike(anatomy, spec)

    @functools.cache
    def count(units: int) -> int:
        return _count(dataclasses.replace(spec, hidden=units * unit, params=None), anatomy, alike)

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
