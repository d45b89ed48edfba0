"""What a model is asked, as text: what passes from the protocols to the engines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One question as a model is asked it.

    Args:
        task, index: which question.
        shared: the beginning that all questions of the task have in common (few-shot text), maybe empty.
        question: what follows; shared + question is the whole prompt, as text (chat templates are already applied).
        choices: what may follow, of which the likelihoods are compared; empty for a protocol that generates.
        target: the text of the gold answer.
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
