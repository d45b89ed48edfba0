"""Ask every question, keep every reply, count what was right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from kallm_bench.bbh.aggregate import leaderboard_score, mean_and_error
from kallm_bench.bbh.plain import answer
from kallm_bench.bbh.prompts import Prompt, build_prompts
from kallm_bench.bbh.protocols import LEADERBOARD_CHOICES, Protocol
from kallm_bench.bbh.questions import QuestionSet
from kallm_bench.bbh.readings import read_reply
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
        reading: how replies are read and where they end, one of protocols.READINGS; None for the protocol's own.
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
    reading: str | None = None

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
    reading: str | None = None,
) -> list[Sample]:
    """Puts every question to the model, whose generation settings it replaces by plain greedy ones.

    Replies are appended to `partial` as they come, so that a run that was stopped asks only what is missing. Questions
    go in the order of their length, so that little is padded.

    Args:
        partial: JSON lines, one a question; the caller removes it when the samples are safe.
        batch_size: questions at once; halved where memory runs out.
        reading: how replies are read; None for the protocol's own.

    Returns:
        One sample a question, in the questions' order.

    Raises:
        BBHError: the protocol compares likelihoods; see also build_prompts.
    """
    if protocol.compared:
        raise BBHError(f"protocol '{protocol.name}' compares likelihoods, and this asks for replies; take zeroshot")
    reading = protocol.find_reading(reading)
    built = build_prompts(questions, protocol, tokenizer, reading, max_new_tokens)
    prompts = {(prompt.task, prompt.index): prompt for prompt in built}
    ids = {
        key: tokenizer(prompt.text, add_special_tokens=not prompt.templated)["input_ids"]
        for key, prompt in prompts.items()
    }
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
            samples[key] = _sample(question, protocol, reading, prompts[key], reply, forwarded / len(batch))
        with explained(partial), partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(samples[key], ensure_ascii=False) + "\n" for key in keys))
        del missing[:batch_size]
        right = sum(sample["correct"] for sample in samples.values())
        watch("questions", len(samples), total, f"{right} right")
    return [samples[q.task, q.index] for q in questions.questions]


def score(
    samples: Sequence[Sample],
    questions: QuestionSet,
    choices: Callable[[Question], Sequence[str]] = lambda question: question.choices,
) -> list[Metric]:
    """Accuracy a task and its plain mean, guessing and majority beside each, and the share of unreadable replies.

    Args:
        choices: what guessing chooses among; by default what the question lists.
    """
    metrics = []
    right = {(sample["task"], sample["index"]): bool(sample["correct"]) for sample in samples}
    for task in questions.tasks:
        asked = [q for q in questions.questions if q.task == task]
        correct = [float(right[q.task, q.index]) for q in asked]
        guessed = [(q.target in choices(q)) / max(1, len(choices(q))) for q in asked]
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


def reread(
    samples: Sequence[Sample], questions: QuestionSet, protocol: Protocol, reading: str, generated_for: str
) -> list[Sample]:
    """The samples as another reading has them; no model is asked.

    Args:
        samples: of the protocol, with the completions as they were generated.
        generated_for: the reading that decided where those end.

    Raises:
        BBHError: a completion may end before this reading would end it; a sample is of no question here; a reading
            that the protocol does not have.
    """
    reading, generated_for = protocol.find_reading(reading), protocol.find_reading(generated_for)
    if reading == "fixed" and protocol.stops[reading] != protocol.stops[generated_for]:
        raise BBHError(
            f"replies to '{protocol.name}' that were ended as lm-eval ends them may lack what the fixed reading needs; "
            "ask again with --reading fixed"
        )
    asked = {(question.task, question.index): question for question in questions.questions}
    found = []
    for sample in samples:
        key = (sample["task"], sample["index"])
        if key not in asked:
            raise BBHError(f"no question {key[1]} of task '{key[0]}' in {questions.source}; these are other questions")
        extracted, right = read_reply(protocol, reading, asked[key], sample["completion"])
        found.append(sample | {"extracted": extracted, "correct": right})
    return found


def score_as_lm_eval(samples: Sequence[Sample], leaderboard: bool) -> list[Metric]:
    """Accuracy as lm-eval averages it, over questions, with its standard error; of `leaderboard` the normalised score.

    These stand beside what `score` gives, for the protocols that lm-eval has.
    """
    right: dict[str, list[float]] = {}
    for sample in samples:
        right.setdefault(sample["task"], []).append(float(sample["correct"]))
    mean, error = mean_and_error(right)
    metrics = [Metric("question_accuracy", mean, n=len(samples))]
    if error is not None:
        metrics.append(Metric("question_accuracy_error", error, n=len(samples)))
    if leaderboard:
        means = {task: sum(values) / len(values) for task, values in right.items()}
        choices = {task: len(LEADERBOARD_CHOICES[task]) for task in right}
        metrics.append(Metric("leaderboard_score", leaderboard_score(means, choices), n=len(samples)))
    return metrics


def _mean(metrics: Sequence[Metric]) -> float:
    return sum(metric.value or 0.0 for metric in metrics) / len(metrics)


def _sample(
    question: Question, protocol: Protocol, reading: str, prompt: Prompt, reply: str, forwarded: float
) -> Sample:
    extracted, right = read_reply(protocol, reading, question, reply)
    return {
        "task": question.task,
        "index": question.index,
        "protocol": protocol.name,
        "prompt_sha256": prompt.sha256,
        "choices": list(question.choices),
        "completion": reply,
        "extracted": extracted,
        "target": question.target,
        "correct": right,
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
