"""What a model is asked: one question, as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One question as a model is asked it.

    Args:
        task, index: which question.
        shared: the beginning that all questions of the task have in common (few-shot text), maybe empty.
        question: what follows; shared + question is the whole prompt, as text (chat templates are already applied).
        choices: the answers whose likelihoods are compared, each without the space before it: what follows the prompt
            is " " + choice. Empty for a protocol that generates.
        target: the gold answer as text; may be none of the choices.
        stops: texts that end a reply; empty for choices.
        max_new_tokens: of a reply.
    """

    task: str
    index: int
    shared: str
    question: str
    choices: tuple[str, ...] = ()
    target: str = ""
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0
