"""The stage that asks a model BIG-Bench Hard, or writes down what it would be asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from kallm_bench.bbh.evaluate import EvalSettings, ask, score, score_as_lm_eval
from kallm_bench.bbh.prompts import build_prompts, fingerprint
from kallm_bench.bbh.protocols import Protocol, find_protocol
from kallm_bench.bbh.questions import QuestionSet, load_questions
from kallm_bench.engine.checkpoints import describe_checkpoint
from kallm_bench.errors import BBHError
from kallm_bench.files import write_file
from kallm_bench.filing import Bench, ModelRef, Stage
from kallm_bench.models import load_model, load_tokenizer
from kallm_bench.records import RunRecord
from kallm_bench.training import tokenizer_fingerprint


def answerable(name: str) -> Protocol:
    """The protocol of this name. BBHError for one whose questions cannot be asked yet, or that there is none of."""
    protocol = find_protocol(name)
    if protocol.compared:
        raise BBHError(f"protocol '{name}' compares likelihoods, which is not here yet; take zeroshot")
    return protocol


def eval_bbh(bench: Bench, ref: ModelRef, settings: EvalSettings) -> RunRecord:
    """Asks the model BIG-Bench Hard, or questions like it, and scores its answers."""
    protocol = answerable(settings.protocol)
    reading = protocol.find_reading(settings.reading)
    questions = _questions(settings, protocol, reading)
    max_new_tokens = settings.max_new_tokens or protocol.max_new_tokens
    tokenizer = load_tokenizer(ref.open())
    described = {
        "protocol": protocol.name,
        "tasks": list(questions.tasks),
        "limit": settings.limit,
        "max_new_tokens": max_new_tokens,
        "questions": questions.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **bench.place,
    }
    if protocol.group:
        asked = build_prompts(questions, protocol, tokenizer, reading, max_new_tokens)
        described |= {"reading": reading, "prompts": fingerprint(asked)}
    stage = Stage(bench, "eval-bbh", described, ref)
    with stage.claimed() as done:
        if done:
            return done
        model, _ = load_model(ref.open(), bench.dtype, bench.device)
        partial = bench.runs / "unfinished" / f"{stage.key}.jsonl"
        size = bench.batch_size or (256 if bench.device.type == "cuda" else 16)
        samples = ask(model, tokenizer, questions, protocol, max_new_tokens, partial, size, bench.watch, reading)
        metrics = score(samples, questions, lambda question: protocol.guessable(question, reading))
        if protocol.group:
            metrics += score_as_lm_eval(samples, bool(protocol.compared))
        about = {"source": questions.source, "fingerprint": questions.fingerprint}
        record = stage.finish(metrics, data=about, model=model, samples=samples)
        describe_checkpoint(bench, ref.open().folder, model, record)
        partial.unlink(missing_ok=True)
        return record


def _questions(settings: EvalSettings, protocol: Protocol, reading: str) -> QuestionSet:
    """Those that are asked for and that the protocol can put; BBHError where none is left."""
    found = load_questions(settings.source, settings.tasks, settings.limit, settings.questions_seed, protocol.tasks)
    kept = tuple(question for question in found.questions if protocol.can_answer(question, reading))
    if not kept:
        raise BBHError(f"no question of {', '.join(found.tasks)} has a right answer among the choices compared")
    return dataclasses.replace(found, questions=kept)


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
    for protocol in map(find_protocol, protocols):
        reading = protocol.find_reading(settings.reading)
        questions = _questions(settings, protocol, reading)
        tokenizer = load_tokenizer(ref().open()) if protocol.chat else None
        prompts = build_prompts(questions, protocol, tokenizer, reading, settings.max_new_tokens)
        lines += [json.dumps(prompt.to_json(protocol.name), ensure_ascii=False) + "\n" for prompt in prompts]
        counts[protocol.name] = len(prompts)
    write_file(out, "".join(lines).encode())
    return counts
