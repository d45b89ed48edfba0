"""Knowledge distillation from the untouched model: the cheapest teacher at hand, for it is half loaded already.

Below the first block that differs, teacher and student are one frozen prefix. So where the decoder can be entered, the
teacher computes the blocks from there on, from what the student has computed already, and owns no weights but those
that the student replaced or learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kallm_bench.errors import TrainingError
from kallm_bench.kan.bases.base import widened
from kallm_bench.models.anatomy import find_blocks
from kallm_bench.models.sites import answer_by
from kallm_bench.training.loss import (
    Head,
    Objective,
    bent,
    bias_of,
    compiled,
    in_compute_dtype,
    is_target,
    judged,
)
from kallm_bench.training.scope import after_blocks

CHUNK = {"cuda": 1024, "cpu": 128}
"""Positions whose logits, the student's and the teacher's, exist at one time; on a CPU so few that they stay at hand:
at 512 positions of 49,152 tokens both losses take 1.2 s of one core's time, and 1.7 by 1,024."""


@dataclass(frozen=True)
class DistillationSettings:
    """How much of the loss is what the untouched model would say. By default nothing.

    Args:
        weight: w of (1 - w) cross-entropy + w T² KL(teacher || student), from 0 to 1.
        temperature: T, by which both models' logits are divided for the divergence; T² keeps its gradient's size.

    Raises:
        TrainingError: a value out of its range.

    Source:
        Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """

    weight: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise TrainingError(f"weight of the distillation is a share from 0 to 1, got {self.weight}")
        if not 0 < self.temperature < 1e4:
            raise TrainingError(f"temperature must be above 0 and below 10,000, got {self.temperature}")

    @property
    def active(self) -> bool:
        """Whether a teacher is needed."""
        return self.weight > 0


