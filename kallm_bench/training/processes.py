"""One training run on several processes: which rows are whose, how sums come together, and that the first one writes.

Each process computes the gradient of its rows of a step, over all its batches; then the gradients are summed, once a
step, and every process takes the same optimiser step. That is what DistributedDataParallel does with accumulation, less
its overlap of the last backward pass with the sums; it is done by hand because the loss is computed past the model's
own forward, which that wrapper needs, and because the sum over processes then is the sum over rows, exactly: no mean of
means where processes have different numbers of learned tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kallm_bench.errors import DeviceError, LeftAloneError

STEP_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in a step. One that was killed is noticed at once, one that hangs by this."""

WAIT_TIMEOUT = timedelta(days=1)
"""The same between stages, where the first process may be packing data, or waiting for another run."""


@dataclass(frozen=True)
class Processes:
    """The processes of this run, as one of them sees them. Every method but `share` has to be called by all.

    Args:
        number: of this process, from 0.
        count: how many there are.
        device: what this one computes on.
        control: the group for what is not part of a step; None for a process alone.
    """

    number: int = 0
    count: int = 1
    device: torch.device | None = None
    control: Any = None

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks."""
        return self.number == 0

    def share(self, numbers: np.ndarray) -> np.ndarray:
        """This process's part of the row numbers of a step."""
        return np.array_split(numbers, self.count)[self.number]

    def tell(self, value: Any) -> Any:
        """The first process's `value`, which JSON can hold, on every process."""
        if self.count == 1:
            return value
        with heard():
            text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            length = torch.tensor([len(text)])
            dist.broadcast(length, 0, group=self.control)
            if not self.first:
                text = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self.control)
        return json.loads(bytes(text.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in their order, on the first one; empty on the others."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count if self.first else []
        with heard():
            dist.gather_object(value, found if self.first else None, 0, group=self.control)
        return found

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process runs the block before all others, which then find on the disk what it made."""
        if not self.first:
            self.tell(None)
        yield
        if self.first:
            self.tell(None)

    def spread(self, tensor: Tensor) -> None:
        """Overwrites `tensor` by the first process's."""
        if self.count > 1:
            with heard():
                dist.broadcast(tensor, 0)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites each tensor by its sum over all processes: the same bits everywhere."""
        if self.count > 1:
            with heard():
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()


BROKEN = ("gloo", "NCCL", "onnection")
"""Signs of a broken connection in errors that have no type of their own."""


@contextmanager
def heard() -> Iterator[None]:
    """Turns what a broken connection to another process raises into LeftAloneError; all else passes."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(sign in str(error) for sign in BROKEN):
            raise
        raise LeftAloneError(
            "another process of this run has ended or does not answer; what was saved is intact, and the same "
            "command goes on from there"
        ) from error


ALONE = Processes()


def asked_for() -> int:
    """How many processes a launcher such as torchrun has started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextmanager
def join(device: torch.device) -> Iterator[Processes]:
    """Inside, the processes that a launcher such as torchrun has started are connected, each with a device of its own.

    Args:
        device: "cuda" stands for the GPU of the process's number on this machine.

    Raises:
        DeviceError: fewer GPUs than processes, or the others cannot be reached.
    """
    if asked_for() == 1:
        yield Processes(device=device)
        return
    try:
        number, here = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    except KeyError as error:
        raise DeviceError(f"WORLD_SIZE is {asked_for()} but {error} is not set; start it by torchrun") from error
    if device.type == "cuda":
        if here >= torch.cuda.device_count():
            raise DeviceError(
                f"process {here + 1} of this machine has no GPU, it has {torch.cuda.device_count()}; "
                "take a smaller --nproc-per-node, or --device cpu"
            )
        device = torch.device("cuda", here)
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"process {number} cannot reach the others: {reason}") from error
    yield Processes(number, asked_for(), device, control)
    dist.destroy_process_group()  # not after an error: it would wait for whoever is gone
