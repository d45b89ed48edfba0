"""Ask every question, keep every answer, read what was kept anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from kallm_bench.bbh.attention import of_any_shape
from kallm_bench.bbh.generation import generate
from kallm_bench.bbh.prompts import Prompt, build_prompts, fingerprint
from kallm_bench.bbh.protocols import Protocol, find_protocol
from kallm_bench.bbh.questions import QuestionSet, load_questions
from kallm_bench.bbh.readings import by_likelihood, read_reply
from kallm_bench.bbh.samples import Key, Sample, Unfinished, has_likelihoods, has_reply, joined, key_of, sample_of
from kallm_bench.bbh.scores import score, score_as_lm_eval
from kallm_bench.bbh.scoring import score_choices
from kallm_bench.bbh.tasks import Question
from kallm_bench.errors import BBHError
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Metric
from kallm_bench.training.processes import ALONE, Processes


@dataclass(frozen=True)
class EvalSettings:
    """Everything that decides which questions are asked and how.

    Args:
        protocol: a key of protocols.PROTOCOLS.
        reading: how replies are read and where they end, one of protocols.READINGS; None for the protocol's own.
        source, tasks, limit: see questions.load_questions.
        max_new_tokens: where an answer is cut; None for the protocol's own.
        questions_seed: of procedural questions. Not an arm's seed: every arm gets the same questions.
        batch_invariant: whether replies do not depend on the batch size, to the bit. Likelihoods never do.
        likelihoods: whether the right answer's likelihood is computed besides the reply, where that begins with it.

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
    batch_invariant: bool = False
    likelihoods: bool = True

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or (self.max_new_tokens is not None and self.max_new_tokens < 1):
            raise BBHError(f"limit and max_new_tokens must be at least 1, got {self.limit} and {self.max_new_tokens}")

    @property
    def asks_templates(self) -> bool:
        """Whether a tokenizer's chat template takes part."""
        return find_protocol(self.protocol).chat

    def questions(self) -> QuestionSet:
        """Those that are asked for and that the protocol can put. Raises as load_questions and answerable."""
        protocol = find_protocol(self.protocol)
        found = load_questions(self.source, self.tasks, self.limit, self.questions_seed, protocol.tasks)
        return answerable(found, protocol, protocol.find_reading(self.reading))


@dataclass(frozen=True)
class Exam:
    """What is asked, and how what comes back is read.

    Args:
        prompts: of the questions, in their order.
        likelihoods: whether answers are compared in the place of each reply, of a protocol that `answers_at_once`.
    """

    protocol: Protocol
    reading: str
    questions: QuestionSet
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    batch_invariant: bool = False
    likelihoods: bool = False

    def described(self) -> dict[str, Any]:
        """The part of a stage's settings, without what differs where the same is asked.

        Likelihoods are named where they are computed beside replies: older records, without them, stay what they are.
        """
        replies = {} if self.protocol.compared else {"batch_invariant": self.batch_invariant}
        replies |= {"likelihoods": True} if self.likelihoods else {}
        return {
            "protocol": self.protocol.name,
            "reading": self.reading,
            "tasks": list(self.questions.tasks),
            "max_new_tokens": self.max_new_tokens,
            "questions": self.questions.fingerprint,
            "prompts": fingerprint(self.prompts),
            **replies,
        }


def figures(samples: Sequence[Sample], questions: QuestionSet, protocol: Protocol, reading: str) -> list[Metric]:
    """Every figure of the samples of these questions, one a question."""
    found = score(samples, questions, lambda question: protocol.guessable(question, reading))
    return [*found, *(score_as_lm_eval(samples, bool(protocol.compared)) if protocol.group else [])]


def answerable(questions: QuestionSet, protocol: Protocol, reading: str) -> QuestionSet:
    """The questions that the protocol can put. BBHError where none is left."""
    kept = tuple(question for question in questions.questions if protocol.can_answer(question, reading))
    if not kept:
        raise BBHError(f"no question of {', '.join(questions.tasks)} has a right answer among the choices compared")
    return dataclasses.replace(questions, questions=kept)


def prepare(settings: EvalSettings, tokenizer: Any = None) -> Exam:
    """The questions as a model is asked them.

    Args:
        tokenizer: of the model; only its chat template takes part, where `settings.asks_templates`.

    Raises:
        BBHError: see load_questions and build_prompts; no question that the protocol could put.
    """
    protocol = find_protocol(settings.protocol)
    reading = protocol.find_reading(settings.reading)
    questions = settings.questions()
    prompts = build_prompts(questions, protocol, tokenizer, reading, settings.max_new_tokens)
    most = 0 if protocol.compared else settings.max_new_tokens or protocol.max_new_tokens
    likelihoods = settings.likelihoods and protocol.answers_at_once
    return Exam(protocol, reading, questions, tuple(prompts), most, settings.batch_invariant, likelihoods)


