"""How replaced modules begin, and the text that this is calibrated on."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.engine.data import data_of
from kallm_bench.errors import DataError
from kallm_bench.files import cache_folder
from kallm_bench.filing import Bench
from kallm_bench.models import Calibration, CalibrationSettings, KANSpec, retrofit_reporting
from kallm_bench.records import Metric
from kallm_bench.training import Fit, Forward, find_data, heldout_loss, prepare, tokenizer_fingerprint

START_VERSION = 3
"""Raised when a change of code changes what a calibrated start finds. 2: distilling begins at the right
variance. 3: under autocast a layer's input is cast before its expansion."""


def start(
    bench: Bench, model: PreTrainedModel, tokenizer: Any, spec: KANSpec, settings: CalibrationSettings | None
) -> tuple[list[Metric], dict[str, Any]]:
    """Retrofits `model`; returns what is known of how it starts, and about the text that took."""
    if settings is None:
        _, report = retrofit_reporting(model, spec, watch=bench.watch, device="cpu")
        error = report.conversion_error
        return [] if error is None else [Metric("conversion_error", error)], {}

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    learned, kept = prepare(
        settings.data, tokenizer, settings.row_length, cache_folder(), settings.heldout, progress=packing
    )
    rows = settings.tokens // settings.row_length
    judged = min(settings.heldout_tokens // settings.row_length, len(kept))
    if rows > len(learned):
        most = len(learned) * settings.row_length
        raise DataError(
            f"{settings.data} has {most:,} tokens to calibrate on, not {settings.tokens:,}; take at most those"
        )
    batches = learned.batch(range(rows)), kept.batch(range(judged))
    tokens, positions = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "position_ids"))
    with Forward(model, autocast=bench.autocast) as forward:
        before, count = heldout_loss(forward, kept, judged, Fit(4), bench.watch)
    began = time.perf_counter()
    _, report = retrofit_reporting(model, spec, Calibration(tokens, positions, judged), bench.watch, bench.device)
    seconds = time.perf_counter() - began
    with Forward(model, autocast=bench.autocast) as forward:
        after, _ = heldout_loss(forward, kept, judged, Fit(4), bench.watch)
    metrics = [
        Metric("heldout_loss_before", before, n=count),
        Metric("heldout_loss", after, n=count),
        Metric("start_seconds", seconds),
        *(Metric(f"start_r2/{block}", r2, n=judged * settings.row_length) for block, r2 in report.r2.items()),
    ]
    data = find_data(settings.data)
    return metrics, {"source": data.label, "fingerprint": data.fingerprint}


def describe_calibration(settings: CalibrationSettings, tokenizer: Any) -> dict[str, Any]:
    data, heldout = data_of(settings)
    described = dataclasses.asdict(settings) | {"tokenizer": tokenizer_fingerprint(tokenizer), "version": START_VERSION}
    return described | {"data": data.fingerprint, "heldout": heldout and heldout.fingerprint}
