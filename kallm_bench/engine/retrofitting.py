"""The stage that replaces feed-forwards, and the one that puts them back."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kallm_bench.engine.checkpoints import base_of, describe_checkpoint, size_metrics
from kallm_bench.engine.data import tokenizer_of
from kallm_bench.engine.starting import describe_calibration, start
from kallm_bench.filing import Bench, ModelRef, Stage, parameter_count
from kallm_bench.models import (
    CalibrationSettings,
    KANSpec,
    Original,
    blocks_to_revert,
    complete_spec,
    is_tight,
    load_config,
    load_model,
    load_weights,
    open_original,
    save_checkpoint,
    stored_dtype,
    weights_folder,
)
from kallm_bench.models import revert as put_back
from kallm_bench.records import RunRecord


def retrofit(
    bench: Bench,
    ref: ModelRef,
    spec: KANSpec,
    out: Path | None = None,
    *,
    calibration: CalibrationSettings | None = None,
    replace: bool = False,
    weights_needed: bool = True,
) -> RunRecord:
    """Replaces feed-forwards and saves the checkpoint, in the dtype of the original's weights.

    Where the original's files hold its tensors by name, only what is new is written, and nothing is loaded but what the
    new modules begin from; a start that looks at text loads the other blocks one at a time, as each has its turn.

    Args:
        calibration: the text that a start is calibrated on; None for the defaults, where the start needs any.
        out: its folder; None names one after model, basis, blocks and key below `bench.runs`.
        replace: whether another checkpoint that stands there may go.
        weights_needed: whether a record without its weights will not do.
    """
    bench.watch("loading the model", 0, 1)
    spec = complete_spec(load_config(ref.open()), spec)
    if calibration is None and spec.needs_calibration:
        calibration = CalibrationSettings()
    described: dict[str, Any] = {"spec": spec.to_json()}
    if (dtype := stored_dtype(ref.open())) != torch.float32:
        described["weights_dtype"] = str(dtype).removeprefix("torch.")
    tokenizer = None
    if calibration:
        tokenizer = tokenizer_of(ref.open(), bench.shared)
        described |= {"calibration": describe_calibration(calibration, tokenizer, bench.shared), **bench.place}
    stage = Stage(bench, "retrofit", described, ref)
    stage.folder = out or bench.runs / _checkpoint_name(ref.label, spec, stage.key)
    with stage.claimed(weights_needed) as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        bench.watch("retrofit", 0, 3, "loading")
        source = ref.open()
        computes_in, place = (torch.float32, bench.device) if calibration else (dtype, torch.device("cpu"))
        original = open_original(source, spec, computes_in, place)
        streaming: AbstractContextManager[None] = nullcontext()
        whole = (
            original and calibration and not (original.streams and is_tight(place, 4 * parameter_count(original.model)))
        )
        if original is None or whole:
            original = Original(weights_folder(source), load_weights(source, computes_in, place))
            tokenizer = tokenizer or tokenizer_of(source, bench.shared)
        elif calibration:
            streaming = original.streamed(place)
        model = original.model
        origin = (ref.fingerprint, bool(whole), json.dumps([described.get("calibration"), bench.place]))
        bench.watch("retrofit", 1, 3, f"{len(spec.blocks)} blocks, start '{spec.start}'")
        with streaming:
            found, about = start(bench, model, tokenizer, spec, calibration, origin)
        bench.watch("retrofit", 2, 3, "saving")
        if original.fits:
            original.save_changed(stage.folder, lineage=stage.lineage(), base=stage.base, replace=replace)
        else:
            model = model.to("cpu", dtype)
            save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), base=stage.base, replace=replace)
        bench.watch("retrofit", 3, 3)
        record = stage.finish([*size_metrics(model), *found], saved=True, model=model, data=about)
    describe_checkpoint(bench, stage.folder, model, record)
    return record


def revert(
    bench: Bench, ref: ModelRef, blocks: str = "all", base: ModelRef | None = None, out: Path | None = None, *,
    replace: bool = False,
) -> RunRecord:  # fmt: skip
    """Puts a checkpoint's own modules back, and saves that.

    Args:
        blocks: which; "all" for every one that was replaced.
        base: the model that the modules come back from; None for the one that the checkpoint was made of.

    Raises:
        SpecError: see models.revert.
        ModelError: the model that it was made of is not known or not here; CheckpointError: it is another by now.
    """
    chosen = blocks_to_revert(load_config(ref.open()), blocks)
    base = base or base_of(ref)
    stage = Stage(bench, "retrofit", {"revert": list(chosen), "base": base.fingerprint}, ref)
    stage.folder = out or bench.runs / f"{ref.label}-reverted-{stage.key[:8]}"
    with stage.claimed() as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        dtype = stored_dtype(ref.open())
        bench.watch("revert", 0, 3, "loading")
        model, tokenizer = load_model(ref.open(), dtype)
        put_back(model, load_weights(base.open(), dtype), chosen)
        bench.watch("revert", 2, 3, "saving")
        save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), base=stage.base, replace=replace)
        bench.watch("revert", 3, 3)
        record = stage.finish(size_metrics(model), saved=True, model=model)
    describe_checkpoint(bench, stage.folder, model, record)
    return record


def _checkpoint_name(model: str, spec: KANSpec, key: str) -> str:
    blocks = sorted(map(int, spec.blocks))
    run = f"{blocks[0]}-{blocks[-1]}" if blocks == list(range(blocks[0], blocks[-1] + 1)) else f"{len(blocks)}blocks"
    basis = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in spec.basis)
    what = basis if spec.target == "feedforward" else f"{basis}-{spec.form if spec.is_adapter else spec.target}"
    return f"{model}-{what}-{run}-{key[:8]}"
