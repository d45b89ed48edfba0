"""The texts that a stage learns from or is calibrated on, and those that are held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kallm_bench.errors import DataError
from kallm_bench.files import cache_folder
from kallm_bench.models import CalibrationSettings
from kallm_bench.training import (
    DataSource,
    DataTable,
    Rows,
    TrainSettings,
    find_data,
    find_texts,
    prepare,
    prepare_texts,
)


def data_of(
    settings: TrainSettings | CalibrationSettings,
) -> tuple[DataSource | DataTable, DataSource | DataTable | None]:
    """The training data, and the held-out data where that has a source of its own. DataError where they are one."""
    find = find_texts if isinstance(settings, TrainSettings) and settings.task == "classify" else find_data
    data, heldout = find(settings.data), find(settings.heldout) if settings.heldout else None
    if heldout and heldout.fingerprint == data.fingerprint:
        raise DataError(f"{settings.heldout}: the held-out data is the training data; leave it out to hold a part back")
    return data, heldout


def rows_of(settings: TrainSettings, tokenizer: Any, packing: Callable[[int, int], None]) -> tuple[Rows, Rows]:
    """What is trained on, and what is held out."""
    if settings.task == "classify":
        rows, kept = prepare_texts(settings.data, tokenizer, settings.row_length, settings.heldout)
        return rows.enough_for(settings.steps * settings.rows_per_step), kept
    return prepare(settings.data, tokenizer, settings.row_length, cache_folder(), settings.heldout, progress=packing)
