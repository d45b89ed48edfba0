"""The figures of the published experiment, as published; nothing here was measured by this program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One arm as it was reported, in its own words and precision."""

    name: str
    trainable: str
    memory: str
    accuracy: str


PUBLISHED = (
    PublishedRow("untouched SmolLM2-135M, 1 measurement", "134M in all", "not given", "22.5 %"),
    PublishedRow("linear restart of blocks 25-29, 3 seeds", "46M", "5.87 GB", "43.8 %"),
    PublishedRow("cheby2 degree 2 in blocks 25-29, 3 seeds", "39M", "5.86 GB", "44.1 %"),
)

PUBLISHED_TITLE = "Published figures, for reference"

PUBLISHED_NOTE = (
    'From "Wrapping Up KALLM", OSRE 2025 (2025-09-03): trained on smol-smoltalk, scored on an unnamed subset of '
    "BIG-Bench Hard in chat form. No intervals and no parameter-matched control were published; other data, prompts "
    "and subsets make these figures incomparable with the tables above."
)
