"""How many rows go through the model at once: as many as were asked for, and half of it each time memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from kallm_bench.errors import TrainingError
from kallm_bench.progress import Watch, nobody

T = TypeVar("T")


class Fit:
    """Rows at once, found out as the work goes.

    Args:
        rows: how many were asked for.
        fixed: whether that is final, because other processes count on it.
    """

    def __init__(self, rows: int, watch: Watch = nobody, fixed: bool = False) -> None:
        self.asked = self.rows = rows
        self.fixed = fixed
        self.watch = watch
        self.release: Callable[[], None] = lambda: None
        """Called when memory ran out, before less is tried: lets go of what stands in the way."""

    def within(self, work: Callable[[], T]) -> T:
        """What `work` returns; done anew from its beginning, with half as many rows, where memory ran out in it.

        Raises:
            TrainingError: not even one row fits, or the number is fixed.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.rows == 1 or self.fixed:
                    rows = f"{self.rows} rows" if self.rows > 1 else "one row"
                    less = f"--batch-size {self.rows // 2}" if self.rows > 1 else "a shorter --row-length"
                    raise TrainingError(f"out of memory with {rows} at once; take {less}") from error
            # out here the error is gone, and with it its hold on what `work` had allocated
            self.release()
            torch.cuda.empty_cache()
            self.rows //= 2
            now = f"{self.rows} rows" if self.rows > 1 else "one row"
            self.watch(f"out of memory; going on with {now} at once, {self.asked} were asked for", 0, 0)
