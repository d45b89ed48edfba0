"""Curricula: a model that comes to its replacements by degrees, by blocks, or by a mix of what was and what shall be.

What a model computes with is a pure function of the step, so nothing of a curriculum is in a training state. Modules,
parameters, their names and shapes are the same all the time: a module under a curriculum is only called differently.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.errors import TrainingError, unknown
from kallm_bench.kan import KANLinear
from kallm_bench.kan.bases import Basis
from kallm_bench.kan.layers import GroupFunction
from kallm_bench.models import replaced_modules, replaced_sites
from kallm_bench.models.adapted import AdaptedLinear
from kallm_bench.models.revert import sites_from
from kallm_bench.models.sites import Site, answer_by, module_at, original_at
from kallm_bench.training.settings import TrainSettings

STAGES = {
    "backwards": "from the last replaced block to the first",
    "forwards": "from the first replaced block to the last",
}

ANNEALS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: 0.5 - 0.5 * math.cos(math.pi * done),
}
"""The new module's share of a place's output, by how much of the annealing is done; both from 0 to 1."""

RAISED_BY = 0.5
"""The share of a run after which the degree is the layers' own, where the suite does not say when it rises."""


@dataclass(frozen=True)
class CurriculumSettings:
    """How a model comes to its replacements. By default they are all there, whole, from the first step.

    Args:
        start_degree: of every polynomial layer in the beginning, or the layer's own where that is lower; None for its
            own throughout. What a start has put into higher coefficients is lost.
        raise_at: shares of the steps after which it rises by one, until it is the highest layer's own; none named
            raises it evenly over the first half.
        stages: a key of STAGES: each block's own modules compute until its turn; the first has its turn at once.
        stages_over: the share of the steps that the turns are spread over evenly.
        anneal: a key of ANNEALS: from a block's turn on, the output is a mix of what its own modules and what the new
            ones answer, and goes over to these.
        anneal_over: the share of the steps that this takes, for each block.

    Raises:
        TrainingError: a value out of its range, or stages and annealing that together outlast the run.
    """

    start_degree: int | None = None
    raise_at: tuple[float, ...] = ()
    stages: str | None = None
    stages_over: float = 0.5
    anneal: str | None = None
    anneal_over: float = 0.25

    def __post_init__(self) -> None:
        if self.start_degree is not None and self.start_degree < 1:
            raise TrainingError(f"start_degree must be at least 1, got {self.start_degree}")
        if self.raise_at and self.start_degree is None:
            raise TrainingError(f"raise_at {list(self.raise_at)} needs a start_degree to rise from")
        numbers = all(type(share) in (int, float) and 0 < share < 1 for share in self.raise_at)
        if not numbers or list(self.raise_at) != sorted(set(self.raise_at)):
            raise TrainingError(f"raise_at takes rising shares of the run, between 0 and 1, got {list(self.raise_at)}")
        if self.stages is not None and self.stages not in STAGES:
            raise TrainingError(unknown("order of stages", self.stages, STAGES))
        if self.anneal is not None and self.anneal not in ANNEALS:
            raise TrainingError(unknown("annealing", self.anneal, ANNEALS))
        for name in ("stages_over", "anneal_over"):
            if not 0 < getattr(self, name) <= 1:
                raise TrainingError(f"{name} is a share of the run, above 0 and at most 1, got {getattr(self, name)}")
        if self.stages and self.anneal and self.stages_over + self.anneal_over > 1:
            raise TrainingError(
                f"stages over {self.stages_over:g} and annealing over {self.anneal_over:g} of the run are longer than "
                "it; together they may be 1 at most"
            )

    @property
    def needs_base(self) -> bool:
        """Whether the untouched model's modules take part."""
        return bool(self.stages or self.anneal)

    @property
    def active(self) -> bool:
        """Whether anything differs from a run without a curriculum."""
        return self.start_degree is not None or self.needs_base


@dataclass(frozen=True)
class _Layer:
    """A layer whose degree rises, and its own basis at every lower degree that it passes, lowest first."""

    layer: KANLinear | GroupFunction
    bases: tuple[Basis, ...]


