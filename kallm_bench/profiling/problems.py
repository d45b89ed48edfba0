"""What is measured of KAN layers by themselves: a layer of one shape and basis is one problem."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.errors import SuiteError, unknown
from kallm_bench.kan.bases import make_basis
from kallm_bench.profiling.contenders import ACTIVATIONS, LAYERS, PACKAGES
from kallm_bench.profiling.hardware import installed_version


@dataclass(frozen=True)
class KernelProblem:
    """One layer of one shape: what is built, on how many tokens, by whom.

    Args:
        out_features: None for a function per channel group, which has as many outputs as inputs.
        contenders: names in LAYERS, or in ACTIVATIONS.
        repeats: samples of each timing.
    """

    tokens: int
    in_features: int
    out_features: int | None
    basis: str
    contenders: tuple[str, ...]
    repeats: int

    @property
    def arm(self) -> str:
        """Its name among the records: 576-384-cheby2-degree2-16384."""
        shape = f"{self.in_features}-{self.out_features}" if self.out_features else f"{self.in_features}"
        return f"{shape}-{re.sub('[:,]', '-', self.basis).replace('=', '')}-{self.tokens}"

    def settings(self) -> dict[str, Any]:
        """Everything that decides what is measured, versions of what is compared included."""
        packages = ("torch", "triton", *(name for name in self.contenders if name in PACKAGES))
        return {
            "tokens": self.tokens,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "basis": self.basis,
            "contenders": list(self.contenders),
            "repeats": self.repeats,
            "versions": {name: installed_version(name) for name in packages},
        }


@dataclass(frozen=True)
class KernelSettings:
    """Problems that belong together: every shape with every basis.

    Args:
        shapes: [in, out] of layers with a function on every edge.
        activations: [tokens, features] of functions per channel group.
        bases: names, with their arguments: "cheby2:degree=4".
        tokens: the rows that a layer is given at once.
        contenders: all that there are for the kind, if left out.
        repeats: samples of each timing; each takes some milliseconds.

    Raises:
        SuiteError: a value that measures nothing.
        SpecError: a basis that cannot be, or not on so many channels.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    activations: tuple[tuple[int, int], ...] = ()
    bases: tuple[str, ...] = ("cheby2:degree=2",)
    tokens: int = 16_384
    contenders: tuple[str, ...] = ()
    repeats: int = 20

    def __post_init__(self) -> None:
        for name, least in {"tokens": 1, "repeats": 2}.items():
            if getattr(self, name) < least:
                raise SuiteError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, means in {"shapes": "[in, out]", "activations": "[tokens, features]"}.items():
            for pair in getattr(self, name):
                numbers = isinstance(pair, Sequence) and all(type(each) is int and each > 0 for each in pair)
                if not numbers or len(pair) != 2:
                    raise SuiteError(f"{name} are pairs {means} of whole numbers from 1, got {pair!r}")
        if not self.shapes and not self.activations:
            raise SuiteError("no shapes and no activations, so nothing would be measured; write shapes = [[576, 384]]")
        for kind, known in ((self.shapes, LAYERS), (self.activations, ACTIVATIONS)):
            for name in self.contenders if kind else ():
                if name not in known:
                    raise SuiteError(unknown("contender", str(name), known))
        if not self.bases or not all(isinstance(name, str) for name in self.bases):
            raise SuiteError(f"bases should be names, at least one, got {list(self.bases)}")
        for problem in self.problems():
            make_basis(problem.basis).bound(problem.in_features)

    def problems(self) -> tuple[KernelProblem, ...]:
        """All of them, complete."""
        layers = [
            KernelProblem(self.tokens, *shape, basis, self.contenders or tuple(LAYERS), self.repeats)
            for basis in self.bases
            for shape in self.shapes
        ]
        functions = [
            KernelProblem(tokens, features, None, basis, self.contenders or tuple(ACTIVATIONS), self.repeats)
            for basis in self.bases
            for tokens, features in self.activations
        ]
        return (*layers, *functions)


def problems_by_hand(
    shapes: Sequence[str], bases: Sequence[str], tokens: int, repeats: int | None = None
) -> tuple[KernelProblem, ...]:
    """What a user asks for on the command line: every basis on every shape.

    Args:
        shapes: "576x384", a layer with a function on every edge, or "1536", a function per channel group. None stands
            for the two layers of a KAN in SmolLM2-135M and its intermediate width, each with the bases made for it.
        bases: none stands for cheby2 of degree 2 on layers and rational on groups.

    Raises:
        SuiteError, SpecError: as KernelSettings; also a shape that does not read.
    """
    common: dict[str, Any] = {"tokens": tokens} | ({} if repeats is None else {"repeats": repeats})
    sizes = [_read_shape(shape) for shape in shapes or ("576x384", "384x576", "1536")]
    layers = tuple((size[0], size[1]) for size in sizes if len(size) == 2)
    widths = tuple((tokens, size[0]) for size in sizes if len(size) == 1)
    edges = groups = tuple(bases)
    if not shapes:
        groups = tuple(name for name in bases if make_basis(name).groups is not None)
        edges = tuple(name for name in bases if name not in groups)
    problems: tuple[KernelProblem, ...] = ()
    if layers and (edges or not bases):
        problems += KernelSettings(shapes=layers, bases=edges or ("cheby2:degree=2",), **common).problems()
    if widths and (groups or not bases):
        problems += KernelSettings(activations=widths, bases=groups or ("rational",), **common).problems()
    return problems


def _read_shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise SuiteError(
            f"cannot read shape '{text}'; write 576x384 for a layer, 1536 for a function per channel group"
        )
    return tuple(int(part) for part in text.split("x"))
