"""What a KAN has learned, as numbers: which functions carry the weight, which edges are curved, which are lines.

Everything is over a normally distributed input u, what reaches the basis's squash after the layer's own scale.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.kan import GroupFunction, KANFeedForward, KANLinear, LowRankKAN, ParallelKANLinear
from kallm_bench.kan.bases import SQUASHES
from kallm_bench.kan.feedforward import ACTIVATIONS
from kallm_bench.models.retrofit import replaced_sites

LINEAR_WITHIN = 0.01
"""An edge counts as linear where what a line leaves over is at most this share of the function's deviation."""

POINTS = 401


@dataclass(frozen=True)
class LayerFacts:
    """One layer of learned functions.

    Args:
        block, layer: where it is: the block's number, the layer's name in the module.
        energy: share of each basis function, in order, and of the linear path last, in Σ c² E[B²].
        edges, linear_edges: how many functions there are, and how many of them are lines to within LINEAR_WITHIN.
        curvature: median over edges of the standard deviation that a line leaves over, as a share of the function's.
    """

    block: int
    layer: str
    energy: tuple[float, ...]
    edges: int
    linear_edges: int
    curvature: float


@dataclass(frozen=True)
class Curve:
    """One learned function: on the edge from `source` to `target`, or of a group of channels (source = target).

    `u` and `values` are its points; `curved` is the share of its standard deviation that no line explains.
    """

    block: int
    layer: str
    target: int
    source: int
    curved: float
    u: tuple[float, ...]
    values: tuple[float, ...]


def inspect_model(model: PreTrainedModel, top: int = 3) -> tuple[list[LayerFacts], list[Curve]]:
    """The facts of every layer of learned functions, and the `top` most curved functions of each.

    Most curved by the variance that no line explains, so that a large bent function comes before a tiny one.

    Raises:
        SpecError: the model holds no KAN.
    """
    facts, curves = [], []
    for site, module in replaced_sites(model).items():
        block = site.block
        for inner, layer in _layers(module):
            name = ".".join(part for part in (site.label, inner) if part)
            table = _Table.of(layer, module)
            residual = table.residual()
            curved = (residual / table.variance().clamp_min(1e-30)).clamp(0, 1).sqrt()
            lines, energy = int((curved <= LINEAR_WITHIN).sum()), tuple(table.energy().tolist())
            facts.append(LayerFacts(block, name, energy, curved.numel(), lines, float(curved.median())))
            for number in residual.flatten().topk(min(top, residual.numel())).indices.tolist():
                target, source = divmod(number, residual.shape[1])
                values = table.curve(target, source)
                curve = Curve(block, name, target, source, float(curved[target, source]), table.points, values)
                curves.append(curve)
    if not facts:
        raise SpecError("this model holds no KAN; there is nothing to inspect")
    return facts, curves


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, KANFeedForward | KANLinear | ParallelKANLinear | LowRankKAN):
        for name, layer in module.named_modules():
            if isinstance(layer, KANLinear | GroupFunction):
                yield name, layer


@dataclass(frozen=True)
class _Table:
    """Functions of a layer as coefficients of what they are made of: values (P, F, I), coefficients (O, F, I)."""

    u: Tensor  # (P,), normal quantiles
    values: Tensor
    coefficients: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Module, module: nn.Module) -> _Table:
        u: Tensor = torch.special.ndtri((torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
        if isinstance(layer, GroupFunction):
            return cls._of_groups(layer, module, u)
        assert isinstance(layer, KANLinear)
        values = _basis_values(layer, u, layer.in_features)
        coefficients = layer.coefficients.double().cpu()
        values = values[:, values.shape[1] - coefficients.shape[1] :]
        if layer.linear is not None:
            values = torch.cat([values, u[:, None, None].expand(-1, 1, layer.in_features)], dim=1)
            coefficients = torch.cat([coefficients, layer.linear.double().cpu()[:, None]], dim=1)
        return cls(u, values, coefficients)

    @classmethod
    def _of_groups(cls, layer: GroupFunction, module: nn.Module, u: Tensor) -> _Table:
        """The whole function of each group, the activation that it is added to included: (1, 1, G)."""
        features = layer.features
        z = u if layer.basis.squash == "norm" else SQUASHES[layer.basis.squash](u)
        gate = isinstance(module, KANFeedForward) and layer is module.gate_function
        activation = ACTIVATIONS[module.activation if gate and isinstance(module, KANFeedForward) else "identity"]
        own = _on_cpu(layer)
        assert isinstance(own, GroupFunction)
        whole = activation(u[:, None]) + own.of_squashed(z[:, None].expand(-1, features))
        first_of_each = whole[:, :: features // layer.groups]  # (P, G)
        return cls(u, first_of_each[:, None], torch.ones(1, 1, layer.groups, dtype=torch.float64))

    @property
    def points(self) -> tuple[float, ...]:
        return tuple(np.linspace(-3, 3, 121).tolist())

    def energy(self) -> Tensor:
        """(F,) shares of Σ c² E[B²]."""
        sizes = (self.coefficients.square().sum(0) * self.values.square().mean(0)).sum(-1)
        return sizes / sizes.sum().clamp_min(1e-30)

    def variance(self) -> Tensor:
        """(O, I) variance of each function over u."""
        return self._form(_covariance(self.values))

    def residual(self) -> Tensor:
        """(O, I) variance of each function less that of its best line."""
        centred = self.values - self.values.mean(0)
        slope = torch.einsum("p,pfi->fi", self.u - self.u.mean(), centred) / POINTS  # covariance with u
        explained = torch.einsum("fi,gi->ifg", slope, slope) / self.u.var(correction=0)
        return self._form(_covariance(self.values) - explained).clamp_min(0)

    def curve(self, target: int, source: int) -> tuple[float, ...]:
        """The function's values at `points`."""
        made = self.values[:, :, source] @ self.coefficients[target, :, source]  # (P,)
        values = np.interp(self.points, self.u.numpy(), made.numpy())
        return tuple(values.tolist())

    def _form(self, matrices: Tensor) -> Tensor:
        """cᵀ M c for every edge: matrices (I, F, F) -> (O, I)."""
        applied = torch.einsum("ifg,ogi->ofi", matrices, self.coefficients)
        return (applied * self.coefficients).sum(1)


def _covariance(values: Tensor) -> Tensor:
    """(P, F, I) -> (I, F, F)."""
    centred = values - values.mean(0)
    return torch.einsum("pfi,pgi->ifg", centred, centred) / len(values)


def _basis_values(layer: KANLinear, u: Tensor, channels: int) -> Tensor:
    """(P, K, I) in float64 on the CPU."""
    basis = _on_cpu(layer.basis)
    squashed = u if layer.basis.squash == "norm" else SQUASHES[layer.basis.squash](u)
    values: Tensor = basis(squashed[:, None].expand(-1, channels))
    return values


def _on_cpu(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().cpu()


def curves_as_rows(curves: Sequence[Curve]) -> list[list[float | str]]:
    """A header and a line for each point of each curve, for a CSV file."""
    rows: list[list[float | str]] = [["block", "layer", "target", "source", "curved", "u", "value"]]
    for curve in curves:
        head: list[float | str] = [curve.block, curve.layer, curve.target, curve.source, round(curve.curved, 6)]
        rows += [[*head, round(u, 4), value] for u, value in zip(curve.u, curve.values, strict=True)]
    return rows