@dataclass(frozen=True)
class _Asked:
    """Who is asked, and what.

    Args:
        batch_size: replies at once; None for as many as fit.
        processes: among which the questions are parted.
    """

    model: PreTrainedModel
    tokenizer: Any
    exam: Exam
    batch_size: int | None
    processes: Processes


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    exam: Exam,
    unfinished: Unfinished,
    *,
    batch_size: int | None = None,
    processes: Processes = ALONE,
    watch: Watch = nobody,
) -> list[Sample]:
    """Puts every question to the model.

    Samples are kept as they come, so that a run that was stopped asks only what is missing, and ends with the same.
    Where an exam wants replies and likelihoods these come first, since they say soon what would not fit; a sample is
    kept of each, and what a question lacks is asked. Several processes take a part of the questions each; all have to
    call this.

    Args:
        unfinished: where samples are kept; the caller removes it when they are safe elsewhere.
        batch_size: replies at once, halved where memory runs out; None for as many as fit. Likelihoods take what suits
            the device.

    Returns:
        One sample a question, in the questions' order; on other processes than the first none.
    """
    asked = _Asked(model, tokenizer, exam, batch_size, processes)
    known = unfinished.read() if processes.first else {}
    ways = _ways(exam)
    before = [[sample for sample in known.values() if has(sample)] for _, _, has in ways]
    done = processes.tell([[key_of(sample) for sample in each] for each in before])
    found = []
    with unfinished.writing(processes.number) as keep, of_any_shape():
        for (work, way, _), keys, samples in zip(ways, done, before, strict=True):
            told = _Told(watch, work, len(keys), len(exam.prompts), sum(sample["correct"] for sample in samples))
            for sample in way(asked, {(task, index) for task, index in keys}, told):
                keep(sample)
                told.add(sample)
                found.append(sample)
    whole = joined([*known.values(), *(sample for each in processes.gather(found) for sample in each)])
    return [whole[question.task, question.index] for question in exam.questions.questions] if processes.first else []


Way = Callable[[_Asked, set[Key], Watch], Iterator[Sample]]
"""Asks all but the questions that are done."""


def _ways(exam: Exam) -> list[tuple[str, Way, Callable[[Sample], bool]]]:
    """What is done with each question: its name, how, and whether a sample has it already."""
    if exam.protocol.compared:
        return [("questions", _likelihoods, has_likelihoods)]
    replies: tuple[str, Way, Callable[[Sample], bool]] = ("questions", _replies, has_reply)
    return [("likelihoods", _likelihoods, has_likelihoods), replies] if exam.likelihoods else [replies]


class _Told:
    """Passes on what an engine tells of its part of the questions, and how many were answered right."""

    def __init__(self, watch: Watch, work: str, done: int, total: int, right: int) -> None:
        self.watch, self.work, self.done, self.total, self.right = watch, work, done, total, right
        self.note = ""
        watch(work, done, total)

    def __call__(self, work: str, done: int, total: int, note: str = "") -> None:
        self.note = note
        if note and not note.endswith("tokens/s"):
            self.watch(self.work, self.done, self.total, note)

    def add(self, sample: Sample) -> None:
        self.done, self.right = self.done + 1, self.right + sample["correct"]
        speed = [self.note] if self.note.endswith("tokens/s") else []
        right = [f"{self.right} right"] if self.work == "questions" else []
        self.watch(self.work, self.done, self.total, ", ".join([*right, *speed]))


def _likelihoods(asked: _Asked, done: set[Key], watch: Watch) -> Iterator[Sample]:
    """Samples without a reply: of the choices that the protocol compares, or of the answers a reply could begin with.

    Those are what the question lists or, where any text may be the answer, the right one alone, which has no rank.
    """
    exam, part = asked.exam, (asked.processes.number, asked.processes.count)
    of_question = {
        (question.task, question.index): (prompt, prompt.choices or question.choices)
        for prompt, question in zip(exam.prompts, exam.questions.questions, strict=True)
    }
    prompts = [
        dataclasses.replace(prompt, choices=choices or (prompt.target,)) for prompt, choices in of_question.values()
    ]
    for scores in score_choices(asked.model, asked.tokenizer, prompts, done=done, part=part, watch=watch):
        prompt, choices = of_question[scores.task, scores.index]
        values = scores.loglikelihoods
        yield sample_of(
            prompt,
            exam.protocol.name,
            completion=None,
            left_out_tokens=scores.left_out_tokens,
            forwarded_tokens=scores.forwarded_tokens,
            **(_compared(choices, values, prompt.target) if choices else _alone(*values)),
        )


