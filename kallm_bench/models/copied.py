"""What a modelling file has in the place of standalone.py: itself, for a checkpoint that is saved again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kallm_bench.models.spec import KANSpec


def modeling_file(specs: Sequence[KANSpec]) -> str | None:
    """This very file, which was written for a model of the same `specs`."""
    return Path(__file__).read_text(encoding="utf-8")
