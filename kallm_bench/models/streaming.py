"""A model that runs with one block's weights in memory at a time: they come before the block's turn and go after it.

A decoder calls its blocks one after the other, so a forward pass needs the values of one block, and of what lies before
and after all blocks: embeddings, last norm, head. The rest is a skeleton: tensors on the meta device, with a shape and
no values. Hooks give a block its values from the safetensors files as it is called, and take them away as it returns.
Files are mapped, not copied, where dtype and device allow, so what a second pass costs is mostly what the disk's cache
does not hold any more.

What is taken away leaves the very tensors that stood there before: `Original.save_changed` tells by them what a
retrofit has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kallm_bench.models.anatomy import find_blocks
from kallm_bench.models.shards import Weights
from kallm_bench.models.sources import check_finite


@dataclass(frozen=True)
class _Loan:
    """What some modules were given: (module, attribute, the tensor without values that belongs there)."""

    to: nn.Module | None
    places: list[tuple[nn.Module, str, Tensor]]
    read: list[int]


class Lender:
    """Gives a skeleton's modules the values that files hold for them, and takes them back.

    A tensor that stands in several places, such as tied embeddings, is read once and stays one.

    Args:
        folder: whose files they are, for messages.
        weights: the files.
        tensors: name -> the skeleton's tensor; of tensors that are one, one name has to be in the files.
        device: where values are put. They take the dtype of the skeleton's tensor.
    """

    def __init__(
        self, folder: Path, weights: Weights, tensors: Mapping[str, Tensor], device: torch.device | str
    ) -> None:
        self.folder, self.weights, self.device = folder, weights, device
        self._names = {id(tensor): name for name, tensor in tensors.items() if name in weights.tensors}
        self._values: dict[int, Tensor] = {}
        self._loans: list[_Loan] = []
        self._checked: set[str] = set()

    def lend(self, modules: Iterable[nn.Module], to: nn.Module | None = None) -> None:
        """Gives values to the skeleton's own tensors in `modules`, without those of their children.

        Args:
            to: whom `take_back_from` is told for it.

        Raises:
            CheckpointError: some are not finite; told once, by name of tensor.
        """
        places = [place for module in modules for place in self._empty(module)]
        missing = {id(tensor): tensor for _, _, tensor in places if id(tensor) not in self._values}
        if not places:
            return
        read = self.weights.read([self._names[key] for key in missing])
        check_finite(self.folder, {name: value for name, value in read.items() if name not in self._checked})
        self._checked |= read.keys()
        self._loans.append(_Loan(to, places, list(missing)))  # first, so that whatever interrupts is undone
        for key, tensor in missing.items():
            value: Tensor = read.pop(self._names[key]).to(self.device, tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            self._values[key] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        for module, name, tensor in places:
            setattr(module, name, self._values[id(tensor)])

    def take_back_from(self, module: nn.Module) -> None:
        """Undoes the last loan where it was to `module`."""
        if self._loans and self._loans[-1].to is module:
            self._take_back()

    def take_back_all(self) -> None:
        """Undoes every loan."""
        while self._loans:
            self._take_back()

    def _take_back(self) -> None:
        loan = self._loans[-1]
        for module, name, tensor in loan.places:
            setattr(module, name, tensor)
        for key in loan.read:
            self._values.pop(key, None)
        self._loans.pop()

    def _empty(self, module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for own in (module.named_parameters, module.named_buffers):
            for name, tensor in own(recurse=False, remove_duplicate=False):
                if id(tensor) in self._names:  # not only on meta: some models fill a few of theirs as they are made
                    yield module, name, tensor


def can_stream(model: PreTrainedModel) -> bool:
    """Whether a model tells its device by a parameter that lies outside its blocks, and so has values throughout."""
    first = next(model.parameters())
    return all(parameter is not first for parameter in find_blocks(model).parameters())


@contextmanager
def streamed(model: PreTrainedModel, lender: Lender) -> Iterator[None]:
    """Inside, a skeleton runs forward as the model does; its blocks have values while they are called, and no longer.

    So has every part of a block that is called by itself, even one that stands no longer in the model. What lies
    outside the blocks has values throughout. Modules that have values of their own keep them. Afterwards, whatever
    ended it, all that was lent is without values again: the very tensors stand there that stood there before. Only what
    is new may learn inside, as autograd would hold on to what is taken away.

    Args:
        model: a skeleton, in evaluation mode; changed inside.
        lender: of its tensors.

    Raises:
        SpecError: see find_blocks.
        CheckpointError: values that are not finite, as they are first needed.
    """
    inside = list(find_blocks(model).modules())
    outside = set(model.modules()) - set(inside)
    handles = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        lender.lend(module.modules(), module)

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        lender.take_back_from(module)

    try:
        fill_buffers(model, lender.device)
        lender.lend(module for module in model.modules() if module in outside)
        for module in inside:
            if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
                handles += [
                    module.register_forward_pre_hook(enter, prepend=True),
                    module.register_forward_hook(leave, always_call=True),
                ]
        yield
    finally:  # also where hooks did not run: PyTorch runs none on what is no Exception, such as Ctrl-C
        for handle in handles:
            handle.remove()
        lender.take_back_all()


@torch.no_grad()
def fill_buffers(model: PreTrainedModel, device: torch.device | str) -> None:
    """Gives a skeleton the buffers that no file holds, such as rotary frequencies, with the values that loading gives.

    As transformers does when it loads a model: memory first, then the model's own initialisation, which passes by
    whatever bears the mark of being initialised already. Changes those buffers, and marks what else is there.
    """
    empty = []
    for module in model.modules():
        marked = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set and buffer.is_meta:
                empty.append((module, name))
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
                marked = [tensor for tensor in marked if tensor is not buffer]
        for tensor in marked:
            tensor._is_hf_initialized = True
        module._is_hf_initialized = False
    model.initialize_weights()
    for module, name in empty:
        setattr(module, name, getattr(module, name).to(device))
