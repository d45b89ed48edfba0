"""What bases there are, for people who choose one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kallm_bench.kan.bases import BASES, Basis, make_basis
from kallm_bench.kan.bases.base import DOMAINS
from kallm_bench.kan.layers import KANLinear

DRAWN = 4
"""So many functions of each family are drawn, the constant not among them."""

WIDE = 11
"""Characters of a drawing."""


class Entry(NamedTuple):
    """A basis with its default arguments, and a 576 -> 384 layer of it.

    `flops` are those of the layer's matrix product for one token, 2 a coefficient. `drawing`: its first functions over
    the domain, each from its lowest value to its highest.
    """

    name: str
    arguments: str
    squash: str
    domain: str
    functions: int
    parameters: int
    flops: int
    drawing: str
    what: str


def catalogue() -> list[Entry]:
    """One entry a registered basis, by name."""
    entries = []
    for name, family in sorted(BASES.items()):
        arguments = ", ".join(f"{key}={parameter.default}" for key, parameter in family.arguments().items())
        layer = KANLinear(576, 384, make_basis(name))
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        low, high = DOMAINS[family.squash]
        entries.append(
            Entry(
                name,
                arguments,
                family.squash,
                f"[{low:g}, {high:g}]" if family.squash in ("tanh", "sigmoid") else "all numbers",
                layer.basis.size,
                parameters,
                2 * layer.coefficients.numel(),
                draw(make_basis(name)),
                (family.__doc__ or "").strip().splitlines()[0],
            )
        )
    return entries


@torch.no_grad()
def draw(basis: Basis) -> str:
    """The first functions of a basis over its domain, a word of block characters each."""
    basis = basis.bound(basis.groups or 1)
    x = torch.linspace(*DOMAINS[basis.squash], WIDE)[:, None].expand(-1, basis.groups or 1)
    values: Tensor = basis(x)[:, basis.constant :, 0]  # (WIDE, K)
    return " ".join(_blocks(values[:, k]) for k in range(min(DRAWN, values.shape[1])))


def _blocks(values: Tensor) -> str:
    low, high = values.min(), values.max()
    levels = ((values - low) / (high - low).clamp_min(1e-9) * 7).round().int()
    return "".join("▁▂▃▄▅▆▇█"[level] for level in levels.tolist())
