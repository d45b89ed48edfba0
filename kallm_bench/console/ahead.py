"""How long the rest of planned work will take: what was predicted, corrected by what the parts that are done took."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

MAIN_WORKS = ("training", "questions", "contenders", "distilling")
"""Of what a part of a plan consists of, the works that take its time."""

SKIPPED_SECONDS = 3.0
"""A part that is over sooner, and much sooner than predicted, was done by an earlier run."""

PRIOR_SECONDS = 10.0
"""As much as if parts of so many seconds had gone as predicted: what is short tells little of what is long."""

FOREIGN_PACE = 3.0
"""Parts of other kinds change what is predicted by no more than this factor."""

TRUSTED_SHARE = 0.25
"""From so much of a main work on, its own speed alone tells what is left of it; before that, more and more."""


class Ahead:
    """A plan that is gone through part by part.

    Args:
        plan: the seconds that each part would take. The last word of its name is its kind: what parts of a kind took
            beside what was predicted is expected of the others of that kind too.
    """

    def __init__(self, plan: Mapping[str, float]) -> None:
        self.plan = dict(plan)
        self.part = ""
        self.took: dict[str, float] = {}
        self.began = self.part_began = time.monotonic()
        self._work, self._first, self._work_began, self._share = "", 0, 0.0, 0.0

    def begin(self, part: str) -> None:
        """A part begins; the one before it is done."""
        now = time.monotonic()
        took = now - self.part_began
        if self.part in self.plan:
            if took < min(SKIPPED_SECONDS, self.plan[self.part] / 3):
                del self.plan[self.part]
            else:
                self.took[self.part] = took
        self.part, self.part_began = part, now
        self._work, self._share = "", 0.0

    def hear(self, work: str, done: int, total: int) -> None:
        """So much of a work is done; what was done when it was first heard of says nothing of its speed."""
        if work not in MAIN_WORKS or not total:
            return
        if work != self._work:
            self._work, self._first, self._work_began = work, done, time.monotonic()
        self._share = (done - self._first) / (total - self._first) if total > self._first else 1.0

    def left(self) -> float:
        """Seconds until all is done; 0 where there is no plan, or more time has gone than anything tells of."""
        if self.part not in self.plan and not self.took:
            return sum(self.plan.values())
        coming = (name for name in self.plan if name not in self.took and name != self.part)
        return self._left_of_part() + sum(self._expected(name) for name in coming)

    def share(self, left: float) -> float:
        """How much of the whole is done, 0 to 1, where so many seconds are left."""
        gone = time.monotonic() - self.began
        return gone / (gone + left) if gone + left else 0.0

    def _left_of_part(self) -> float:
        now = time.monotonic()
        predicted = max(0.0, self._expected(self.part) - (now - self.part_began))
        if not self._share:
            return predicted
        measured = (now - self._work_began) * (1 - self._share) / self._share
        trust = min(1.0, self._share / TRUSTED_SHARE)
        return trust * measured + (1 - trust) * predicted

    def _expected(self, name: str) -> float:
        """The seconds a part will take, by what parts of its kind took, else by what all took."""
        alike = [each for each in self.took if _kind(each) == _kind(name)]
        pace = self._pace(alike) if alike else min(FOREIGN_PACE, max(1 / FOREIGN_PACE, self._pace(list(self.took))))
        return self.plan.get(name, 0.0) * pace

    def _pace(self, parts: Sequence[str]) -> float:
        took, planned = (sum(of[each] for each in parts) for of in (self.took, self.plan))
        return (PRIOR_SECONDS + took) / (PRIOR_SECONDS + planned)


def _kind(part: str) -> str:
    return part.rpartition(" ")[2]
