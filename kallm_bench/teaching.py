"""What a teacher and a curriculum add to a training step, of FLOP and of memory, counted from shapes.

A teacher is a forward pass over every row, of the untouched model's blocks from the first that differs on, and of its
head. An original that has not given way yet computes, and passes a gradient on, beside the new module or in its place.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kallm_bench.footprint import Beside, Turn, through
from kallm_bench.models import replaced_modules, skeleton_of
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.profiling.flops import product_weights, training_flops_of
from kallm_bench.training import CurriculumSettings, DistillationSettings, TrainSettings, make_curriculum
from kallm_bench.training.curriculum import Curriculum
from kallm_bench.training.entry import first_learning

LOOKS = 200
"""A curriculum of more steps than that is looked at in every second one, or third ..."""


@dataclass(frozen=True)
class Taught:
    """What a run is taught by beside its data."""

    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Taught:
        """Of the settings in a training's record."""
        told = dict(settings.get("curriculum") or {})
        names = {entry.name for entry in dataclasses.fields(CurriculumSettings)}
        told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        curriculum = CurriculumSettings(**{name: value for name, value in told.items() if name in names})
        return cls(curriculum, DistillationSettings(**(settings.get("distillation") or {})))


@dataclass(frozen=True)
class Costs:
    """What comes beside a step of the model alone.

    Args:
        flops: a token, in the mean over all steps; below zero where less is computed.
        memory: what estimated_peaks takes.
    """

    flops: float = 0.0
    memory: Beside = field(default_factory=Beside)


def costs_of(
    model: PreTrainedModel, config: PreTrainedConfig, taught: Taught, settings: TrainSettings, bearing: float
) -> Costs:
    """What a teacher and a curriculum add to training a model.

    Args:
        model: a skeleton, whose scope is set.
        config: of the model; without what it notes of retrofits it is the untouched one's.
        bearing: share of the positions that bear loss.

    Raises:
        TrainingError, SpecError: the curriculum cannot be.
    """
    if not settings.steps:
        return Costs()
    heard = taught.distillation.active
    base = _untouched(config) if heard or taught.curriculum.needs_base else None
    held, flops, turns = 0, 0.0, [Turn()]
    if curriculum := make_curriculum(model, taught.curriculum, settings, base):
        several = list(_looked_at(curriculum, training_flops_of(model, bearing)))
        flops += sum(each for each, _ in several) / len(several)
        turns = list({turn: None for _, turn in several})
        held = sum(_count(original) for _, original in curriculum.places)
    if base is not None and heard:
        flops += _hearing_flops(model, base, bearing)
        held = max(held, _own_parameters(model, base))
    loaded = _count(base) if base is not None else 0
    return Costs(flops, Beside(loaded, held, tuple(turns), heard, curriculum is not None))


def _untouched(config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    config.kallm = None
    return skeleton_of(config)


def _looked_at(curriculum: Curriculum, own: Mapping[nn.Module, float]) -> Iterator[tuple[float, Turn]]:
    """Of steps all over the run: FLOP a token more than without a curriculum, and what differs in memory.

    An original learns nothing: it takes a forward pass and the gradient by its input.
    """
    for step in range(0, curriculum.steps, math.ceil(curriculum.steps / LOOKS)):
        left = curriculum.lowered(step)
        flops, values, idle = 0.0, 0, 0
        for (new, original), share in zip(curriculum.places, curriculum.shares(step), strict=True):
            if share == 0:
                left |= dict.fromkeys(new.modules(), 0.0)
                values -= through(new)
                idle += sum(each.numel() for each in new.parameters() if each.requires_grad)
            if share < 1:
                flops += 2 * 2 * sum(map(product_weights, original.modules()))
                values += through(original, inputs=False)
        flops += sum((share - 1) * own.get(module, 0.0) for module, share in left.items())
        yield flops, Turn(values, idle)


def _hearing_flops(model: PreTrainedModel, base: PreTrainedModel, bearing: float) -> float:
    """Of a teacher, a token: see Forward and Teacher.enters_at."""
    learning = first_learning(model)
    enters = learning <= min(replaced_modules(model), default=learning)
    if model.get_input_embeddings().weight.requires_grad:  # also those that learn as a head alone
        enters = False
    blocks = find_blocks(base)[learning if enters else 0 :]
    head = base.get_output_embeddings()
    inside = sum(product_weights(module) for block in blocks for module in block.modules())
    return 2 * (inside + bearing * product_weights(head))


def _own_parameters(model: PreTrainedModel, base: PreTrainedModel) -> int:
    """Of a teacher: those that its student does not hold frozen."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return sum(parameter.numel() for name, parameter in base.named_parameters() if name not in frozen)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
