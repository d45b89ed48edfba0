"""What is seen of a training run as it goes: a line for whoever watches, the figures of each step for a log."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kallm_bench.progress import Log, Watch, nobody, nowhere
from kallm_bench.training.settings import TrainSettings
from kallm_bench.training.state import State

SMOOTHED_STEPS = 20
"""The line's loss is the mean, and its speed that of the median, of so many steps."""


class Meter:
    """Times the steps of one run, and tells how they go.

    Args:
        state: how far the run is, whatever process did it.
        device: whose memory is told.

    Attributes:
        seconds: of each step that this run itself did, from when it began to when its loss was known; without those
            in which nothing bore loss, which take no time and say nothing of speed.
    """

    def __init__(
        self, state: State, settings: TrainSettings, device: torch.device, watch: Watch = nobody, log: Log = nowhere
    ) -> None:
        self.state, self.settings, self.device = state, settings, device
        self.watch, self.log = watch, log
        self.seconds: list[float] = []

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Times a step, which may turn out not to be one; see `stepped`."""
        began = time.perf_counter()
        yield
        self._last = time.perf_counter() - began

    def stepped(self, rate: float, idle: bool) -> None:
        """What was timed last was a step, which `state` knows; `rate` was its learning rate. See Step for `idle`."""
        state = self.state
        figures = {"loss": state.losses[-1], "learning_rate": rate}
        if not idle:
            self.seconds.append(self._last)
            figures["tokens_per_second"] = self._speed(1)
        self.log(state.step, figures)
        self.watch("training", state.step, self.settings.steps, self.line())

    def measured(self, step: int, heldout_loss: float) -> None:
        """The held-out loss after so many steps is known."""
        self.log(step, {"heldout_loss": heldout_loss})

    def measuring(self, work: str, done: int, total: int, note: str = "") -> None:
        """The Watch of a held-out loss on the way: a word in training's own line."""
        steps = self.settings.steps
        self.watch("training", self.state.step, steps, f"{work} {done}/{total}")

    def line(self) -> str:
        """Loss, held-out loss, tokens a second and memory, the most important first."""
        state = self.state
        parts = [f"loss {statistics.fmean(state.losses[-SMOOTHED_STEPS:]):.3f}"]
        if (newest := state.newest_heldout) is not None:
            parts.append(f"held-out {newest:.3f}")
        if self.seconds:
            parts.append(f"{self._speed(SMOOTHED_STEPS):,.0f} tokens/s")
        if (used := memory_in_use(self.device)) is not None:
            parts.append(f"{used / 2**30:.1f} GiB")
        return ", ".join(parts)

    def _speed(self, last: int) -> float:
        tokens = self.settings.rows_per_step * self.settings.row_length
        return tokens / statistics.median(self.seconds[-last:])


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that the allocator holds of a GPU, or the process of main memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.is_file() else None
