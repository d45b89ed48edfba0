"""The closed-form start: the output layer that answers as the replaced module did, by ridge regression.

Every form is linear in its last layer's coefficients. Their normal equations are summed up row by row in float64, so
memory is (F+1)² numbers for F features, however many rows there are. Ridge and input scale are chosen on rows that the
sums have not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward, KANLinear, ParallelKANLinear
from kallm_bench.kan.feedforward import scale_layer
from kallm_bench.models.calibration import Activations
from kallm_bench.models.sites import LINEAR, Site, output_layer
from kallm_bench.progress import Watch, nobody

RIDGES = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Tried on features of mean square 1."""

SCALES = (0.35, 0.7, 1.4)
"""Tried as the root mean square of each input channel before the squash."""

SCALE_TOKENS = 8192
"""How many tokens the input scale is chosen on."""

LEARNED = (KANFeedForward, KANLinear, ParallelKANLinear)
"""What has a last layer of functions, or may have."""


@dataclass
class Equations:
    """Weighted normal equations: sums over rows of w φφᵀ, w φyᵀ and w |y|², with φ the features and a constant 1."""

    squares: Tensor  # (F+1, F+1)
    products: Tensor  # (F+1, O)
    target: float = 0.0
    rows: int = 0

    @classmethod
    def empty(cls, features: int, outputs: int, device: torch.device) -> Equations:
        squares = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        return cls(squares, torch.zeros(features + 1, outputs, dtype=torch.float64, device=device))

    def add(self, features: Tensor, y: Tensor, weights: Tensor) -> None:
        """Takes in M rows: (M, F), (M, O) and (M,)."""
        ones = torch.ones(len(features), 1, dtype=torch.float64, device=features.device)
        phi = torch.cat([features.double(), ones], dim=1)
        weighted = phi * weights[:, None]
        self.squares += weighted.T @ phi
        self.products += weighted.T @ y.double()
        self.target += float((weights * y.double().square().sum(1)).sum())
        self.rows += len(y)

    def solve(self, ridge: float, constant: bool) -> Tensor:
        """(F+1, O): the weights of the features, and of the constant, which is 0 where the layer has none.

        The ridge is relative to each feature's own mean square; the constant bears none.
        """
        size = len(self.squares) - (not constant)
        squares, products = self.squares[:size, :size], self.products[:size]
        root = squares.diagonal().clamp_min(1e-30).sqrt()
        scaled = squares / root[:, None] / root
        penalty = torch.full((size,), ridge, dtype=torch.float64, device=scaled.device)
        if constant:
            penalty[-1] = 1e-12
        solution = torch.linalg.solve(scaled + penalty.diag(), products / root[:, None]) / root[:, None]
        return solution if constant else torch.cat([solution, torch.zeros_like(products[:1])])

    def missed(self, solution: Tensor) -> float:
        """The share of w |y|² that a solution does not explain."""
        explained = 2 * (solution * self.products).sum() - (solution * (self.squares @ solution)).sum()
        return 1 - float(explained) / self.target


class Solvable(Protocol):
    """A layer that is linear in its coefficients."""

    has_constant: bool

    def features(self, x: Tensor) -> Tensor:
        """What its coefficients multiply, of the whole module's input: (M, hidden_size) -> (M, F)."""
        ...

    def load(self, solution: Tensor) -> None:
        """Sets the coefficients, and last the constant, from (F+1, O)."""
        ...


