"""The 27 tasks of BIG-Bench Hard: what each asks, how it is answered, and where its questions come from.

Source: Suzgun et al. 2022, "Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them", arXiv:2210.09261,
and its repository suzgunmirac/BIG-Bench-Hard (MIT). The descriptions are the first paragraphs of its prompt files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: as the repository's file is called.
        description: what stands before its questions.
        words: the two words of a yes/no task, the only answers there are; empty for the other kinds.
        options: True where each question lists its own options (A), (B) ...; neither: the answer is free text.
    """

    name: str
    description: str
    words: tuple[str, ...] = ()
    options: bool = False


@dataclass(frozen=True)
class Question:
    """One question of a task: `index` counts from 0 in its file, `target` is the gold answer as written there."""

    task: str
    index: int
    text: str
    target: str

    @property
    def options(self) -> dict[str, str]:
        """The options the question lists: {"(A)": "Louis", ...}; empty where it lists none."""
        return dict(re.findall(r"^(\([A-Z]\)) ?(.*)$", self.text, flags=re.MULTILINE))

    @property
    def choices(self) -> tuple[str, ...]:
        """Every answer that would be read as one: the task's words or the question's options; empty for free text."""
        return TASKS[self.task].words or (tuple(self.options) if TASKS[self.task].options else ())


_SNARKS = (
    "Determine which of two sentences is sarcastic.\n\n"
    'According to Cambridge University Dictionary, sarcasm is "the use of remarks that clearly mean the '
    "opposite of what they say, made in order to hurt someone's feelings or to criticize something in a "
    'humorous way." Sarcastic sentences often contain satirical or ironic utterances, hyperboles, '
    "ambivalent or witty remarks."
)

_LOGIC = "A logical deduction task which requires deducing the order of a sequence of objects."
_TRACKING = (
    "A task requiring determining the final positions of a set of objects given their initial positions "
    "and a description of a sequence of swaps."
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("boolean_expressions", "Evaluate the result of a random Boolean expression.", words=("True", "False")),
        Task("causal_judgement", "Answer questions about causal attribution.", words=("Yes", "No")),
        Task("date_understanding", "Infer the date from context.", options=True),
        Task("disambiguation_qa", "Clarify the meaning of sentences with ambiguous pronouns.", options=True),
        Task("dyck_languages", "Correctly close a Dyck-n word."),
        Task(
            "formal_fallacies",
            "Distinguish deductively valid arguments from formal fallacies.",
            words=("valid", "invalid"),
        ),
        Task("geometric_shapes", "Name geometric shapes from their SVG paths.", options=True),
        Task("hyperbaton", "Order adjectives correctly in English sentences.", options=True),
        Task("logical_deduction_five_objects", _LOGIC, options=True),
        Task("logical_deduction_seven_objects", _LOGIC, options=True),
        Task("logical_deduction_three_objects", _LOGIC, options=True),
        Task("movie_recommendation", "Recommend movies similar to the given list of movies.", options=True),
        Task("multistep_arithmetic_two", "Solve multi-step arithmetic problems."),
        Task(
            "navigate",
            "Given a series of navigation instructions, determine whether one would end up back at the starting point.",
            words=("Yes", "No"),
        ),
        Task("object_counting", "Questions that involve enumerating objects and asking the model to count them."),
        Task("penguins_in_a_table", "Answer questions about a table of penguins and their attributes.", options=True),
        Task(
            "reasoning_about_colored_objects",
            "Answer extremely simple questions about the colors of objects on a surface.",
            options=True,
        ),
        Task(
            "ruin_names", "Select the humorous edit that 'ruins' the input movie or musical artist name.", options=True
        ),
        Task(
            "salient_translation_error_detection",
            "Detect the type of error in an English translation of a German source sentence.",
            options=True,
        ),
        Task("snarks", _SNARKS, options=True),
        Task(
            "sports_understanding",
            "Determine whether an artificially constructed sentence relating to sports is plausible or not.",
            words=("yes", "no"),
        ),
        Task(
            "temporal_sequences",
            "Task description: Answer questions about which times certain events could have occurred.",
            options=True,
        ),
        Task("tracking_shuffled_objects_five_objects", _TRACKING, options=True),
        Task("tracking_shuffled_objects_seven_objects", _TRACKING, options=True),
        Task("tracking_shuffled_objects_three_objects", _TRACKING, options=True),
        Task("web_of_lies", "Evaluate a random boolean function expressed as a word problem.", words=("Yes", "No")),
        Task("word_sorting", "Sort a list of words."),
    )
}

PUBLISHED_SHA256 = {
    "boolean_expressions": "ea6c754ec005",
    "causal_judgement": "6e8bca44dd40",
    "date_understanding": "0148d4ac5fca",
    "disambiguation_qa": "cf06df9ebf91",
    "dyck_languages": "3f9badedf15c",
    "formal_fallacies": "4c1adb664821",
    "geometric_shapes": "07be68a12442",
    "hyperbaton": "b6d7f55c75f5",
    "logical_deduction_five_objects": "d2df31394b90",
    "logical_deduction_seven_objects": "2896c7e3482e",
    "logical_deduction_three_objects": "e590fae72e3a",
    "movie_recommendation": "a8b53a87ee21",
    "multistep_arithmetic_two": "c9d5a6433c9b",
    "navigate": "b7944dfd3c81",
    "object_counting": "8acef14dbbdd",
    "penguins_in_a_table": "bb87ee449698",
    "reasoning_about_colored_objects": "0a8850cf9516",
    "ruin_names": "b6f723aef2ba",
    "salient_translation_error_detection": "becf3eb8dd53",
    "snarks": "54a0661fe2de",
    "sports_understanding": "63ca262858f6",
    "temporal_sequences": "92a1189faaa8",
    "tracking_shuffled_objects_five_objects": "2063a46a4fb4",
    "tracking_shuffled_objects_seven_objects": "b59fd05b850c",
    "tracking_shuffled_objects_three_objects": "546cc7bf10c6",
    "web_of_lies": "3e60323f8514",
    "word_sorting": "2a6132d2c99f",
}
"""The first twelve digits of the sha256 of each task's file, at the repository's commit 9ee07bd."""
