"""Everything that decides what training does: one frozen value, filled by the command line or by a suite's [train]."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kallm_bench.errors import TrainingError, unknown
from kallm_bench.training.adapters import LoraSettings

SCHEDULES = {
    "cosine": "after the warm-up, down half a cosine",
    "linear": "after the warm-up, down a straight line",
    "constant": "after the warm-up, no more change",
    "wsd": "warm-up, stable, decay: constant until the last `decay_share` of the steps, then down a straight line",
}

TASKS = {
    "chat": "the assistant's next token, in conversations",
    "classify": "the class of each text, from the decoder's output at its last token",
}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what training does.

    Args:
        data, heldout: see data.prepare; heldout None holds out a part of `data`.
        tokens: how many are seen, rounded down to whole steps: those of the first rows, whatever the seed. 0 trains
            nothing and measures the held-out loss alone.
        row_length: tokens in a row.
        packing: whether conversations lie one after the other in full rows. Without it each has rows of its own, for
            architectures that cannot keep them apart; what is left of a row counts as seen, and bears no loss.
        rows_per_step: rows whose gradients make one step, however many go through the model at once, and on however
            many processes.
        scope: a key of scope.SCOPES.
        tail_from: first block of the tail; None for the first replaced one.
        learning_rate: its peak.
        new_learning_rate: the same for the modules that a retrofit put in; None for learning_rate.
        schedule: a key of SCHEDULES.
        warmup: share of the steps in which the rate rises linearly to its peak.
        final_share: what share of its peak the rate falls to.
        decay_share: share of the steps in which a "wsd" schedule falls.
        betas, weight_decay: of AdamW; what has one dimension, as norms and biases, and a basis's own parameters do not
            decay.
        clip_norm: the largest norm of a step's gradient.
        heldout_rows: how many held-out rows are scored, at most; the first ones.
        heldout_every: the held-out loss is also taken after every so many steps; below 1, a share of them all; 0 takes
            it before the first step and after the last alone.
        seed: permutes these rows.

    Raises:
        TrainingError: a value out of its range.
    """

    data: str = "bundled"
    heldout: str | None = None
    tokens: int = 1_000_000
    row_length: int = 1024
    packing: bool = True
    rows_per_step: int = 32
    scope: str = "tail"
    tail_from: int | None = None
    learning_rate: float = 4e-4
    new_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    final_share: float = 0.1
    decay_share: float = 0.2
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    heldout_rows: int = 128
    heldout_every: float = 0.0
    seed: int = 0
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    task: str = "chat"

    def __post_init__(self) -> None:
        for name, least in {"tokens": 0, "row_length": 2, "rows_per_step": 1, "heldout_rows": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise TrainingError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if (self.tail_from or 0) < 0:
            raise TrainingError(f"tail_from must be at least 0, got {self.tail_from}")
        if self.task not in TASKS:
            raise TrainingError(unknown("task", self.task, TASKS))
        if self.task != "chat" and not self.packing:
            raise TrainingError(f"task '{self.task}' packs its texts; packing = false is for chat")
        _ = self.lora  # refuses what cannot be
        if self.schedule not in SCHEDULES:
            raise TrainingError(unknown("schedule", self.schedule, SCHEDULES))
        for name in ("learning_rate", "new_learning_rate", "clip_norm"):
            value = getattr(self, name)
            most, said = (1e3, "below 1000") if "rate" in name else (math.inf, "finite")
            if not (value is None or 0 < value < most):
                raise TrainingError(f"{name} must be above 0 and {said}, got {value:g}")
        for name in ("warmup", "final_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.weight_decay < math.inf:
            raise TrainingError(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if not (0 <= self.heldout_every < 1 or (self.heldout_every > 0 and float(self.heldout_every).is_integer())):
            raise TrainingError(
                f"heldout_every is a whole number of steps, or a share of them below 1, got {self.heldout_every}"
            )
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"betas are two numbers from 0 to below 1, such as 0.9 and 0.95, got {self.betas}")
        if self.schedule == "wsd" and self.warmup + self.decay_share > 1:
            raise TrainingError(
                f"schedule 'wsd': warmup {self.warmup} and decay_share {self.decay_share} are more than the whole run"
            )
        if 0 < self.tokens < self.rows_per_step * self.row_length:
            raise TrainingError(
                f"{self.tokens} tokens do not fill one step of {self.rows_per_step} rows of {self.row_length}: "
                "take more tokens, or fewer or shorter rows"
            )

    @property
    def lora(self) -> LoraSettings:
        return LoraSettings(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets)

    def described(self) -> dict[str, Any]:
        """All of it that decides this training, for its record: settings of another task or scope do not."""
        unused = {name for name in vars(self) if name.startswith("lora_") and self.scope != "lora"}
        unused |= {name for name, usual in {"task": "chat", "packing": True}.items() if getattr(self, name) == usual}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unused}

    @property
    def steps(self) -> int:
        return self.tokens // (self.rows_per_step * self.row_length)

    @property
    def heldout_interval(self) -> int:
        """Steps from one held-out loss to the next; 0 where none is taken on the way."""
        every = self.heldout_every
        return int(every) if every >= 1 else max(1, round(every * self.steps)) if every else 0