class InnerLayer:
    """The first of two layers, solved as if it were the last: what it can say of the output, in as many directions as
    it has outputs, is what it hands on.
    """

    has_constant = True

    def __init__(self, layer: KANLinear | ParallelKANLinear) -> None:
        self.layer = layer

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.layer.features(x.to(next(self.layer.parameters()).dtype))

    def load(self, solution: Tensor) -> None:
        self.layer.load_matrix(solution[:-1].T, solution[-1])

    def load_directions(self, equations: Equations, solution: Tensor) -> None:
        """Hands on the strongest directions of what `solution` answers, each at mean square 1.

        A layer with more outputs than there are directions hands on mixtures of them beside, the same each time.
        """
        moments = solution.T @ equations.squares @ solution / equations.squares[-1, -1]  # (O, O), weighted
        sizes, directions = torch.linalg.eigh(moments)
        whitening = directions.flip(1) / sizes.flip(0).clamp_min(1e-12 * float(sizes[-1])).sqrt()  # strongest first
        beside = self.layer.out_features - len(sizes)
        if beside > 0:
            generator = torch.Generator().manual_seed(0)
            mixture = torch.randn(len(sizes), beside, generator=generator, dtype=torch.float64) / len(sizes) ** 0.5
            whitening = torch.cat([whitening, whitening @ mixture.to(whitening)], dim=1)
        self.load(solution @ whitening[:, : self.layer.out_features])


class OutputLayer:
    """The last layer of any replacement, seen as a linear map of features.

    Args:
        module: a KANFeedForward, a KAN layer, or a copy of a model's own feed-forward or linear layer.
        hidden_size: a feed-forward's width, in and out.
    """

    def __init__(self, module: nn.Module, hidden_size: int) -> None:
        self.module = module
        self.layer: nn.Linear | Conv1D | None = None
        if isinstance(module, LINEAR):
            self.layer = module
        elif not isinstance(module, LEARNED):
            self.layer = output_layer(module, hidden_size)
        if isinstance(module, KANFeedForward):
            self.has_constant: bool = module.has_constant
        else:
            self.has_constant = self.layer is None or self.layer.bias is not None

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(M, hidden_size) -> (M, F), in the module's dtype."""
        x = x.to(next(self.module.parameters()).dtype)
        if isinstance(self.module, KANFeedForward):
            return self.module.output_features(x)
        if isinstance(self.module, KANLinear | ParallelKANLinear):
            return self.module.features(x)
        with _inputs_of(self.layer) as seen:
            self.module(x)
        return seen[0]

    @torch.no_grad()
    def load(self, solution: Tensor) -> None:
        """Sets the layer from (F+1, O)."""
        matrix, bias = solution[:-1].T, solution[-1]
        if isinstance(self.module, KANFeedForward):
            self.module.load_output(matrix, bias)
            return
        if isinstance(self.module, KANLinear | ParallelKANLinear):
            self.module.load_matrix(matrix, bias)
            return
        weight = self.layer.weight  # type: ignore[union-attr]
        weight.copy_(matrix if isinstance(self.layer, nn.Linear) else matrix.T)
        if self.has_constant:
            self.layer.bias.copy_(bias)  # type: ignore[union-attr]

    @torch.no_grad()
    def scale(self, factor: Tensor) -> None:
        """Multiplies the layer's matrix, and so the output, by a number."""
        if isinstance(self.module, KANFeedForward):
            self.module.scale_output(float(factor))
        elif self.layer is None:
            for layer in self.module.modules():
                if isinstance(layer, KANLinear):
                    scale_layer(layer, float(factor))
        else:
            self.layer.weight.mul_(float(factor))


def solve_outputs(modules: Mapping[Site, nn.Module], activations: Activations, watch: Watch = nobody) -> None:
    """Sets the output layer of each module by least squares to what the module at its site answers.

    Raises:
        SpecError: fewer calibration tokens than unknowns; says how many there should be.
    """
    outputs: dict[Site, Solvable] = {s: OutputLayer(module, activations.width) for s, module in modules.items()}
    inner: dict[Site, Solvable] = {}
    for site, module in modules.items():
        layer = module.inner_layer() if isinstance(module, KANFeedForward) else None
        if layer is not None:
            inner[site] = InnerLayer(layer)
    _choose_scales(modules, outputs | inner, activations)
    for site, (equations, solution) in _solve(inner, activations, watch).items():
        first, module = inner[site], modules[site]
        assert isinstance(first, InnerLayer)
        assert isinstance(module, KANFeedForward)
        first.load_directions(equations, solution)
        module.let_inner_through()
    for site, (_, solution) in _solve(outputs, activations, watch).items():
        outputs[site].load(solution)


