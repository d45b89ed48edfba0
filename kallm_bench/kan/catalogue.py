"""What bases there are, for people who choose one."""

from __future__ import annotations

from typing import NamedTuple

from kallm_bench.kan.bases import BASES, make_basis
from kallm_bench.kan.layers import KANLinear


class Entry(NamedTuple):
    """A basis with its default arguments, and a 576 -> 384 layer of it."""

    name: str
    arguments: str
    squash: str
    functions: int
    parameters: int
    what: str


def catalogue() -> list[Entry]:
    """One entry a registered basis, by name."""
    entries = []
    for name, family in sorted(BASES.items()):
        arguments = ", ".join(f"{key}={parameter.default}" for key, parameter in family.arguments().items())
        layer = KANLinear(576, 384, make_basis(name))
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        what = (family.__doc__ or "").strip().splitlines()[0]
        entries.append(Entry(name, arguments, family.squash, layer.basis.size, parameters, what))
    return entries
