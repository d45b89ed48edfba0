"""The leaderboard's prompts, made of questions and few-shot texts of the BIG-Bench-Hard repository."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from kallm_bench.bbh.prompts import Prompt

WORDS = {
    "boolean_expressions": ("False", "True"),
    "causal_judgement": ("Yes", "No"),
    "formal_fallacies": ("valid", "invalid"),
    "navigate": ("Yes", "No"),
    "object_counting": tuple(map(str, range(19))),
    "sports_understanding": ("yes", "no"),
    "web_of_lies": ("Yes", "No"),
}
OPTIONS = {
    "date_understanding": 6,
    "disambiguation_qa": 3,
    "geometric_shapes": 11,
    "hyperbaton": 2,
    "logical_deduction_five_objects": 5,
    "logical_deduction_seven_objects": 7,
    "logical_deduction_three_objects": 3,
    "movie_recommendation": 6,
    "penguins_in_a_table": 5,
    "reasoning_about_colored_objects": 18,
    "ruin_names": 6,
    "salient_translation_error_detection": 6,
    "snarks": 2,
    "temporal_sequences": 4,
    "tracking_shuffled_objects_five_objects": 5,
    "tracking_shuffled_objects_seven_objects": 7,
    "tracking_shuffled_objects_three_objects": 3,
}
CHOICES = WORDS | {task: tuple(f"({letter})" for letter in string.ascii_uppercase[:n]) for task, n in OPTIONS.items()}


def leaderboard(folder: Path, limit: int | None = None, tasks: tuple[str, ...] = ()) -> list[Prompt]:
    """The first `limit` questions of each of the 24 tasks, or of `tasks`; `folder` is the repository's."""
    prompts = []
    for task in sorted(tasks or CHOICES):
        shared = _shots((folder / "cot-prompts" / f"{task}.txt").read_text())
        examples = json.loads((folder / "bbh" / f"{task}.json").read_text())["examples"][:limit]
        for index, each in enumerate(examples):
            asked = f"Q: {each['input']}\nA:"
            prompts.append(Prompt(task, index, shared, asked, CHOICES[task], each["target"]))
    return prompts


def _shots(text: str) -> str:
    description, *shots = text.partition("-----\n")[2].split("\n\nQ: ")
    for shot in shots:
        question, _, reasoning = shot.partition("\nA:")
        answer = re.findall(r"[Tt]he answer is (.*?)\.?$", reasoning.strip())[-1]
        description += f"Q: {question}\nA: {answer}\n\n"
    return description
