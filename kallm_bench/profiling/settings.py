"""What is measured of a model: which batches and lengths, which training steps, how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kallm_bench.errors import DeviceError, unknown

WAYS = {
    "ours": "as `kallm train` does it",
    "kept": "the same, with what frozen blocks give kept on disk",
    "plain": "a plain Hugging Face loop",
}
"""How a training step is done."""

LEAST = {"batch": 1, "length": 32, "new_tokens": 4, "repeats": 2}


class Usual(NamedTuple):
    """What is measured where nothing else was asked for.

    Args:
        batches, lengths: of the grid.
        new_tokens, repeats: see ProfileSettings.
        every_scope: whether training steps are measured in every scope that a model has, or in the usual one.
    """

    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    new_tokens: int
    repeats: int
    every_scope: bool


USUAL = {
    "cpu": Usual((1, 4), (64, 256), 16, 3, every_scope=False),
    "cuda": Usual((1, 16), (128, 1024), 32, 5, every_scope=True),
}
"""By device. A training step of the whole of a small model takes two cores four seconds, and more beside others."""


class Point(NamedTuple):
    """Sequences at once, and tokens in each."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


class Step(NamedTuple):
    """A training step that is measured: how, what learns in it, and what stands after its metrics' names."""

    way: str
    scope: str
    part: str


@dataclass(frozen=True)
class ProfileSettings:
    """What is measured.

    Args:
        batch, length: sequences at once, and tokens in each, for prefill, decoding and training; the main point, whose
            metrics bear plain names.
        batches, lengths: of a grid of further points, each batch with each length, for prefill and decoding.
        new_tokens: how many decoding adds to each sequence, at most half of its length.
        repeats: timed runs of each, after those that warm up.
        scope, tail_from: what learns in the training step; "none" skips it.
        scopes: further ones.
        ways: how the step of `scope` is done, names in WAYS.

    Raises:
        DeviceError: a value that measures nothing.
    """

    batch: int = 4
    length: int = 256
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    new_tokens: int = 32
    repeats: int = 5
    scope: str = "tail"
    scopes: tuple[str, ...] = ()
    tail_from: int | None = None
    ways: tuple[str, ...] = ("ours",)

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise DeviceError(unknown("way", way, WAYS))
        given = [(name, getattr(self, name)) for name in LEAST]
        given += [("batch", each) for each in self.batches] + [("length", each) for each in self.lengths]
        for name, value in given:
            if type(value) is not int or value < LEAST[name]:
                raise DeviceError(f"{name} must be at least {LEAST[name]}, got {value!r}")

    @property
    def main(self) -> Point:
        return Point(self.batch, self.length)

    @property
    def points(self) -> tuple[Point, ...]:
        """The main point, then the others, the smallest first."""
        batches, lengths = self.batches or (self.batch,), self.lengths or (self.length,)
        grid = {Point(batch, length) for batch in batches for length in lengths}
        return (self.main, *sorted(grid - {self.main}))

    def part(self, point: Point) -> str:
        """What stands after the names of a point's metrics: nothing for the main one, "/1x128" for others."""
        return "" if point == self.main else f"/{point}"

    @property
    def all_scopes(self) -> tuple[str, ...]:
        """Each scope that a training step is measured in, once."""
        named = (self.scope, *self.scopes) if self.scope != "none" else ()
        return tuple(dict.fromkeys(named))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The training steps in the order in which they are measured: the plain way, which changes dtypes, is last."""
        if not self.all_scopes:
            return ()
        others = [Step("ours", scope, f"/{scope}") for scope in self.all_scopes[1:]]
        ways = [Step(way, self.scope, "" if way == "ours" else f"/{way}") for way in WAYS if way in self.ways]
        return (*ways[:1], *others, *ways[1:])
