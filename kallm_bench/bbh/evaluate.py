"""Ask every question, keep every reply, count what was right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from kallm_bench.bbh.extraction import is_right, read_answer
from kallm_bench.bbh.plain import answer
from kallm_bench.bbh.protocols import Protocol
from kallm_bench.bbh.questions import QuestionSet
from kallm_bench.bbh.tasks import Question
from kallm_bench.errors import BBHError
from kallm_bench.files import explained, write_file
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Metric

Sample = dict[str, Any]
SAMPLE_FIELDS = {
    "task",
    "index",
    "protocol",
    "prompt_sha256",
    "choices",
    "completion",
    "extracted",
    "target",
    "correct",
    "forwarded_tokens",
}


@dataclass(frozen=True)
class EvalSettings:
    """Everything that decides which questions are asked and how.

    Args:
        protocol: a key of protocols.PROTOCOLS.
        source, tasks, limit: see questions.load_questions.
        max_new_tokens: where an answer is cut; None for the protocol's own.
        questions_seed: of procedural questions. Not an arm's seed: every arm gets the same questions.

    Raises:
        BBHError: a count below 1.
    """

    protocol: str = "chat"
    source: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    max_new_tokens: int | None = None
    questions_seed: int = 0

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise BBHError(f"limit and max_new_tokens must be at least 1, got {self.limit} and {self.max_new_tokens}")


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: QuestionSet,
    protocol: Protocol,
    max_new_tokens: int,
    partial: Path,
    batch_size: int = 16,
    watch: Watch = nobody,
) -> list[Sample]:
    """Puts every question to the model, whose generation settings it replaces by plain greedy ones.

    Replies are appended to `partial` as they come, so that a run that was stopped asks only what is missing. Questions
    go in the order of their length, so that little is padded.

    Args:
        partial: JSON lines, one a question; the caller removes it when the samples are safe.
        batch_size: questions at once; halved where memory runs out.

    Returns:
        One sample a question, in the questions' order.
    """
    prompts = {(q.task, q.index): protocol.prompt(q, tokenizer) for q in questions.questions}
    ids = {key: tokenizer(prompt, add_special_tokens=False)["input_ids"] for key, prompt in prompts.items()}
    samples = {(sample["task"], sample["index"]): sample for sample in _read(partial)}
    missing = [q for q in questions.questions if (q.task, q.index) not in samples]
    missing.sort(key=lambda q: (len(ids[q.task, q.index]), q.task, q.index))
    total = len(questions.questions)
    with explained(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=model.generation_config.pad_token_id
    )  # greedy and nothing else: no repetition penalty or minimum length that a model may ship with
    while missing:
        batch = missing[:batch_size]
        keys = [(q.task, q.index) for q in batch]
        try:
            replies, forwarded = answer(model, tokenizer, [ids[key] for key in keys], max_new_tokens)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size = max(1, len(batch) // 2)
            watch("questions", len(samples), total, f"out of memory, {batch_size} at once from here")
            continue
        for question, key, reply in zip(batch, keys, replies, strict=True):
            samples[key] = _sample(question, protocol, prompts[key], reply, forwarded / len(batch))
        with explained(partial), partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(samples[key], ensure_ascii=False) + "\n" for key in keys))
        del missing[:batch_size]
        right = sum(sample["correct"] for sample in samples.values())
        watch("questions", len(samples), total, f"{right} right")
    return [samples[q.task, q.index] for q in questions.questions]


def score(samples: Sequence[Sample], questions: QuestionSet) -> list[Metric]:
    """Accuracy a task and its plain mean, guessing and majority beside each, and the share of unreadable replies."""
    metrics = []
    right = {(sample["task"], sample["index"]): bool(sample["correct"]) for sample in samples}
    for task in questions.tasks:
        asked = [q for q in questions.questions if q.task == task]
        correct = [float(right[q.task, q.index]) for q in asked]
        guessed = [(q.target in q.choices) / len(q.choices) if q.choices else 0.0 for q in asked]
        majority = [float(q.target == questions.majority[task]) for q in asked]
        for name, values in (("accuracy", correct), ("guessing_accuracy", guessed), ("majority_accuracy", majority)):
            metrics.append(Metric(f"{name}/{task}", sum(values) / len(values), n=len(values)))
    means = [
        Metric(name, _mean([metric for metric in metrics if metric.name.startswith(f"{name}/")]), n=len(samples))
        for name in ("accuracy", "guessing_accuracy", "majority_accuracy")
    ]
    invalid = sum(sample["extracted"] is None for sample in samples) / len(samples)
    forwarded = sum(sample["forwarded_tokens"] for sample in samples)
    return [*means, Metric("invalid_rate", invalid, n=len(samples)), Metric("forwarded_tokens", forwarded), *metrics]


def _mean(metrics: Sequence[Metric]) -> float:
    return sum(metric.value or 0.0 for metric in metrics) / len(metrics)


def _sample(question: Question, protocol: Protocol, prompt: str, reply: str, forwarded: float) -> Sample:
    extracted = read_answer(question, reply)
    return {
        "task": question.task,
        "index": question.index,
        "protocol": protocol.name,
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "choices": list(question.choices),
        "completion": reply,
        "extracted": extracted,
        "target": question.target,
        "correct": is_right(question, extracted),
        "forwarded_tokens": forwarded,
    }


def _read(partial: Path) -> list[Sample]:
    """The samples of an earlier run; lines that were cut off or damaged are dropped, and asked again."""
    if not partial.is_file():
        return []
    lines = partial.read_bytes().splitlines(keepends=True)
    samples = {line: sample for line in lines if (sample := _sample_in(line))}
    if len(samples) < len(lines):
        write_file(partial, b"".join(samples))
    return list(samples.values())


def _sample_in(line: bytes) -> Sample | None:
    try:
        sample = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(sample, dict) and set(sample) == SAMPLE_FIELDS and line.endswith(b"\n")
    return sample if whole else None
