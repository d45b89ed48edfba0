"""Fresh questions from seeds, in BBH's own format and answer distribution."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from kallm_bench.bbh.procedural.dates import date_understanding, temporal_sequences
from kallm_bench.bbh.procedural.deduction import logical_deduction
from kallm_bench.bbh.procedural.objects import object_counting, reasoning_about_colored_objects
from kallm_bench.bbh.procedural.people import navigate, tracking_shuffled_objects, web_of_lies
from kallm_bench.bbh.procedural.sieve import may_be_real
from kallm_bench.bbh.procedural.symbols import (
    boolean_expressions,
    dyck_languages,
    multistep_arithmetic_two,
    word_sorting,
)
from kallm_bench.bbh.tasks import Question
from kallm_bench.errors import BBHError, unknown

GENERATORS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "boolean_expressions": boolean_expressions,
    "date_understanding": date_understanding,
    "dyck_languages": dyck_languages,
    "logical_deduction_five_objects": partial(logical_deduction, count=5),
    "logical_deduction_seven_objects": partial(logical_deduction, count=7),
    "logical_deduction_three_objects": partial(logical_deduction, count=3),
    "multistep_arithmetic_two": multistep_arithmetic_two,
    "navigate": navigate,
    "object_counting": object_counting,
    "reasoning_about_colored_objects": reasoning_about_colored_objects,
    "temporal_sequences": temporal_sequences,
    "tracking_shuffled_objects_five_objects": partial(tracking_shuffled_objects, count=5),
    "tracking_shuffled_objects_seven_objects": partial(tracking_shuffled_objects, count=7),
    "tracking_shuffled_objects_three_objects": partial(tracking_shuffled_objects, count=3),
    "web_of_lies": web_of_lies,
    "word_sorting": word_sorting,
}

PATIENCE = 20_000  # draws without a new question after which a task counts as used up


def procedural_questions(task: str, count: int, seed: int = 0) -> list[Question]:
    """`count` different questions of a task that BBH itself does not ask.

    The same task and seed give the same questions on any machine, and the first of many are the few.

    Raises:
        BBHError: no generator for the task, or not that many questions: boolean_expressions has 1,170.
    """
    if task not in GENERATORS:
        raise BBHError(unknown("procedural task", task, GENERATORS))
    rng = random.Random(f"{task}:{seed}")
    questions: dict[str, Question] = {}
    misses = 0
    while len(questions) < count:
        text, target = GENERATORS[task](rng)
        if text in questions or may_be_real(text):
            misses += 1
            if misses > PATIENCE:
                raise BBHError(f"{task} has no {count} different questions; {len(questions)} could be made")
            continue
        misses = 0
        questions[text] = Question(task, len(questions), text, target)
    return list(questions.values())
