"""What samples come to: accuracy with its interval, beside guessing and the majority answer, a task and in all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kallm_bench.bbh.aggregate import leaderboard_score, mean_and_error
from kallm_bench.bbh.protocols import LEADERBOARD_CHOICES
from kallm_bench.bbh.questions import QuestionSet
from kallm_bench.bbh.samples import Sample
from kallm_bench.bbh.tasks import Question
from kallm_bench.records import Metric
from kallm_bench.records.statistics import accuracy_interval

MEANS = ("accuracy", "guessing_accuracy", "majority_accuracy", "target_loglikelihood")
"""Of which the figure in all is the plain mean over tasks."""

CUT_NOTE = "prompts longer than the model's context; their beginnings were left out, as lm-eval does"


def score(
    samples: Sequence[Sample],
    questions: QuestionSet,
    choices: Callable[[Question], Sequence[str]] = lambda question: question.choices,
) -> list[Metric]:
    """Figures of each task and in all: accuracy and its 95 % interval, guessing, majority, invalid answers.

    Where choices were compared, the mean log-likelihood of the right one too, over the questions that have it among
    them.

    Args:
        choices: what guessing chooses among; by default what the question lists.
    """
    of_task: dict[str, list[Sample]] = {task: [] for task in questions.tasks}
    for sample in samples:
        of_task[sample["task"]].append(sample)
    parts: list[Metric] = []
    for task, answered in of_task.items():
        asked = [question for question in questions.questions if question.task == task]
        parts += [
            Metric(f"{name}/{task}", value, n=count)
            for name, (value, count) in _of_task(answered, asked, questions.majority[task], choices).items()
        ]
        parts += _interval({task: answered}, f"/{task}")
    whole = [
        Metric(name, float(np.mean([m.value for m in values])), n=sum(metric.n for metric in values))
        for name in MEANS
        if (values := [metric for metric in parts if metric.name.startswith(f"{name}/")])
    ]
    whole[1:1] = _interval(of_task)
    invalid = sum(sample["extracted"] is None for sample in samples)
    whole.append(Metric("invalid_rate", invalid / len(samples), n=len(samples)))
    if cut := sum(sample["left_out_tokens"] > 0 for sample in samples):
        whole.append(Metric("cut_prompts", cut, n=len(samples), note=CUT_NOTE))
    whole.append(Metric("forwarded_tokens", sum(sample["forwarded_tokens"] for sample in samples)))
    return [*whole, *parts]


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


def _of_task(
    answered: Sequence[Sample],
    asked: Sequence[Question],
    majority: str,
    choices: Callable[[Question], Sequence[str]],
) -> dict[str, tuple[float, int]]:
    """Each figure of one task but its interval, and over how many questions it is the mean."""
    values: dict[str, list[float]] = {
        "accuracy": [float(sample["correct"]) for sample in answered],
        "guessing_accuracy": [(q.target in choices(q)) / max(1, len(choices(q))) for q in asked],
        "majority_accuracy": [float(question.target == majority) for question in asked],
        "invalid_rate": [float(sample["extracted"] is None) for sample in answered],
        "target_loglikelihood": [v for sample in answered if (v := sample["target_loglikelihood"]) is not None],
    }
    return {name: (float(np.mean(each)), len(each)) for name, each in values.items() if each}


def _interval(of_task: Mapping[str, Sequence[Sample]], part: str = "") -> list[Metric]:
    """Both ends of the interval of the mean over these tasks."""
    right = {task: np.array([[float(sample["correct"]) for sample in each]]) for task, each in of_task.items()}
    n = sum(map(len, of_task.values()))
    ends = zip(("accuracy_low", "accuracy_high"), accuracy_interval(right), strict=True)
    return [Metric(f"{name}{part}", value, n=n) for name, value in ends]
