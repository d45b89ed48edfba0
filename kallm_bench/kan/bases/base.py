"""What a basis is, and the registry that every family enters by being defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown

BASES: dict[str, type[Basis]] = {}
"""Every family by its public name; filled by importing kallm_bench.kan.bases."""

SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
"""Elementwise maps from all real numbers into a basis's domain. Elementwise, so that no token ever sees another."""


class Basis(nn.Module):
    """A family of univariate functions B_0 .. B_{K-1}, evaluated on every input channel.

    Shapes:
        forward: squashed x (..., I) -> (..., K, I); slab k holds B_k of each channel.

    A subclass states its name in the class line and sets `size`; that registers it, and the command line, the tests and
    the reports find it by that name:

        class Legendre(Basis, name="legendre"): ...
    """

    name: ClassVar[str]
    squash: ClassVar[str] = "tanh"
    """Key of SQUASHES: maps a layer's raw input into the domain. `kan_linear` applies it; a kernel can fuse it."""
    constant: ClassVar[bool] = True
    """Whether B_0 is the same constant for every input, so that its coefficients can fold into a layer's bias."""
    size: int

    def __init_subclass__(cls, name: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if name is not None:  # else a template that families share
            other = BASES.get(name)
            if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise SpecError(f"basis '{name}' is there already, in {other.__module__}; choose another name")
            cls.name = name
            BASES[name] = cls

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward")  # abstract

    @classmethod
    def arguments(cls) -> dict[str, inspect.Parameter]:
        """The arguments a user may set, by name."""
        return {key: value for key, value in inspect.signature(cls).parameters.items() if key != "self"}


def make_basis(name: str, **arguments: Any) -> Basis:
    """A basis from its public name.

    Args:
        name: a key of BASES, with or without arguments after a colon: "cheby2", "cheby2:degree=3".
        arguments: the family's own arguments; they must not repeat one given in the name. None means "as if left out".

    Raises:
        SpecError: no such family, no such argument, or a value out of its range.
    """
    family, _, text = name.partition(":")
    if family not in BASES:
        raise SpecError(unknown("basis", family, BASES))
    known = BASES[family].arguments()
    arguments = {key: value for key, value in arguments.items() if value is not None}
    for key, value in _read_arguments(family, text).items():
        if arguments.get(key, value) != value:
            raise SpecError(f"{family}: {key} is given twice, as {value} and as {arguments[key]}")
        arguments[key] = value
    for key in arguments:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise SpecError(f"basis '{family}' has no argument '{key}': {takes}")
    return BASES[family](**arguments)


def _read_arguments(family: str, text: str) -> dict[str, float]:
    """{"a": 1, "b": 0.5} from "a=1,b=0.5"."""
    arguments: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if key.strip() in arguments:
            raise SpecError(f"{family}: {key.strip()} is given twice in '{text}'")
        try:
            arguments[key.strip()] = float(value) if set(value) & set(".e") else int(value)
        except ValueError:
            equals = ""
        if not equals:
            raise SpecError(f"{family}: cannot read '{part}'; write NAME=NUMBER, for example '{family}:degree=3'")
    return arguments
