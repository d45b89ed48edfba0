"""How a question is put to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kallm_bench.bbh.tasks import TASKS, Question
from kallm_bench.errors import BBHError, unknown


@dataclass(frozen=True)
class Protocol:
    """One way to ask. Answers are generated greedily and read by `extraction.read_answer`.

    Args:
        name: as on the command line.
        max_new_tokens: where an answer is cut.
    """

    name: str
    max_new_tokens: int

    def prompt(self, question: Question, tokenizer: Any) -> str:
        """One user turn, the task's description above the question, in the model's own chat template.

        The template may put a default system turn before it; that stays, since the model was tuned with it.

        Raises:
            BBHError: the tokenizer has no chat template.
        """
        if tokenizer is None or not tokenizer.chat_template:
            raise BBHError(f"protocol '{self.name}' needs a tokenizer with a chat template, and the model has none")
        content = f"{TASKS[question.task].description}\n\n{question.text}"
        turns = [{"role": "user", "content": content}]
        prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return prompt


PROTOCOLS = {"chat": Protocol("chat", max_new_tokens=64)}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name. BBHError where there is none."""
    if name not in PROTOCOLS:
        raise BBHError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]