def _replies(asked: _Asked, done: set[Key], watch: Watch) -> Iterator[Sample]:
    exam, processes = asked.exam, asked.processes
    first: dict[str, int] = {}
    for number, prompt in enumerate(exam.prompts):
        first.setdefault(prompt.shared, number)
    missing = [number for number, prompt in enumerate(exam.prompts) if (prompt.task, prompt.index) not in done]
    mine = processes.share(np.array(missing, dtype=int)).tolist()
    replies = generate(
        asked.model,
        asked.tokenizer,
        [exam.prompts[number] for number in mine],
        batch_size=asked.batch_size,
        batch_invariant=exam.batch_invariant,
        watch=watch,
    )
    for reply in replies:
        number = mine[reply.number]
        prompt, question = exam.prompts[number], exam.questions.questions[number]
        extracted, right = read_reply(exam.protocol, exam.reading, question, reply.text)
        shared = 0 if first[prompt.shared] == number else reply.shared_tokens  # counted with the first that has it
        yield sample_of(
            prompt,
            exam.protocol.name,
            choices=list(question.choices),
            loglikelihoods=[],
            completion=reply.text,
            extracted=extracted,
            correct=right,
            target_loglikelihood=None,
            target_rank=None,
            left_out_tokens=reply.cut_tokens,
            forwarded_tokens=reply.prompt_tokens - shared + len(reply.tokens) - 1,  # the last is never fed back
        )


def reread(
    samples: Sequence[Sample], questions: QuestionSet, protocol: Protocol, reading: str, asked_for: str
) -> list[Sample]:
    """The samples as another reading has them; no model is asked. Without those of questions that it leaves out.

    Args:
        samples: of the protocol, with the completions as they were generated, or the likelihoods of choices.
        asked_for: the reading that decided where completions end, and which choices were compared.

    Raises:
        BBHError: a completion may end before this reading would end it, or choices are missing; a sample is of no
            question here; a reading that the protocol does not have.
    """
    reading, asked_for = protocol.find_reading(reading), protocol.find_reading(asked_for)
    if reading == "fixed" and protocol.stops[reading] != protocol.stops[asked_for]:
        raise BBHError(
            f"replies to '{protocol.name}' that were ended as lm-eval ends them may lack what the fixed reading needs; "
            "ask again with --reading fixed"
        )
    asked = {(question.task, question.index): question for question in questions.questions}
    found = []
    for sample in samples:
        key = key_of(sample)
        if key not in asked:
            raise BBHError(f"no question {key[1]} of task '{key[0]}' in {questions.source}; these are other questions")
        if protocol.can_answer(asked[key], reading):
            read = _read_choices if protocol.compared else _read_completion
            found.append(read(sample, asked[key], protocol, reading))
    return found


def _read_completion(sample: Sample, question: Question, protocol: Protocol, reading: str) -> Sample:
    extracted, right = read_reply(protocol, reading, question, sample["completion"])
    return sample | {"extracted": extracted, "correct": right}


def _read_choices(sample: Sample, question: Question, protocol: Protocol, reading: str) -> Sample:
    values = dict(zip(sample["choices"], sample["loglikelihoods"], strict=True))
    choices = protocol.choices(question, reading)
    if missing := [choice for choice in choices if choice not in values]:
        raise BBHError(
            f"{question.task} {question.index}: {', '.join(missing)} was not compared; "
            f"ask again with --reading {reading}"
        )
    return sample | _compared(choices, [values[choice] for choice in choices], question.target)


def _alone(loglikelihood: float) -> dict[str, Any]:
    """What a sample says of a right answer that was compared with nothing."""
    found: dict[str, Any] = {"choices": [], "loglikelihoods": [], "extracted": None, "correct": False}
    return found | {"target_loglikelihood": loglikelihood, "target_rank": None}


def _compared(choices: Sequence[str], loglikelihoods: Sequence[float], target: str) -> dict[str, Any]:
    """What a sample says of choices that were compared."""
    ranked = [choices[number] for number in by_likelihood(choices, loglikelihoods)]
    among = target in choices
    return {
        "choices": list(choices),
        "loglikelihoods": list(loglikelihoods),
        "extracted": ranked[0],
        "correct": ranked[0] == target,
        "target_loglikelihood": loglikelihoods[choices.index(target)] if among else None,
        "target_rank": ranked.index(target) + 1 if among else None,
    }
