"""What a basis is, and the registry that every family enters by being defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown

BASES: dict[str, type[Basis]] = {}
"""Every family by its public name; filled by importing kallm_bench.kan.bases."""


def widened(x: Tensor) -> Tensor:
    """x in float32 where it is of a half type, for what would lose its digits there; else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm(x: Tensor) -> Tensor:
    """Each token's channels to mean 0 and variance 1, computed in float32 where x is of a half type."""
    wide = widened(x)
    return F.layer_norm(wide, wide.shape[-1:]).to(x.dtype)


SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "norm": _norm,
}
"""Maps from all real numbers (..., I) into a basis's domain. Each token by itself: none ever sees another."""

DOMAINS = {"none": (-8.0, 8.0), "tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "norm": (-4.0, 4.0)}
"""What comes out of each squash: all of it for tanh and sigmoid, where nearly all of it lies for the others."""


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
    groups: int | None = None
    """How many groups of channels have a function of their own, in a family that is learned so; else None."""

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

    def bound(self, in_features: int) -> Self:
        """This basis for a layer of so many inputs: itself, or a copy with learned parameters of its own.

        Learned parameters belong to input channels or groups of them, never to edges.

        Raises:
            SpecError: the inputs cannot be divided as the family needs.
        """
        return self

    def of_degree(self, degree: int) -> Self:
        """This family at a degree no higher than its own, where its functions are the first degree + 1 of these.

        Raises:
            SpecError: a degree out of range; a family without degrees, or with other functions at each.
        """
        why = "its functions at a lower degree are others" if "degree" in self.arguments() else "it has no degree"
        raise SpecError(f"the degree of basis '{self.name}' cannot rise: {why}; take a family of polynomials")

    def reset_parameters(self) -> None:
        """Gives the learned parameters, where a family has some, the values they start from."""

    def start_at_zero(self) -> None:
        """Makes the function of a family that is learned for groups, see `groups`, 0 everywhere, and able to learn."""
        raise NotImplementedError(f"{type(self).__name__} must define start_at_zero")  # for such families alone

    @classmethod
    def arguments(cls) -> dict[str, inspect.Parameter]:
        """The arguments a user may set, by name."""
        return {key: value for key, value in inspect.signature(cls).parameters.items() if key != "self"}


def whole(family: str, argument: str, value: Any, least: int, most: int) -> int:
    """`value`, if it is a whole number in this range; else SpecError."""
    if type(value) is not int or not least <= value <= most:
        raise SpecError(f"{family}: {argument} must be a whole number from {least} to {most}, got {value}")
    return value


def between(family: str, argument: str, value: Any, above: float, below: float) -> float:
    """`value`, if it is a number strictly between these; else SpecError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
        raise SpecError(f"{family}: {argument} must be a number above {above:g} and below {below:g}, got {value}")
    return float(value)


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
    for key, value in read_arguments(family, text).items():
        if arguments.get(key, value) != value:
            raise SpecError(f"{family}: {key} is given twice, as {value} and as {arguments[key]}")
        arguments[key] = value
    for key in arguments:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise SpecError(f"basis '{family}' has no argument '{key}': {takes}")
    return BASES[family](**arguments)


def read_arguments(family: str, text: str) -> dict[str, float]:
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
