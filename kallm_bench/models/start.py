"""Where the new parameters start: at random, or from what the replaced modules knew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from kallm_bench.errors import SpecError
from kallm_bench.kan import KANFeedForward, KANLinear, LowRankKAN, ParallelKANLinear
from kallm_bench.models.calibration import Activations, Calibration, explained
from kallm_bench.models.convert import convert_module
from kallm_bench.models.distill import distill
from kallm_bench.models.inherit import inherit, keep_matrix
from kallm_bench.models.least_squares import OutputLayer, solve_outputs
from kallm_bench.models.sites import LINEAR, Site
from kallm_bench.models.spec import KANSpec
from kallm_bench.progress import Watch, nobody


@dataclass(frozen=True)
class StartReport:
    """How well the replacements stand in for what they replace.

    Args:
        r2: name of a site (a block's number, unless it has several) -> R² on held-out calibration rows; empty without
            calibration.
        conversion_error: largest miss of a change of basis, relative to each function's largest value; else None.
    """

    r2: Mapping[str, float] = field(default_factory=dict)
    conversion_error: float | None = None


def start(
    model: PreTrainedModel,
    standing: Mapping[Site, nn.Module],
    replacements: Mapping[Site, nn.Module],
    spec: KANSpec,
    deviation: float,
    calibration: Calibration | None = None,
    watch: Watch = nobody,
) -> StartReport:
    """Gives every replacement its values, phase after phase of `spec.start`.

    Args:
        model: with the old modules still in place; not changed.
        standing: what stands at each site.
        replacements: what shall stand there; changed in place.
        deviation: standard deviation of linear weights drawn at random, the model's own `initializer_range`.
        calibration: needed by all phases but "random" and "convert"; with it, a random start has the output variance of
            what it replaces. Adapters, which begin at zero, do without.

    Raises:
        SpecError: a start that needs calibration and has none; and as the phases do.
    """
    phases = spec.start.split("+")
    if calibration is None and spec.needs_calibration:
        raise SpecError(f"start '{spec.start}' needs calibration data; pass --calibration, or take --start random")
    draws = Counter[int]()
    for site, module in replacements.items():
        start_randomly(module.eval(), spec.seed, site.block, deviation, draws[site.block])
        draws[site.block] += 1
    if spec.is_adapter:  # it begins at zero, whatever the layer beside it answers
        return StartReport()
    if phases == ["convert"]:
        return StartReport(conversion_error=max(convert_module(standing[s], new) for s, new in replacements.items()))
    if phases[0] == "inherit" and spec.target != "feedforward":
        for site, module in replacements.items():
            keep_matrix(standing[site], module)
        if calibration is None or phases == ["inherit"]:
            return StartReport()
    if calibration is None or not any(True for module in replacements.values() for _ in module.parameters()):
        return StartReport()
    training = model.training
    try:
        model.eval()  # what is replaced must answer the same each time
        return _calibrated(Activations(model, standing, calibration), replacements, spec, watch)
    finally:
        model.train(training)


def _calibrated(
    activations: Activations, replacements: Mapping[Site, nn.Module], spec: KANSpec, watch: Watch
) -> StartReport:
    phases = spec.start.split("+")
    if phases[0] in ("random", "distill", "sequence"):  # the others do not begin from what was drawn
        _match_variance(replacements, activations)
    for phase in phases:
        if phase == "lstsq":
            solve_outputs(replacements, activations, watch)
        elif phase == "inherit" and spec.target == "feedforward":
            if any(inherit(replacements, activations).values()):
                solve_outputs(replacements, activations, watch)  # what was left behind is made up for
        elif phase == "distill":
            distill(replacements, activations, spec.start_steps, watch)
        elif phase == "sequence":
            distill(replacements, activations, max(1, spec.start_steps // 4), watch, in_sequence=True)
    return StartReport(explained(replacements, activations))


@torch.no_grad()
def start_randomly(module: nn.Module, seed: int, block: int, deviation: float, number: int = 0) -> None:
    """Draws every parameter of a replacement anew; the same on every machine for equal (seed, block, number).

    Args:
        module: what make_replacement built; changed in place.
        seed, block, number: which draw; `number` counts the replacements in a block.
        deviation: standard deviation of linear weights, the model's own `initializer_range`.

    Raises:
        SpecError: the module holds parameters of a kind that has no known start.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7_919 * number + block)
    if isinstance(module, KANFeedForward | KANLinear | ParallelKANLinear | LowRankKAN):
        module.reset_parameters(generator)
        return
    for layer in module.modules():
        if isinstance(layer, LINEAR):
            drawn = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            layer.weight.copy_(drawn * deviation)
            if layer.bias is not None:
                layer.bias.zero_()
        elif any(True for _ in layer.parameters(recurse=False)):
            raise SpecError(f"cannot restart {type(module).__name__}: no start is known for its {type(layer).__name__}")


@torch.no_grad()
def _match_variance(modules: Mapping[Site, nn.Module], activations: Activations) -> None:
    """Scales each output layer so that the output's variance is that of the replaced module, over one batch of rows."""
    for site, (x, y) in next(activations.parts("fit")).seen.items():
        output = OutputLayer(modules[site], activations.width)
        predicted = modules[site](x.to(next(modules[site].parameters()).dtype))
        output.scale((y.double().var() / predicted.double().var()).sqrt())
