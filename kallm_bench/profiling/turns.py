"""Several models on one device: who is there while only one of them shall be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel

from kallm_bench.profiling.memory import give_back


@contextmanager
def alone(models: Sequence[PreTrainedModel], number: int) -> Iterator[None]:
    """While inside, only the model of this number is on its device; the others wait in main memory.

    On a CPU there is nowhere else to wait: a process's peak is that of all its models.
    """
    others = [model for each, model in enumerate(models) if each != number]
    device = models[number].device
    if device.type == "cpu" or not others:
        yield
        return
    for other in others:
        other.to("cpu")
    give_back(device)
    try:
        yield
    finally:
        for other in others:
            other.to(device)
