"""The stage that asks a model BIG-Bench Hard, or writes down what it would be asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from kallm_bench.bbh.evaluate import EvalSettings, Exam, ask, figures, prepare
from kallm_bench.bbh.samples import Unfinished
from kallm_bench.engine.checkpoints import describe_checkpoint
from kallm_bench.engine.data import fingerprint_of, tokenizer_of
from kallm_bench.errors import BBHError, KallmError
from kallm_bench.files import write_file
from kallm_bench.filing import Bench, ModelRef, Stage
from kallm_bench.models import load_tokenizer, load_weights
from kallm_bench.records import RunRecord


def eval_bbh(bench: Bench, ref: ModelRef, settings: EvalSettings) -> RunRecord:
    """Asks the model BIG-Bench Hard, or questions like it, and scores its answers.

    Several processes take a part of the questions each, `bench.processes`: the first one files them, and all return its
    record.
    """
    processes = bench.processes
    with processes.in_turn():
        tokenizer = tokenizer_of(ref.tokenizer_source(), bench.shared)
        exam = prepare(settings, tokenizer)
    stage = stage_of(bench, ref, settings, exam, tokenizer)
    if processes.tell(stage.key) != stage.key:
        raise BBHError("the processes of this run were given different settings, models or questions")
    with stage.claimed() if processes.first else nullcontext() as done:
        if not processes.tell(done is not None):
            done = _ask(bench, ref, stage, exam, tokenizer)
        if processes.first:  # also where a run was killed between filing the samples and this
            _unfinished(stage).remove()
        told = processes.tell(done.to_json() if done else None)
    return done or RunRecord.from_json(told)


def stage_of(bench: Bench, ref: ModelRef, settings: EvalSettings, exam: Exam, tokenizer: Any) -> Stage:
    """The stage under whose key the record of these questions to this model is found."""
    asked = {"limit": settings.limit, "questions_seed": settings.questions_seed}
    described = exam.described() | asked | {"tokenizer": fingerprint_of(tokenizer, bench.shared)} | bench.place
    return Stage(bench, "eval-bbh", described, ref)


def _ask(bench: Bench, ref: ModelRef, stage: Stage, exam: Exam, tokenizer: Any) -> RunRecord | None:
    """The record, on the first process."""
    processes = bench.processes
    model = load_weights(ref.open(), bench.dtype, bench.device)
    unfinished = _unfinished(stage)
    try:
        samples = ask(
            model, tokenizer, exam, unfinished, batch_size=bench.batch_size, processes=processes, watch=bench.watch
        )
    except KallmError:
        unfinished.remove(only_empty=True)
        raise
    if not processes.first:
        return None
    metrics = figures(samples, exam.questions, exam.protocol, exam.reading)
    about = {"source": exam.questions.source, "fingerprint": exam.questions.fingerprint}
    record = stage.finish(metrics, data=about, model=model, samples=samples)
    describe_checkpoint(bench, ref.open().folder, model, record)
    return record


def _unfinished(stage: Stage) -> Unfinished:
    return Unfinished(stage.bench.runs / "unfinished" / f"{stage.key}.jsonl")


def write_prompts(
    ref: Callable[[], ModelRef], settings: EvalSettings, protocols: Sequence[str], out: Path
) -> dict[str, int]:
    """Writes what a model would be asked, one JSON line a question; asks nothing.

    Args:
        ref: finds the model whose chat template is taken; not called where every protocol asks in plain text.
        settings: which questions, and the reading; its own protocol is not looked at.
        protocols: names; one after the other.

    Returns:
        How many questions of each protocol.

    Raises:
        BBHError: as eval_bbh.
    """
    lines, counts = [], {}
    for name in protocols:
        asked = replace(settings, protocol=name)
        exam = prepare(asked, load_tokenizer(ref().open()) if asked.asks_templates else None)
        lines += [json.dumps(prompt.to_json(name), ensure_ascii=False) + "\n" for prompt in exam.prompts]
        counts[name] = len(exam.prompts)
    write_file(out, "".join(lines).encode())
    return counts
