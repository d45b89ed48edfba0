"""A question as a model is asked it, under one of the protocols.

Source: lm-evaluation-harness 0.4.13, whose prompts come out byte for byte of the BIG-Bench-Hard repository's questions
and chain-of-thought files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.bbh.fewshot import FewShot, read_fewshot
from kallm_bench.bbh.protocols import Protocol
from kallm_bench.bbh.questions import QuestionSet
from kallm_bench.bbh.tasks import TASKS, Question
from kallm_bench.errors import BBHError


@dataclass(frozen=True)
class Prompt:
    """One question as a model is asked it.

    Args:
        task, index: which question.
        shared: the beginning that all questions of the task have in common (few-shot text), maybe empty.
        question: what follows; shared + question is the whole prompt, as text (chat templates are already applied).
        choices: the answers whose likelihoods are compared, each without the space before it: what follows the prompt
            is " " + choice, and acc_norm divides by len(choice). Empty for a protocol that generates.
        target: the gold answer as text; may be none of the choices.
        stops: texts that end a reply; empty for choices. A token that ends a sequence always ends it too.
        max_new_tokens: of a reply; 0 for choices.
        templated: whether a chat template made the text, with every special token in it: a tokenizer then adds none.
    """

    task: str
    index: int
    shared: str
    question: str
    choices: tuple[str, ...] = ()
    target: str = ""
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
    templated: bool = False

    @property
    def text(self) -> str:
        return self.shared + self.question

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    def to_json(self, protocol: str) -> dict[str, Any]:
        """A line of what `--prompts-only` writes; its choices are empty where the answer is generated."""
        return {
            "protocol": protocol,
            "task": self.task,
            "index": self.index,
            "prompt": self.text,
            "choices": list(self.choices),
            "target": self.target,
            "prompt_sha256": self.sha256,
        }


def build_prompts(
    questions: QuestionSet,
    protocol: Protocol,
    tokenizer: Any = None,
    reading: str | None = None,
    max_new_tokens: int | None = None,
) -> list[Prompt]:
    """Every question as the protocol puts it, in the questions' order.

    Args:
        tokenizer: what the chat template comes from; unused by protocols that ask in plain text.
        reading: decides which choices are compared and what ends a reply; None for the protocol's own.
        max_new_tokens: of a reply; None for the protocol's own.

    Raises:
        BBHError: few-shot texts are needed and not there, or do not read; chat without a chat template; a reading that
            the protocol does not have.
    """
    reading = protocol.find_reading(reading)
    if protocol.shots and questions.folder is None:
        raise BBHError(
            f"protocol '{protocol.name}' shows worked examples from cot-prompts/*.txt, which {questions.source} does "
            "not carry; run `kallm fetch bbh` and set KALLM_BBH_DIR to its folder, or take --protocol zeroshot"
        )
    shots = {task: read_fewshot(questions.folder, task) for task in questions.tasks if protocol.shots}
    beginnings = {task: _beginning(protocol, task, shots.get(task)) for task in questions.tasks}
    prompts = []
    for question in questions.questions:
        if protocol.chat:
            shared, asked = _as_chat(protocol, question, tokenizer)
        else:
            shared, asked = beginnings[question.task], _asked(protocol, question.text)
        prompts.append(
            Prompt(
                question.task,
                question.index,
                shared,
                asked,
                protocol.choices(question, reading),
                question.target,
                protocol.stops[reading],
                0 if protocol.compared else max_new_tokens or protocol.max_new_tokens,
                protocol.chat,
            )
        )
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """sha256 over all that is asked: texts, choices and stops."""
    told = repr([(p.task, p.index, p.text, p.choices, p.stops, p.max_new_tokens) for p in prompts])
    return hashlib.sha256(told.encode()).hexdigest()


def _beginning(protocol: Protocol, task: str, shots: FewShot | None) -> str:
    description = shots.description if shots else TASKS[task].description
    examples = shots.examples if shots else ()
    shown = [
        _asked(protocol, example.question)
        + (example.reasoning if protocol.shots == "reasoning" else f" {example.answer}")
        + "\n\n"
        for example in examples
    ]
    return description + protocol.after_description + "".join(shown)


def _asked(protocol: Protocol, text: str) -> str:
    return f"Q: {text}\n{protocol.cue}"


def _as_chat(protocol: Protocol, question: Question, tokenizer: Any) -> tuple[str, str]:
    """One user turn, the task's description above the question, in the model's own chat template.

    The template may put a default system turn before it; that stays, since the model was tuned with it.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise BBHError(
            f"protocol '{protocol.name}' needs a tokenizer with a chat template, and the model has none; "
            "--protocol zeroshot asks the same questions in plain text"
        )
    content = f"{TASKS[question.task].description}\n\n{question.text}"
    turns = [{"role": "user", "content": content}]
    prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    start = max(0, prompt.rfind(question.text))  # 0 where the template has changed the text
    return prompt[:start], prompt[start:]