@dataclass(frozen=True)
class _Place:
    """A new module, what stood there before, when its turn comes, and its share in between, a number on its device."""

    module: nn.Module
    original: nn.Module
    turn: int
    share: Tensor


class Curriculum:
    """What a retrofitted model computes with at each step of a run. Making one changes nothing.

    Args:
        model: the retrofitted one, not wrapped for several processes.
        settings: which curriculum.
        steps: of the whole run.
        base: the model that `model` was made from, where settings.needs_base. Its modules at the replaced places serve
            as they are, frozen, on the model's device.

    Raises:
        TrainingError: no layer whose degree could rise, another number of raises than it takes, no `base` where one is
            needed, or a place that cannot be shared.
        SpecError: a basis that does not grow by degrees; a `base` that `model` was not made from.
    """

    def __init__(
        self, model: PreTrainedModel, settings: CurriculumSettings, steps: int, base: PreTrainedModel | None = None
    ) -> None:
        self.settings, self.steps = settings, steps
        sites = replaced_sites(model)
        self._layers = _growing(sites.values(), settings.start_degree) if settings.start_degree is not None else []
        self._raises = self._raise_steps()
        self._annealing = max(1, round(settings.anneal_over * steps)) if settings.anneal else 0
        self._places: list[_Place] = []
        if settings.needs_base:
            if not sites:
                raise TrainingError("stages and annealing need replaced blocks and this model has none")
            if base is None:
                raise TrainingError("stages and annealing need the model that this one was made from; pass it as base")
            self._places = self._places_of(model, base, list(sites))
        self._now: tuple[object, ...] = ()

    def degree(self, step: int) -> int | None:
        """The degree that no polynomial layer exceeds in a step; None where it does not rise by schedule."""
        if self.settings.start_degree is None:
            return None
        return self.settings.start_degree + sum(step >= start for start in self._raises)

    def shares(self, step: int) -> tuple[float, ...]:
        """The new modules' shares in a step, 0 to 1, place by place; none without stages and annealing."""
        bend = ANNEALS[self.settings.anneal or "linear"]
        done = [(step - place.turn + 1) / (self._annealing + 1) for place in self._places]
        return tuple(0.0 if share <= 0 else bend(min(share, 1.0)) for share in done)

    @property
    def places(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each new module that does not stand there whole all the time, and its original, in the order of `shares`."""
        return [(place.module, place.original) for place in self._places]

    def lowered(self, step: int) -> dict[nn.Module, float]:
        """Layers of edges whose degree is below their own in a step, and the share of coefficients that count then."""
        degree = self.degree(step)
        if degree is None:
            return {}
        layers = [each.layer for each in self._layers if isinstance(each.layer, KANLinear)]
        below = {layer: layer.basis.size - 1 - degree for layer in layers}
        return {layer: 1 - count / layer.coefficients.shape[1] for layer, count in below.items() if count > 0}

    def set(self, step: int) -> None:
        """Changes the model into what it is in a step, counted from 0.

        To be called before every step; where a run is taken up again, after its state has been. Coefficients above a
        layer's degree are set to zero, which they are unless it is the first step: so a raise leaves the layer's
        function as it is. A new module whose share is 0 is not called and gets no gradient; nor is an original called
        whose share is 0.
        """
        degree, shares = self.degree(step), self.shares(step)
        for place, share in zip(self._places, shares, strict=True):
            place.share.fill_(share)
        now = (degree, *(0 if share == 0 else 1 if share == 1 else 0.5 for share in shares))
        if now == self._now:
            return
        self._release()
        self._now = now
        for each in self._layers:
            if degree is not None and degree < each.layer.basis.size - 1:
                basis = next(basis for basis in each.bases if basis.size == degree + 1)
                each.layer.zero_above(basis)
                answer_by(each.layer, functools.partial(each.layer.by_lower, basis))
        for place, share in zip(self._places, shares, strict=True):
            if share == 0:
                answer_by(place.module, functools.partial(_first, place.original))
            elif share < 1:
                answer_by(place.module, functools.partial(_mixed, place.module.forward, place.original, place.share))

    def finish(self) -> None:
        """Changes the model into what a checkpoint holds: every new module whole, at its own degree, and alone."""
        self._release()
        self._layers, self._places = [], []

    def _release(self) -> None:
        for each in self._layers:
            answer_by(each.layer, None)
        for place in self._places:
            answer_by(place.module, None)
        self._now = ()

    def _raise_steps(self) -> list[int]:
        if not self._layers:
            return []
        first = self.settings.start_degree or 0
        count = max(each.layer.basis.size - 1 for each in self._layers) - first
        shares = self.settings.raise_at or [RAISED_BY * (number + 1) / count for number in range(count)]
        if len(shares) != count:
            raise TrainingError(
                f"raise_at names {len(shares)} raises; from degree {first} to {first + count} it takes {count}"
            )
        return [round(share * self.steps) for share in shares]

    def _places_of(self, model: PreTrainedModel, base: PreTrainedModel, sites: list[Site]) -> list[_Place]:
        blocks = sorted({site.block for site in sites}, reverse=self.settings.stages == "backwards")
        sites_from(base, model, blocks)  # refused where the base is another
        apart = self.settings.stages_over * self.steps / len(blocks) if self.settings.stages else 0.0
        turns = {block: round(apart * number) for number, block in enumerate(blocks)}
        places = []
        for site in sites:
            if site.takes > 1:
                raise TrainingError(
                    f"block {site.name}: its own feed-forward is given more than hidden states, so the two cannot take "
                    "turns; leave stages and anneal out"
                )
            if isinstance(model.get_submodule(site.path), AdaptedLinear):
                raise TrainingError(
                    f"block {site.name}: an adapter begins as the original, so the two cannot take turns; leave stages "
                    "and anneal out"
                )
            pairs = [(module_at(model, site), original_at(base, site))]
            pairs += [(model.get_submodule(path), base.get_submodule(path)) for path in site.silent]
            for module, original in pairs:
                device = next((parameter.device for parameter in module.parameters()), model.device)
                original = original.to(device, model.dtype).requires_grad_(False).eval()
                places.append(_Place(module, original, turns[site.block], torch.zeros((), device=device)))
        return places


def make_curriculum(
    model: PreTrainedModel, settings: CurriculumSettings, train: TrainSettings, base: PreTrainedModel | None = None
) -> Curriculum | None:
    """The curriculum of one training run; None where it has none. Skeletons do, to ask whether there can be one.

    Raises:
        TrainingError, SpecError: see Curriculum; also a replaced block below what learns.
    """
    if not (settings.active and train.steps):
        return None
    first = min(replaced_modules(model), default=0)
    if train.scope in ("tail", "tail+head") and (train.tail_from or 0) > first:
        raise TrainingError(
            f"tail_from {train.tail_from}: block {first} was replaced and would not learn, so it can take no part in a "
            f"curriculum; take {first} or leave tail_from out"
        )
    return Curriculum(model, settings, train.steps, base)


def _growing(modules: Iterable[nn.Module], start_degree: int) -> list[_Layer]:
    """Every layer of functions in `modules`; checks that their degrees can rise."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, KANLinear | GroupFunction)]
    growing = [
        _Layer(layer, tuple(layer.basis.of_degree(d) for d in range(min(start_degree, top), top + 1)))
        for layer in layers
        for top in [layer.basis.size - 1]
    ]
    if not layers:
        raise TrainingError(f"start_degree {start_degree} is for layers of functions, and nothing replaced has any")
    if not any(layer.basis.size - 1 > start_degree for layer in layers):
        degrees = sorted({layer.basis.size - 1 for layer in layers})
        raise TrainingError(f"start_degree {start_degree} is not below any layer's own; their degrees are {degrees}")
    return growing


def _first(module: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor | tuple[Tensor, ...] = module(x)
    return answer if isinstance(answer, Tensor) else answer[0]


def _mixed(new: Callable[[Tensor], Tensor], original: nn.Module, share: Tensor, x: Tensor) -> Tensor:
    old = _first(original, x)
    return old + share * (new(x) - old)  # a tensor without dimensions keeps the others' dtype