def _solve(
    layers: Mapping[Site, Solvable], activations: Activations, watch: Watch
) -> dict[Site, tuple[Equations, Tensor]]:
    """The equations of each layer's features for what its site answers, and their solution at the best ridge."""
    if not layers:
        return {}
    fitted, decided = _sum_up(layers, activations, "fit", watch), _sum_up(layers, activations, "decide")
    for site in layers:
        unknowns = len(fitted[site].squares)
        if fitted[site].rows < unknowns:
            raise SpecError(
                f"least squares has {unknowns} unknowns for each output and {fitted[site].rows} calibration tokens to "
                f"find them by; take at least {5 * unknowns} --calibration-tokens"
            )
    return {
        site: (fitted[site], _best(fitted[site], decided[site], layer.has_constant)[1])
        for site, layer in layers.items()
    }


def _best(fitted: Equations, decided: Equations, constant: bool) -> tuple[float, Tensor]:
    """What the solution of the best ridge misses on other rows, and that solution."""
    tried = []
    for ridge in RIDGES:
        solution = fitted.solve(ridge, constant)
        tried.append((decided.missed(solution), solution))
    return min(tried, key=lambda pair: pair[0])


def _sum_up(
    outputs: Mapping[Site, Solvable], activations: Activations, span: str, watch: Watch = nobody, most: int = 10**12
) -> dict[Site, Equations]:
    """The equations of the rows of a span, or of the first `most` tokens of it."""
    equations: dict[Site, Equations] = {}
    done = 0
    for part in activations.parts(span):
        for site in outputs:
            x, y = part.seen[site]
            features = outputs[site].features(x)
            if site not in equations:
                equations[site] = Equations.empty(features.shape[1], y.shape[1], y.device)
            equations[site].add(features, y, activations.weights(site, y))
            done += len(y)
        watch("least squares", done // len(outputs), activations.fit_tokens)
        if done >= most * len(outputs):
            break
    return equations


def _choose_scales(
    modules: Mapping[Site, nn.Module], outputs: Mapping[Site, Solvable], activations: Activations
) -> None:
    """Sets the input scale of every module that has one: a channel's root mean square becomes one of SCALES."""
    scaled = {site: layers for site, module in modules.items() if (layers := _scaled_layers(module))}
    if not scaled:
        return
    first = next(activations.parts("fit"))
    sizes = {site: first.seen[site][0].float().square().mean(0) for site in scaled}
    best = dict.fromkeys(scaled, (float("inf"), SCALES[0]))
    few = {site: outputs[site] for site in scaled}
    for scale in SCALES:
        for site in scaled:
            _set_scale(scaled[site], scale, sizes[site])
        fitted = _sum_up(few, activations, "fit", most=SCALE_TOKENS)
        decided = _sum_up(few, activations, "decide", most=SCALE_TOKENS)
        for site in scaled:
            missed = _best(fitted[site], decided[site], outputs[site].has_constant)[0]
            best[site] = min(best[site], (missed, scale))
    for site, (_, scale) in best.items():
        _set_scale(scaled[site], scale, sizes[site])


def _scaled_layers(module: nn.Module) -> list[KANLinear]:
    """The layers that take the module's own input and scale it."""
    layers = module.input_layers() if isinstance(module, KANFeedForward) else list(module.modules())
    return [layer for layer in layers if isinstance(layer, KANLinear) and layer.scale is not None]


@torch.no_grad()
def _set_scale(layers: list[KANLinear], scale: float, squares: Tensor) -> None:
    roots = squares.sqrt().clamp_min(1e-6)
    start = 0
    for layer in layers:
        assert layer.scale is not None
        layer.scale.copy_(scale / roots[start : start + layer.in_features])
        start = (start + layer.in_features) % len(roots)  # the parts of a mix share the channels; paths begin again


@contextmanager
def _inputs_of(layer: nn.Module | None) -> Iterator[list[Tensor]]:
    """Inside, whatever `layer` is fed is appended to the list that is yielded."""
    assert layer is not None
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
