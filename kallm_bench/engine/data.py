"""The tokenizer and the texts that a stage learns from or is calibrated on, and those that are held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kallm_bench.errors import DataError
from kallm_bench.files import cache_folder, sha256
from kallm_bench.models import CalibrationSettings, Source, load_config, load_tokenizer, weights_folder
from kallm_bench.models.shards import BESIDE
from kallm_bench.sharing import Shared
from kallm_bench.training import (
    DataSource,
    DataTable,
    Rows,
    TrainSettings,
    find_data,
    find_texts,
    prepare,
    prepare_texts,
    tokenizer_fingerprint,
)


def tokenizer_of(source: Source, shared: Shared) -> Any | None:
    """The model's tokenizer, which checkpoints that were made of one model share; None where it has none.

    It has to stay as it is: take load_tokenizer for one to change. Raises as load_tokenizer does.
    """
    if source.trust_remote_code:  # code that comes with it may read whatever it likes
        return load_tokenizer(source)
    folder = weights_folder(source)
    files = sorted(path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file())
    described = (load_config(source).model_type, *((str(path.relative_to(folder)), sha256(path)) for path in files))
    return shared.once("tokenizer", described, lambda: load_tokenizer(source))


def fingerprint_of(tokenizer: Any, shared: Shared) -> str:
    """tokenizer_fingerprint of one that stays as it is. Raises as that does."""
    return shared.once("fingerprint", tokenizer, lambda: tokenizer_fingerprint(tokenizer))


def data_of(
    settings: TrainSettings | CalibrationSettings,
) -> tuple[DataSource | DataTable, DataSource | DataTable | None]:
    """The training data, and the held-out data where that has a source of its own. DataError where they are one."""
    find = find_texts if isinstance(settings, TrainSettings) and settings.task == "classify" else find_data
    data, heldout = find(settings.data), find(settings.heldout) if settings.heldout is not None else None
    if heldout and heldout.fingerprint == data.fingerprint:
        raise _held_out_twice(settings)
    return data, heldout


def _held_out_twice(settings: TrainSettings | CalibrationSettings) -> DataError:
    return DataError(f"{settings.heldout}: the held-out data is the training data; leave it out to hold a part back")


def rows_of(
    settings: TrainSettings | CalibrationSettings, tokenizer: Any, packing: Callable[[int, int], None], shared: Shared
) -> tuple[Rows, Rows]:
    """What is trained on, and what is held out. DataError where they are one under two names."""
    rows, kept = _packed(settings, tokenizer, packing, shared)
    if settings.heldout and rows.tokens.shape == kept.tokens.shape and np.array_equal(rows.tokens[:], kept.tokens[:]):
        raise _held_out_twice(settings)
    return rows, kept


def _packed(
    settings: TrainSettings | CalibrationSettings, tokenizer: Any, packing: Callable[[int, int], None], shared: Shared
) -> tuple[Rows, Rows]:
    data, heldout = data_of(settings)
    if isinstance(settings, TrainSettings) and settings.task == "classify":
        labelled, kept = prepare_texts(settings.data, tokenizer, settings.row_length, settings.heldout)
        return labelled.enough_for(settings.steps * settings.rows_per_step), kept
    cache = cache_folder()
    texts = (settings.data, data.fingerprint, settings.heldout, heldout and heldout.fingerprint)
    packed = not isinstance(settings, TrainSettings) or settings.packing
    return shared.once(
        "rows",
        (*texts, tokenizer, settings.row_length, packed, cache),
        lambda: prepare(settings.data, tokenizer, settings.row_length, cache, settings.heldout, packed, packing),
    )
