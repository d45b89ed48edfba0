"""What a model is taught by beside data: the untouched model, and a curriculum."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from kallm_bench.engine.checkpoints import base_of
from kallm_bench.errors import TrainingError
from kallm_bench.filing import ModelRef
from kallm_bench.models import load_config, specs_of
from kallm_bench.training import CurriculumSettings, DistillationSettings, TrainSettings, check_context


@dataclass(frozen=True)
class Lessons:
    """What there is to a training run beside its settings.

    Args:
        curriculum, distillation: how a model comes to its replacements, and how much it learns from the untouched one.
        base: the untouched model, where it is not the one that the checkpoint says it was made of.
    """

    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    base: ModelRef | None = None

    def of(self, ref: ModelRef) -> Lessons:
        """The same for a checkpoint: with the untouched model if that takes part, else without. Raises as base_of."""
        if not (self.curriculum.needs_base or self.distillation.active):
            return dataclasses.replace(self, base=None)
        made = ref.lineage or specs_of(load_config(ref.open()))
        return dataclasses.replace(self, base=self.base or (base_of(ref) if made else ref))

    def check(self, settings: TrainSettings) -> None:
        """Asks whether it goes with these settings. TrainingError if not."""
        if settings.task == "classify" and self.distillation.active:
            raise TrainingError("task 'classify' has nothing to distill: the untouched model knows no classes")
        if self.base:
            check_context(load_config(self.base.open()), settings.row_length, "the untouched model")
        if settings.scope == "lora" and self.curriculum.active:
            raise TrainingError("a curriculum changes what adapters would be added to; take another scope than 'lora'")

    def described(self) -> dict[str, Any]:
        """The part of a stage's settings; where there are none, nothing, so that keys are what they were."""
        told: dict[str, Any] = {"base": self.base.fingerprint} if self.base else {}
        if self.curriculum.active:
            told["curriculum"] = dataclasses.asdict(self.curriculum)
        if self.distillation.active:
            told["distillation"] = dataclasses.asdict(self.distillation)
        return told


NO_LESSONS = Lessons()
