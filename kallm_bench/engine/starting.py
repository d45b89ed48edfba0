"""How replaced modules begin, and the text that this is calibrated on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Hashable
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.engine.data import data_of, fingerprint_of, rows_of
from kallm_bench.errors import DataError
from kallm_bench.filing import Bench
from kallm_bench.models import Calibration, CalibrationSettings, KANSpec, Seen, retrofit_reporting
from kallm_bench.records import Metric
from kallm_bench.sharing import Shared
from kallm_bench.training import Fit, Forward, Rows, find_data, heldout_loss

START_VERSION = 3
"""Raised when a change of code changes what a calibrated start finds. 2: distilling begins at the right
variance. 3: under autocast a layer's input is cast before its expansion."""


SEEN = "what modules were seen to do"
"""Of Bench.shared: what a model shows on its calibration text, for further arms that replace the same modules. It may
take half of the device's memory, so it goes before anything else than a retrofit is done."""


def start(
    bench: Bench,
    model: PreTrainedModel,
    tokenizer: Any,
    spec: KANSpec,
    settings: CalibrationSettings | None,
    origin: Hashable = None,
) -> tuple[list[Metric], dict[str, Any]]:
    """Retrofits `model`; returns what is known of how it starts, and about the text that took.

    Args:
        origin: everything that decides what `model` computes on the text; arms for which it is the same share that.
    """
    if settings is None:
        _, report = retrofit_reporting(model, spec, watch=bench.watch, device="cpu")
        error = report.conversion_error
        return [] if error is None else [Metric("conversion_error", error)], {}

    def packing(done: int, total: int) -> None:
        bench.watch("packing conversations", done, total)

    learned, kept = rows_of(settings, tokenizer, packing, bench.shared)
    rows = settings.tokens // settings.row_length
    judged = min(settings.heldout_tokens // settings.row_length, len(kept))
    if rows > len(learned):
        most = len(learned) * settings.row_length
        raise DataError(
            f"{settings.data} has {most:,} tokens to calibrate on, not {settings.tokens:,}; take at most those"
        )
    batches = learned.batch(range(rows)), kept.batch(range(judged))
    tokens, positions = (torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "position_ids"))
    seen = bench.shared.once(SEEN, origin, Seen, most=1) if bench.arm else None  # outside suites nothing follows
    before, count = bench.shared.once("held-out loss", origin, lambda: _loss(bench, model, kept, judged))
    began = time.perf_counter()
    try:
        _, report = retrofit_reporting(
            model, spec, Calibration(tokens, positions, judged, seen), bench.watch, bench.device
        )
    except BaseException:  # it may be memory that was lacking
        bench.shared.forget(SEEN)
        raise
    seconds = time.perf_counter() - began
    after, _ = _loss(bench, model, kept, judged)
    metrics = [
        Metric("heldout_loss_before", before, n=count),
        Metric("heldout_loss", after, n=count),
        Metric("start_seconds", seconds),
        *(Metric(f"start_r2/{block}", r2, n=judged * settings.row_length) for block, r2 in report.r2.items()),
    ]
    data = find_data(settings.data)
    return metrics, {"source": data.label, "fingerprint": data.fingerprint}


def _loss(bench: Bench, model: PreTrainedModel, kept: Rows, judged: int) -> tuple[float, int]:
    """Held-out loss, and over how many tokens."""
    with Forward(model, autocast=bench.autocast) as forward:
        return heldout_loss(forward, kept, judged, Fit(4), bench.watch)


def describe_calibration(settings: CalibrationSettings, tokenizer: Any, shared: Shared) -> dict[str, Any]:
    data, heldout = data_of(settings)
    words = fingerprint_of(tokenizer, shared)
    described = dataclasses.asdict(settings) | {"tokenizer": words, "version": START_VERSION}
    return described | {"data": data.fingerprint, "heldout": heldout and heldout.fingerprint}
