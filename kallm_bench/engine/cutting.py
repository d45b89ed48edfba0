"""The stage that makes a small model out of a large one."""

from __future__ import annotations

from pathlib import Path

from kallm_bench.errors import ModelError
from kallm_bench.filing import Bench, ModelRef, Stage, parameter_count
from kallm_bench.models import (
    CutSettings,
    cut,
    cut_config,
    load_config,
    load_tokenizer,
    load_weights,
    save_checkpoint,
    stored_dtype,
)
from kallm_bench.records import Metric, RunRecord
from kallm_bench.training import find_texts, tokenizer_fingerprint, used_tokens

CUT_VERSION = 1
"""Raised when a change of code changes what is left of a model that is cut."""


def cut_model(
    bench: Bench,
    ref: ModelRef,
    settings: CutSettings,
    out: Path | None = None,
    *,
    replace: bool = False,
    weights_needed: bool = True,
) -> RunRecord:
    """Makes a smaller model: the first blocks, and the tokens that some texts need. Saves it as a checkpoint.

    Args:
        out: its folder; None names one below `bench.runs`.
        replace: whether another checkpoint that stands there may go.
        weights_needed: whether a record without its weights will not do.
    """
    if not settings.cuts:
        raise ModelError("nothing to cut: pass --blocks, or --data with the texts whose tokens shall stay, or both")
    texts = find_texts(settings.data) if settings.data else None
    tokenizer = load_tokenizer(ref.open())
    cut_config(load_config(ref.open()), settings.blocks)
    described = {"blocks": settings.blocks, "data": texts and texts.fingerprint, "version": CUT_VERSION}
    stage = Stage(bench, "cut", described | {"tokenizer": tokenizer_fingerprint(tokenizer)}, ref)
    stage.folder = out or bench.runs / f"{ref.label}-cut-{stage.key[:8]}"
    with stage.claimed(weights_needed) as done:
        if done:
            return done
        replace = stage.may_replace(replace)
        bench.watch("cut", 0, 3, "reading texts")
        used = used_tokens(texts, tokenizer) if texts else None
        bench.watch("cut", 1, 3, "loading the model")
        model = load_weights(ref.open(), stored_dtype(ref.open()))
        model, tokenizer = cut(model, tokenizer, settings.blocks, used)
        bench.watch("cut", 2, 3, "saving")
        save_checkpoint(stage.folder, model, tokenizer, lineage=stage.lineage(), replace=replace)
        bench.watch("cut", 3, 3)
        about = {"source": texts.label, "fingerprint": texts.fingerprint} if texts else {}
        return stage.finish([Metric("parameters", parameter_count(model))], saved=True, model=model, data=about)
