"""The ways to ask BIG-Bench Hard: one of our own, and the five that lm-eval 0.4.13 has, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kallm_bench.bbh.tasks import TASKS, Question
from kallm_bench.errors import BBHError, unknown

READINGS = ("fixed", "lm-eval")
"""lm-eval: as lm-evaluation-harness 0.4.13 does it, faults included. fixed: without them, see readings.py."""

OWN_READING = "chat"
"""The reading of the `chat` protocol, which lm-eval does not have."""


def _letters(count: int) -> tuple[str, ...]:
    return tuple(f"({chr(ord('A') + number)})" for number in range(count))


LEADERBOARD_CHOICES: dict[str, tuple[str, ...]] = {
    "boolean_expressions": ("False", "True"),
    "causal_judgement": ("Yes", "No"),
    "date_understanding": _letters(6),
    "disambiguation_qa": _letters(3),
    "formal_fallacies": ("valid", "invalid"),
    "geometric_shapes": _letters(11),
    "hyperbaton": _letters(2),
    "logical_deduction_five_objects": _letters(5),
    "logical_deduction_seven_objects": _letters(7),
    "logical_deduction_three_objects": _letters(3),
    "movie_recommendation": _letters(6),
    "navigate": ("Yes", "No"),
    "object_counting": tuple(str(number) for number in range(19)),
    "penguins_in_a_table": _letters(5),
    "reasoning_about_colored_objects": _letters(18),
    "ruin_names": _letters(6),
    "salient_translation_error_detection": _letters(6),
    "snarks": _letters(2),
    "sports_understanding": ("yes", "no"),
    "temporal_sequences": _letters(4),
    "tracking_shuffled_objects_five_objects": _letters(5),
    "tracking_shuffled_objects_seven_objects": _letters(7),
    "tracking_shuffled_objects_three_objects": _letters(3),
    "web_of_lies": ("Yes", "No"),
}
"""What lm-eval compares in each task, in its order: the earlier one wins a tie. The same for every question."""


@dataclass(frozen=True)
class Protocol:
    """One way to ask.

    Args:
        name: as on the command line.
        max_new_tokens: where a reply is cut; 0 where likelihoods of choices are compared instead.
        chat: whether the question is a user turn in the model's own chat template, and not plain text.
        shots: what stands after the questions of the worked examples: "answer", "reasoning", or "" for no examples.
        after_description: what parts the description from what follows.
        cue: what stands below a question.
        stops: reading -> texts that end a reply, which is cut at the first of them. Its keys are the readings that the
            protocol has, the one that is taken where none is asked for first.
        compared: task -> choices whose likelihoods are compared; empty where the answer is generated.
        group: what lm-eval calls it.
        reasons: whether a reply is to reason before it answers. Then the answer does not follow the prompt, and how
            likely it is there says nothing.
    """

    name: str
    max_new_tokens: int
    chat: bool = False
    shots: str = ""
    after_description: str = "\n\n"
    cue: str = "A:"
    stops: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    compared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: str = ""
    reasons: bool = False

    @property
    def answers_at_once(self) -> bool:
        """Whether a reply is to begin with the answer, so that each answer has a likelihood after the prompt.

        Not where a reply reasons first: what comes before the answer is then the model's own, another text for every
        model, and an answer behind it has a likelihood that compares with nobody's.
        """
        return not self.compared and not self.reasons

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.compared or TASKS)

    def find_reading(self, name: str | None) -> str:
        """The reading of this name, or the protocol's own where none is named. BBHError where it has no such one."""
        if name is None:
            return next(iter(self.stops))
        if name in self.stops:
            return name
        if name not in READINGS:
            raise BBHError(unknown("reading", name, READINGS))
        raise BBHError(f"protocol '{self.name}' is not lm-eval's and has only its own reading; leave --reading out")

    def choices(self, question: Question, reading: str) -> tuple[str, ...]:
        """The answers that are compared: the task's, or read without faults those of them that the question lists."""
        choices = self.compared.get(question.task, ())
        if reading == "fixed" and question.options:
            return tuple(choice for choice in choices if choice in question.options)
        return choices

    def guessable(self, question: Question, reading: str) -> tuple[str, ...]:
        """What guessing chooses among: the answers that are compared, or where replies are read those it lists."""
        return self.choices(question, reading) if self.compared else question.choices

    def can_answer(self, question: Question, reading: str) -> bool:
        """False for a question without a choice, or with none that is right, where the reading leaves such out."""
        if not self.compared or reading != "fixed":
            return True
        choices = self.choices(question, reading)
        return len(choices) > 1 and question.target in choices


_ZERO_SHOT = ("</s>", "Q:", "<|im_end|>")
_FEW_SHOT = ("</s>", "Q", "\n\n")
_FEW_SHOT_FIXED = ("</s>", "Q:", "\n\n")
"""A capital Q alone is no new question: it may begin a name, or `Queen`."""

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol("chat", 64, chat=True, stops={OWN_READING: ()}),
            Protocol(
                "leaderboard",
                0,
                shots="answer",
                after_description="",
                stops={"lm-eval": (), "fixed": ()},
                compared=LEADERBOARD_CHOICES,
                group="leaderboard_bbh",
            ),
            Protocol("zeroshot", 256, stops={"fixed": _ZERO_SHOT, "lm-eval": _ZERO_SHOT}, group="bbh_zeroshot"),
            Protocol(
                "fewshot",
                256,
                shots="answer",
                stops={"fixed": _FEW_SHOT_FIXED, "lm-eval": _FEW_SHOT},
                group="bbh_fewshot",
            ),
            Protocol(
                "cot-fewshot",
                1024,
                shots="reasoning",
                cue="A: Let's think step by step.\n",
                stops={"fixed": _FEW_SHOT_FIXED, "lm-eval": _FEW_SHOT},
                group="bbh_cot_fewshot",
                reasons=True,
            ),
            Protocol(
                "cot-zeroshot",
                256,
                cue="A: Let's think step by step.",
                stops={"fixed": _ZERO_SHOT, "lm-eval": _ZERO_SHOT},
                group="bbh_cot_zeroshot",
                reasons=True,
            ),
        )
    }
)

LM_EVAL_PROTOCOLS = tuple(name for name, protocol in PROTOCOLS.items() if protocol.group)


def find_protocol(name: str) -> Protocol:
    """The protocol of this name. BBHError where there is none."""
    if name not in PROTOCOLS:
        raise BBHError(unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]