def distilled_loss_sum(
    student: Head,
    hidden: Tensor,
    targets: Tensor,
    teacher: Head,
    teacher_hidden: Tensor,
    settings: DistillationSettings,
) -> Objective:
    """(1 - w) cross-entropy + w T² KL(teacher || student), summed over the positions that bear loss.

    Where both heads are plain matrices, the gradient is taken in the one pass that the loss takes, see loss; other
    heads are computed again in backward. Of the teacher nothing gets a gradient.

    Args:
        hidden, teacher_hidden: (P, H) and (P, H of the teacher), final hidden states at these positions alone.
        targets: (P,) token ids.
    """
    if student.matrix is not None and teacher.matrix is not None:
        hidden, known = in_compute_dtype(hidden), in_compute_dtype(teacher_hidden.detach())
        values = teacher.matrix.weight.detach().to(known.dtype)
        shifts = bias_of(student.matrix, hidden), bias_of(teacher.matrix, known)
        shapes = [
            (shift, head.shape.scale, head.shape.cap) for shift, head in zip(shifts, (student, teacher), strict=True)
        ]
        of_products = compiled(_losses_and_slope, hidden.device)

        def judge(span: slice, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            said = products, known[span] @ values.T
            found: tuple[Tensor, Tensor, Tensor] = of_products(
                *said, *shapes, targets[span], settings.weight, settings.temperature
            )
            return found

        return judged(student.matrix, hidden, judge, CHUNK)
    total = hidden.new_zeros((), dtype=widened(hidden).dtype)
    cross_entropy = total.clone()
    for start in range(0, len(targets), CHUNK["cpu"]):
        span = slice(start, start + CHUNK["cpu"])
        arguments = student, hidden[span], targets[span], teacher, teacher_hidden[span].detach(), settings
        part: Objective = checkpoint(_plain_losses, *arguments, use_reentrant=False)
        total, cross_entropy = total + part.total, cross_entropy + part.cross_entropy.detach()
    return Objective(total, cross_entropy)


Shape = tuple[Tensor | None, float, float | None]
"""Of a head: its bias, and the scale and the cap of its logits."""


def _losses_and_slope(
    products: Tensor,
    wanted: Tensor,
    own: Shape,
    teachers: Shape,
    targets: Tensor,
    weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of both heads' products (C, V): the summed losses, and the first one's derivative by the student's.

    T² KL is T² Σ q (log q - log p), with p and q at temperature T; by a logit that is T (p - q).
    """
    logits, bend = bent(products, *own)
    log_p = torch.log_softmax(logits, dim=1)
    right = is_target(products, targets)
    cross_entropy = -torch.where(right, log_p, 0.0).sum()
    said = torch.log_softmax(logits / temperature, dim=1)
    known = torch.log_softmax(bent(wanted, *teachers)[0] / temperature, dim=1)
    q = known.exp()
    divergence = temperature**2 * (q * (known - said)).sum()
    slope = (1 - weight) * (log_p.exp() - right.to(log_p.dtype)) + weight * temperature * (said.exp() - q)
    total = (1 - weight) * cross_entropy + weight * divergence
    return total, cross_entropy, (slope * bend).to(products.dtype)


def _plain_losses(
    student: Head,
    hidden: Tensor,
    targets: Tensor,
    teacher: Head,
    teacher_hidden: Tensor,
    settings: DistillationSettings,
) -> Objective:
    logits = widened(student(hidden))
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum")
    with torch.no_grad():
        wanted = F.log_softmax(widened(teacher(teacher_hidden)) / settings.temperature, dim=-1)
    said = F.log_softmax(logits / settings.temperature, dim=-1)
    divergence = settings.temperature**2 * F.kl_div(said, wanted, reduction="sum", log_target=True)
    return Objective((1 - settings.weight) * cross_entropy + settings.weight * divergence, cross_entropy)


class Teacher:
    """The untouched model, as far as it differs from the one that learns from it.

    Args:
        model: the student, after its scope was applied and before it is wrapped for several processes; not changed.
        base: the untouched model, on the same device. Changed: frozen, in evaluation mode, and of its parameters those
            that the student holds frozen, with the same values, become the student's.
        settings: what its word counts.

    Raises:
        TrainingError: another vocabulary than the student's.
    """

    def __init__(self, model: PreTrainedModel, base: PreTrainedModel, settings: DistillationSettings) -> None:
        words, own = (each.get_output_embeddings().weight.shape[0] for each in (base, model))
        if words != own:
            raise TrainingError(f"the teacher has {words} words and the student {own}; take what it was made from")
        self.base = base.requires_grad_(False).eval()
        self._heads, self._settings = (Head.of(model), Head.of(base)), settings
        self._blocks = find_blocks(base)
        self.enters_at = _first_that_differs(base, _share(base, model))
        """Number of the block whose input it can begin from; 0 where it must compute the whole model."""
        self._as_block_answers: Callable[[Tensor], Any] = lambda hidden: hidden
        if self.enters_at and not self._can_enter():
            self.enters_at = 0

    @property
    def tail(self) -> list[nn.Module]:
        """The blocks that it runs, where it begins where it can."""
        return list(self._blocks[self.enters_at :])

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, position_ids: Tensor, entering: Tensor | None = None, **bounds: Any) -> Tensor:
        """Final hidden states (B, T, H), after the last norm.

        Args:
            input_ids, position_ids: (B, T), as the student's.
            entering: (B, T, H) what enters block `enters_at` in the student; None computes it anew.
            bounds: where documents begin, for packed attention.
        """
        given = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **bounds}
        decoder = self.base.get_decoder()
        if entering is None or not self.enters_at:
            whole: Tensor = decoder(**given)[0]
            return whole
        answer, skipped = self._as_block_answers(entering.detach()), self._blocks[: self.enters_at]
        try:
            for block in skipped:
                answer_by(block, lambda *args, **kwargs: answer)
            tail: Tensor = decoder(**given)[0]
        finally:
            for block in skipped:
                answer_by(block, None)
        return tail

    def loss(self, hidden: Tensor, targets: Tensor, own: Tensor) -> Objective:
        """What the student's final hidden states (P, H) lose, by the teacher's `own` (P, H); see distilled_loss_sum."""
        student, teacher = self._heads
        return distilled_loss_sum(student, hidden, targets, teacher, own, self._settings)

    @torch.no_grad()
    def _can_enter(self) -> bool:
        """Whether the decoder, entered, answers as it does when it runs from the beginning. Finds a block's answer."""
        answers: list[Any] = []
        handle = self._blocks[self.enters_at - 1].register_forward_hook(lambda *seen: answers.append(seen[-1]))
        ids = (torch.arange(16, device=self.base.device) * 7 % self.base.get_input_embeddings().num_embeddings)[None]
        positions = (torch.arange(16, device=self.base.device) % 8)[None]  # two documents
        try:
            whole = self.hidden(ids, positions)
        finally:
            handle.remove()
        if len(answers) != 1:
            return False
        if isinstance(answers[0], tuple):
            nothing = (None,) * (len(answers[0]) - 1)
            self._as_block_answers = lambda hidden: (hidden, *nothing)
        return torch.equal(whole, self.hidden(ids, positions, _tensor_of(answers[0])))


def _tensor_of(answer: Any) -> Tensor:
    hidden: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return hidden


@torch.no_grad()
def _share(base: PreTrainedModel, model: PreTrainedModel) -> set[str]:
    """Puts parameters of `model` that are frozen and equal into `base`; returns the names of all others, of either."""
    own = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in theirs.items():
        same = own.get(name)
        if same is None or same.requires_grad or type(same) is not type(parameter):
            continue
        if same.dtype == parameter.dtype and same.device == parameter.device and torch.equal(same, parameter):
            holder, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(holder), leaf, same)
    shared = {name for name, parameter in base.named_parameters(remove_duplicate=False) if parameter is own.get(name)}
    return (own.keys() | theirs.keys()) - shared


def _first_that_differs(base: PreTrainedModel, names: set[str]) -> int:
    """The first block that parameters of these names have a say in; the number of blocks for what comes after them."""
    blocks = find_blocks(base)
    prefix = next(name for name, module in base.named_modules() if module is blocks) + "."
    embeddings = set(base.get_input_embeddings().parameters())
    behind = [*after_blocks(base), base.get_output_embeddings()]
    late = {parameter for module in behind for parameter in module.parameters()} - embeddings
    after = {name for name, parameter in base.named_parameters(remove_duplicate=False) if parameter in late}
    first = len(blocks)
    for name in names - after:
        first = min(first, int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else 0)
    return first
