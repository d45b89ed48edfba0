"""What samples come to: accuracy with its interval, beside guessing and the majority answer, a task and in all.

Where likelihoods of answers were computed besides replies, that of the right one, and how often it is the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from kallm_bench.bbh.aggregate import leaderboard_score, mean_and_error
from kallm_bench.bbh.protocols import LEADERBOARD_CHOICES
from kallm_bench.bbh.questions import QuestionSet
from kallm_bench.bbh.samples import Sample, has_reply
from kallm_bench.bbh.tasks import Question
from kallm_bench.records import Metric
from kallm_bench.records.statistics import accuracy_interval

MEANS = ("accuracy", "guessing_accuracy", "majority_accuracy")
"""Of which the figure in all is the plain mean over all tasks."""

CUT_NOTE = "prompts longer than the model's context; their beginnings were left out, as lm-eval does"


def score(
    samples: Sequence[Sample],
    questions: QuestionSet,
    choices: Callable[[Question], Sequence[str]] = lambda question: question.choices,
) -> list[Metric]:
    """Figures of each task and in all: accuracy and its 95 % interval, guessing, majority, invalid answers.

    Where likelihoods were computed, the mean log-likelihood of the right answer too; in all, over the tasks that have
    choices: any other text is as unlikely as it is long, and the longest would decide. Where that was besides replies,
    in how many of the questions with choices the right one is the likeliest, beside guessing in these tasks.

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
        parts += _intervals({task: answered}, f"/{task}")
    listing = [task for task, answered in of_task.items() if any(sample["choices"] for sample in answered)]
    likeliest = [task for task, answered in of_task.items() if _likeliest(answered)]
    means = [
        *(_mean_over(name, parts, of_task) for name in MEANS),
        _mean_over("target_loglikelihood", parts, listing),
        _mean_over("likeliest_accuracy", parts, likeliest),
        _mean_over("guessing_accuracy", parts, likeliest, "likeliest_guessing"),
    ]
    whole = [mean for mean in means if mean]
    whole[1:1] = _intervals(of_task)
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
        "likeliest_accuracy": _likeliest(answered),
    }
    return {name: (float(np.mean(each)), len(each)) for name, each in values.items() if each}


def _mean_over(name: str, parts: Sequence[Metric], tasks: Collection[str], called: str = "") -> Metric | None:
    """The plain mean of a figure over these tasks; None where none of them has it."""
    wanted = {f"{name}/{task}" for task in tasks}
    found = [metric for metric in parts if metric.name in wanted]
    values = [metric.value for metric in found if metric.value is not None]
    return Metric(called or name, float(np.mean(values)), n=sum(metric.n for metric in found)) if found else None


def _likeliest(samples: Sequence[Sample]) -> list[float]:
    """Of each that has choices compared besides its reply, whether the right one is the likeliest.

    Where no reply was asked for, that is what accuracy tells.
    """
    return [float(each["target_rank"] == 1) for each in samples if has_reply(each) and each["loglikelihoods"]]


def _intervals(of_task: Mapping[str, Sequence[Sample]], part: str = "") -> list[Metric]:
    """Both ends of the intervals of means over these tasks: of right answers, and of right answers being likeliest."""
    right = {task: [float(sample["correct"]) for sample in each] for task, each in of_task.items()}
    likeliest = {task: shares for task, each in of_task.items() if (shares := _likeliest(each))}
    metrics = []
    for name, values in (("accuracy", right), ("likeliest_accuracy", likeliest)):
        if values:
            low, high = accuracy_interval({task: np.array([each]) for task, each in values.items()})
            n = sum(map(len, values.values()))
            metrics += [Metric(f"{name}_low{part}", low, n=n), Metric(f"{name}_high{part}", high, n=n)]
    return metrics
