"""KAN layers: what nn.Linear is to a matrix product, KANLinear is to a univariate function per edge.

Every layer is linear in its coefficients: `features` gives what they multiply, `load_matrix` sets them all at once. A
closed-form start, a change of basis and an inspection need nothing more of a layer.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kallm_bench.errors import SpecError, unknown
from kallm_bench.kan.bases import BASES, SQUASHES, Basis, make_basis
from kallm_bench.kan.bases.base import read_arguments
from kallm_bench.kan.ops import group_function, kan_linear
from kallm_bench.kan.reference import expand, group_of_squashed

CONSTANTS = ("bias", "edge")


class KANLinear(nn.Module):
    """A linear combination of univariate functions of each input: `kan_linear` with its parameters.

    Args:
        in_features, out_features: I and O.
        basis: a Basis, or its public name ("cheby2", "cheby2:degree=3").
        constant: "bias" folds the basis's constant function, which is the same number on all I edges of an output, into
            one bias: (O, K-1, I) coefficients + (O,). "edge" keeps it on every edge, as published: (O, K, I), no bias.
            Both represent the same functions. A basis without a constant function always has (O, K, I) + (O,).
        linear: whether the raw input also goes through a matrix (O, I), past the basis.
        scaled: whether each input channel has a learned factor (I,) before the squash, which starts at 1.
        bias: False leaves the bias out; for one of several layers whose outputs are added.

    Shapes:
        x (..., I) -> (..., O)

    Raises:
        SpecError: unknown basis or `constant`; channels that the basis's groups do not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: Basis | str,
        *,
        constant: str = "bias",
        linear: bool = False,
        scaled: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if constant not in CONSTANTS:
            raise SpecError(unknown("treatment of the constant", constant, CONSTANTS))
        self.in_features = in_features
        self.out_features = out_features
        self.basis = (make_basis(basis) if isinstance(basis, str) else basis).bound(in_features)
        per_edge = constant == "edge" and self.basis.constant
        functions = self.basis.size - (self.basis.constant and not per_edge)
        self.coefficients = nn.Parameter(torch.empty(out_features, functions, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias and not per_edge else None
        self.linear = nn.Parameter(torch.empty(out_features, in_features)) if linear else None
        self.scale = nn.Parameter(torch.empty(in_features)) if scaled else None
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return kan_linear(self._scaled(x), self.coefficients, self.basis, self.bias, self.linear)

    def by_lower(self, basis: Basis, x: Tensor) -> Tensor:
        """forward(x) as if the coefficients above a degree were zero, at that degree's cost.

        Args:
            basis: this layer's own at the lower degree, from Basis.of_degree.
            x: (..., I) -> (..., O).
        """
        return kan_linear(
            self._scaled(x), self.coefficients[:, : self._functions(basis)], basis, self.bias, self.linear
        )

    @torch.no_grad()
    def zero_above(self, basis: Basis) -> None:
        """Sets to zero the coefficients that `by_lower` leaves out."""
        self.coefficients[:, self._functions(basis) :].zero_()

    @property
    def weight(self) -> Tensor:
        """The coefficients, for code around a linear layer that asks for its weight, or for the dtype of that."""
        return self.coefficients

    def features(self, x: Tensor) -> Tensor:
        """What the coefficients multiply: x (..., I) -> (..., F), the functions of each channel, then the raw path."""
        x = self._scaled(x)
        expanded = expand(x, self.basis, self.coefficients.shape[1])
        return expanded if self.linear is None else torch.cat([expanded, x], dim=-1)

    @torch.no_grad()
    def load_matrix(self, matrix: Tensor, bias: Tensor) -> None:
        """Sets all coefficients so that forward(x) is `features(x) @ matrix.T + bias`.

        Args:
            matrix: (O, F).
            bias: (O,); where the constant is kept on every edge, each edge takes its share.
        """
        functions = self.coefficients.shape[1] * self.in_features
        self.coefficients.copy_(matrix[:, :functions].reshape(self.coefficients.shape))
        if self.linear is not None:
            self.linear.copy_(matrix[:, functions:])
        if self.bias is not None:
            self.bias.zero_()
        self.add_constant(bias)

    @torch.no_grad()
    def add_constant(self, value: Tensor | float) -> None:
        """Adds a number, or (O,) numbers, to the output: to the bias, or in equal shares to the edges' constants."""
        if self.bias is not None:
            self.bias.add_(value)
        elif self.basis.constant and self.coefficients.shape[1] == self.basis.size:
            share = torch.as_tensor(value).to(self.coefficients) / (self.in_features * self._constant_value())
            self.coefficients[:, 0] += share[..., None]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws the coefficients anew: N(0, 1) inputs give outputs of mean square `gain`². Sets the bias to zero.

        Every basis function gets an equal share, and so does the raw path: c[o,k,i] ~ N(0, gain² / (I · K ·
        E[B_k(squash(z))²])). Without that weight, a function of ten times the size would have ten times the say.
        """
        if self.coefficients.is_meta:
            return
        self.basis.reset_parameters()
        shares = mean_squares(self.basis)[-self.coefficients.shape[1] :]  # (K,)
        parts = len(shares) + (self.linear is not None)
        deviations = gain / (self.in_features * parts * shares).sqrt()
        drawn = torch.randn(self.coefficients.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.coefficients.copy_(drawn * deviations.to(drawn.dtype)[:, None])
        if self.linear is not None:
            drawn = torch.randn(self.linear.shape, generator=generator, dtype=torch.float32, device="cpu")
            self.linear.copy_(drawn * gain / (self.in_features * parts) ** 0.5)
        if self.bias is not None:
            self.bias.zero_()
        if self.scale is not None:
            self.scale.fill_(1.0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale.to(x.dtype)

    def _functions(self, basis: Basis) -> int:
        """How many of the coefficients a lower degree has."""
        return self.coefficients.shape[1] - (self.basis.size - basis.size)

    def _constant_value(self) -> float:
        """B_0, for a basis that has a constant function."""
        return float(self.basis(torch.zeros(1, dtype=torch.float64))[0, 0])


class ParallelKANLinear(nn.Module):
    """A parallel mix: the input channels in equal parts, a KANLinear of its own basis on each, the outputs added.

    Args:
        in_features, out_features: I and O.
        bases: two or more bases or their names; as many parts.
        constant, linear, scaled: see KANLinear; the first part holds the bias.

    Shapes:
        x (..., I) -> (..., O)

    Raises:
        SpecError: as KANLinear; also input channels that the parts do not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bases: list[Basis | str],
        *,
        constant: str = "bias",
        linear: bool = False,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        if in_features % len(bases):
            raise SpecError(f"{in_features} input channels are not divisible by the {len(bases)} parts of the mix")
        self.in_features, self.out_features = in_features, out_features
        self.parts = nn.ModuleList(
            KANLinear(
                in_features // len(bases), out_features, basis,
                constant=constant, linear=linear, scaled=scaled, bias=number == 0,
            )
            for number, basis in enumerate(bases)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first, *others = [part(chunk) for part, chunk in zip(self.parts, self._chunks(x), strict=True)]
        total: Tensor = sum(others, start=first)
        return total

    @property
    def weight(self) -> Tensor:
        """See KANLinear: those of the first part."""
        return self._layers()[0].coefficients

    def features(self, x: Tensor) -> Tensor:
        """What the coefficients multiply: x (..., I) -> (..., F), part by part."""
        features = [part.features(chunk) for part, chunk in zip(self._layers(), self._chunks(x), strict=True)]
        return torch.cat(features, dim=-1)

    def load_matrix(self, matrix: Tensor, bias: Tensor) -> None:
        """See KANLinear."""
        layers = self._layers()
        widths = [layer.coefficients[0].numel() + (layer.linear is not None) * layer.in_features for layer in layers]
        for number, (layer, part) in enumerate(zip(layers, torch.split(matrix, widths, dim=1), strict=True)):
            layer.load_matrix(part, bias if number == 0 else torch.zeros_like(bias))

    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws every part anew, with an equal share of the output's mean square `gain`²."""
        for part in self._layers():
            part.reset_parameters(generator, gain / len(self.parts) ** 0.5)

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(len(self.parts), dim=-1)

    def _layers(self) -> list[KANLinear]:
        return [layer for layer in self.parts if isinstance(layer, KANLinear)]


class GroupFunction(nn.Module):
    """One learned univariate function for each group of channels: f_g(x) = Σ_k c[g,k] B_k(squash(x)).

    Args:
        features: channels.
        basis: a Basis or its name. One that is learned for groups by itself, such as `rational`, is the function, and
            has no coefficients beside it.
        groups: G; None for the basis's own number, or 8. They divide the channels.

    Shapes:
        x (..., features) -> the same.

    Raises:
        SpecError: channels that the groups do not divide.
    """

    def __init__(self, features: int, basis: Basis | str, groups: int | None = None) -> None:
        super().__init__()
        family = make_basis(basis) if isinstance(basis, str) else basis
        if family.groups is not None and groups not in (None, family.groups):
            raise SpecError(f"'{family.name}' has its own groups; write {family.name}:groups={groups}")
        groups = family.groups or (8 if groups is None else groups)
        self.features, self.groups = features, groups
        if groups < 1 or features % groups:
            raise SpecError(f"{features} channels are not divisible by {groups} groups")
        shared = family.groups is None and any(True for _ in family.parameters())
        self.basis = family.bound(groups if shared else features)
        self.coefficients = nn.Parameter(torch.zeros(groups, family.size)) if family.groups is None else None

    def forward(self, x: Tensor) -> Tensor:
        return group_function(x, self.basis, self.coefficients)

    def by_lower(self, basis: Basis, x: Tensor) -> Tensor:
        """See KANLinear; (..., features) -> the same."""
        assert self.coefficients is not None  # a basis that is learned by itself has no degrees
        return group_function(x, basis, self.coefficients[:, : basis.size])

    @torch.no_grad()
    def zero_above(self, basis: Basis) -> None:
        """See KANLinear."""
        assert self.coefficients is not None
        self.coefficients[:, basis.size :].zero_()

    def of_squashed(self, x: Tensor) -> Tensor:
        """The functions of what the squash gives, (..., features) -> the same."""
        return group_of_squashed(x, self.basis, self.coefficients)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zero coefficients, or the function that the basis itself starts from."""
        self.basis.reset_parameters()
        if self.coefficients is not None:
            self.coefficients.zero_()


class GroupKANLinear(nn.Module):
    """KAT's sharing: a learned function for each group of input channels, then a matrix.

    Its function starts as SiLU for a basis that is learned for groups by itself, as the identity's nearest for others.

    Args:
        in_features, out_features: I and O.
        basis, groups: see GroupFunction.

    Shapes:
        x (..., I) -> (..., O)

    Raises:
        SpecError: see GroupFunction.

    Source: Yang & Wang 2024, "Kolmogorov-Arnold Transformer", arXiv:2409.10594.
    """

    def __init__(self, in_features: int, out_features: int, basis: Basis | str, groups: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.function = GroupFunction(in_features, basis, groups)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.function(x), self.weight, self.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, gain: float = 1.0) -> None:
        """Draws the matrix anew so that N(0, 1) inputs give outputs of mean square `gain`²."""
        if self.weight.is_meta:
            return
        self.function.reset_parameters()
        if self.function.coefficients is not None:
            self.function.coefficients.copy_(_nearest_to_identity(self.function.basis))
        share = _mean_square_of(self.function, self.in_features)
        drawn = torch.randn(self.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.weight.copy_(drawn * gain / (self.in_features * share) ** 0.5)
        self.bias.zero_()


def make_layer(
    in_features: int,
    out_features: int,
    basis: str,
    *,
    degree: int | None = None,
    constant: str = "bias",
    linear: bool = False,
    scaled: bool = False,
) -> KANLinear | ParallelKANLinear:
    """The layer of a basis's name: a KANLinear, or for a parallel mix "a+b" a ParallelKANLinear. Raises as those."""
    bases: list[Basis | str] = [*read_mix(basis, degree)]
    if len(bases) == 1:
        return KANLinear(in_features, out_features, bases[0], constant=constant, linear=linear, scaled=scaled)
    return ParallelKANLinear(in_features, out_features, bases, constant=constant, linear=linear, scaled=scaled)


def read_mix(text: str, degree: int | None = None) -> list[Basis]:
    """The bases of a parallel mix "a+b", or the one basis that `text` names.

    Args:
        degree: for every family in it that has degrees and whose name does not give one; None for their own defaults.

    Raises:
        SpecError: as make_basis; also a degree where no family has one.
    """
    names = text.split("+")
    if len(names) == 1:
        return [make_basis(text, degree=degree)]
    with_degree = [has_degree(name) for name in names]
    if degree is not None and not any(with_degree):
        raise SpecError(f"no family of '{text}' has a degree; leave it out")
    return [
        make_basis(name, degree=degree if has and not names_degree(name) else None)
        for name, has in zip(names, with_degree, strict=True)
    ]


def has_degree(name: str) -> bool:
    """Whether the family that a basis's name begins with takes a degree. False for an unknown one."""
    family = name.partition(":")[0]
    return family in BASES and "degree" in BASES[family].arguments()


def names_degree(name: str) -> bool:
    """Whether a basis's name gives the degree itself, as "cheby2:degree=3" does."""
    family, _, text = name.partition(":")
    return "degree" in read_arguments(family, text)


@torch.no_grad()
def mean_squares(basis: Basis) -> Tensor:
    """E[B_k(squash(z))²] for z ~ N(0, 1), shape (K,), float64 on the CPU: the mean over 4,001 normal quantiles."""
    with torch.device("cpu"):
        probe = basis.bound(basis.groups or 1)
        x = _squashed_quantiles(basis).expand(-1, basis.groups or 1)
        functions: Tensor = probe.double()(x)  # (4001, K, groups)
        return functions.square().mean(dim=(0, 2))


def _quantiles() -> Tensor:
    z: Tensor = torch.special.ndtri((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)
    return z[:, None]  # (4001, 1)


def _squashed_quantiles(basis: Basis) -> Tensor:
    z = _quantiles()
    return z if basis.squash == "norm" else SQUASHES[basis.squash](z)  # z is normalised already


def _nearest_to_identity(basis: Basis) -> Tensor:
    """(K,) the coefficients whose function is nearest to z for z ~ N(0, 1)."""
    with torch.device("cpu"):
        values: Tensor = basis.bound(1).double()(_squashed_quantiles(basis))[..., 0]  # (4001, K)
        nearest: Tensor = torch.linalg.lstsq(values, _quantiles()).solution[:, 0]
        return nearest


def _mean_square_of(function: GroupFunction, features: int) -> float:
    """E[f(z)²] over all groups for z ~ N(0, 1)."""
    with torch.device("cpu"):
        own = copy.deepcopy(function).double().cpu()
        places = (torch.arange(201)[:, None] * 20 + torch.arange(features) * 997) % 4001
        return float(own(_quantiles()[places, 0]).square().mean())  # (201, features), each channel in another order
