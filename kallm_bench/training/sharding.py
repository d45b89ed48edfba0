"""Models that do not fit on one GPU: their blocks' weights are split over the processes, by torch's fully_shard (FSDP).

A block's weights are whole only while it runs. The blocks hold nearly all of a model, so embeddings, norm and head stay
whole on every process; and each block stands for itself, so whoever runs the blocks one by one meets no surprise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from kallm_bench.models.anatomy import find_blocks
from kallm_bench.training.processes import Processes, heard


def shard(model: PreTrainedModel, processes: Processes) -> None:
    """Splits the blocks of `model` over all processes, in place, and puts all of it on this one's device.

    What learns has to be chosen before; the parameters are other objects afterwards, of the same names. Gradients are
    summed over the processes by each backward pass.
    """
    assert processes.device is not None
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in find_blocks(model):
        scalars = {parameter for parameter in block.parameters() if parameter.ndim == 0}  # nothing to split
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        assert isinstance(block, FSDPModule)
        block.set_gradient_divide_factor(1.0)  # a sum, not a mean
        block.set_force_sum_reduction_for_comms(True)
    model.to(processes.device)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; to be called by all processes."""
    if not isinstance(tensor, DTensor):
        return tensor
    with heard():
        return tensor.full_tensor()


@torch.no_grad()
def placed_like(values: Tensor, like: Tensor) -> Tensor:
    """`values` on the device of `like`, and split as it is; the first process's `values` count."""
    values = values.to(like.device, copy=True)  # out of a file's mapping
    if not isinstance(like, DTensor):
        return values
    with heard():
        return distribute_tensor(values, like.device_mesh, like.placements)


def gradient_norm(gradients: Iterable[Tensor], processes: Processes) -> Tensor:
    """The norm over all gradients, the sharded ones among them; the same on every process."""
    gradients = list(gradients)
    plain = torch.nn.utils.get_total_norm([each for each in gradients if not isinstance(each, DTensor)])
    parts = [each.to_local() for each in gradients if isinstance(each, DTensor)]
    if not parts:
        return plain
    squared = torch.nn.utils.get_total_norm(parts).square()
    processes.sum([squared])
    return (plain.to(squared.device).square() + squared).sqrt()


def clip(parameters: Iterable[nn.Parameter], most: float, norm: Tensor) -> None:
    """Scales the gradients so that their `norm` is at most `most`."""
    parameters = list(parameters)
    torch.nn.utils.clip_grads_with_norm_([each for each in parameters if not is_sharded(each)], most, norm)
    share = torch.clamp(most / (norm + 1e-6), max=1.0)
    for parameter in parameters:
        if isinstance(parameter.grad, DTensor):
            parameter.grad.to_local().mul_(share)


@torch.no_grad()
def gather_into(target: PreTrainedModel, model: PreTrainedModel, processes: Processes) -> None:
    """Gives `target`, a whole model on the CPU, what has learned in `model`; on the first process alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values = whole(parameter)
            if processes.first:
                target.get_parameter(name).copy_(values)
