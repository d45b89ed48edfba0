"""Arms beside a reference: by how much, how surely, and in one word; and which arms cannot be told apart.

Where the user names no reference, each KAN is set beside its control: the linear restart with as many parameters,
trained alike; where there is none, the largest linear restart that was trained alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kallm_bench.records import RunRecord
from kallm_bench.records.comparison import MARGIN, POWER, Comparison
from kallm_bench.records.statistics import difference_interval
from kallm_bench.reporting.answers import LIKELIHOOD, AnswerBook
from kallm_bench.reporting.arms import SPEED, Arm, alone
from kallm_bench.reporting.controls import Controls, is_kan, is_linear, matched, started_alike
from kallm_bench.reporting.curves import has_curve, measured, tokens_to_loss
from kallm_bench.reporting.prefixes import UNKNOWN, alike, timed, way_of
from kallm_bench.reporting.rows import ACCURACIES, figure_of
from kallm_bench.reporting.table import Figure, Row, Table

ALPHA = 0.05

MANY = 3
"""Comparisons of which one may be expected to mislead somebody."""

MORE_LIKELY, LESS_LIKELY = "▲", "▼"
"""Marks a difference of log-likelihoods whose interval excludes 0, and that over seeds too where there are several."""

LOSSES = {
    "heldout_loss": ("heldout_loss_difference", "held-out loss difference"),
    "class_loss": ("class_loss_difference", "class loss difference"),
}

TOKENS = "tokens_to_reference"

RATIOS: tuple[tuple[str, str, str, str], ...] = (
    ("profile", "parameters", "parameters_to_reference", "× parameters"),
    ("profile", "prefill_tokens_per_second", "prefill_to_reference", "× prefill speed"),
    ("profile", "decode_tokens_per_second", "decode_to_reference", "× decode speed"),
    ("train", "train_tokens_per_second", "train_to_reference", "× training speed"),
    ("profile", "train_tokens_per_second", "train_to_reference", "× training speed"),
    ("train", "peak_vram_allocated_bytes", "memory_to_reference", "× peak memory"),
    ("profile", "peak_vram_allocated_bytes", "memory_to_reference", "× peak memory"),
    ("train", "peak_resident_bytes", "memory_to_reference", "× peak memory"),
    ("profile", "peak_resident_bytes", "memory_to_reference", "× peak memory"),
)
"""Stage, metric, ratio and its heading; of those that give the same ratio the first that both arms have counts."""

COLUMNS = (
    ("accuracy_difference", "accuracy difference, points"),
    ("detectable_difference", "detectable"),
    ("likelihood_difference", "log-likelihood difference, nats"),
    *LOSSES.values(),
    (TOKENS, "× tokens to its loss"),
    *dict.fromkeys((ratio, heading) for _, _, ratio, heading in RATIOS),
)

HELD_OUT = ("data", "heldout", "heldout_rows", "row_length", "device", "dtype", "task")
"""Settings of training that decide on which rows a held-out loss is taken, and how it is computed."""

AGAINST, VERDICT, EXACT, TASKS = "against", "verdict on accuracy", "McNemar's p", "tasks better, worse"


def differences_table(
    book: AnswerBook, suite: str, testbed: str, arms: Sequence[Arm], reference: str | None = None
) -> Table:
    """A row for each arm that has something to be set beside; `reference` may name an arm, and then all others are."""
    controls = Controls(arms)
    named = [arm for arm in arms if arm.name == reference]
    others = [controls.of(arm) if reference is None else _named(arm, named) for arm in arms]
    pairs = [(arm, other) for arm, other in zip(arms, others, strict=True) if other]
    rows = [row for arm, other in pairs if (row := _row(book, arm, other)).figures]
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for metric, heading in COLUMNS if metric in used]
    words = [name for name in (AGAINST, VERDICT, EXACT, TASKS) if any(name in row.words for row in rows)]
    return Table(
        suite,
        testbed,
        tuple(rows),
        tuple(_notes(pairs, rows)),
        tuple(metric for metric, _ in columns),
        tuple(heading for _, heading in columns),
        kind="differences",
        words=tuple(words),
    )


def _named(arm: Arm, named: Sequence[Arm]) -> Arm | None:
    """Of the rows that the reference has, one that was asked the same questions if there is one."""
    if any(arm is each for each in named):
        return None
    same = [other for other in named if other.settings.get("eval-bbh") == arm.settings.get("eval-bbh")]
    return next(iter(same or named), None)


def _row(book: AnswerBook, arm: Arm, other: Arm) -> Row:
    figures: dict[str, Figure] = {}
    words = {AGAINST: other.label}
    comparison = _compared(book, arm, other)
    if comparison:
        low, high = comparison.interval
        figures["accuracy_difference"] = Figure(100 * comparison.difference, (100 * low, 100 * high), over="questions")
        figures["detectable_difference"] = Figure(100 * comparison.detectable)
        words |= {VERDICT: comparison.verdict, EXACT: ", ".join(map(_probability, comparison.mcnemar))}
        words[TASKS] = _tasks(comparison)
    if figure := _likelihood_difference(book, arm, other):
        figures["likelihood_difference"] = figure
    for metric, (difference, _) in LOSSES.items():
        if figure := _loss_difference(arm, other, metric):
            figures[difference] = figure
    if _same_heldout(arm, other) and (
        figure := tokens_to_loss(arm.stages.get("train", []), other.stages.get("train", []))
    ):
        figures[TOKENS] = figure
    for stage, metric, ratio, _ in RATIOS:
        if ratio not in figures and (figure := _ratio(book, arm, other, stage, metric)):
            figures[ratio] = figure
    return Row(
        arm.name, figures=figures, words=words, seeds=arm.seeds, number=arm.number, way=arm.way, comparison=comparison
    )


def _compared(book: AnswerBook, arm: Arm, other: Arm) -> Comparison | None:
    """On the first kind of questions that both were asked in the same way."""
    for stage, metric in ACCURACIES.items():
        mine, theirs = arm.stages.get(stage, []), other.stages.get(stage, [])
        asked = mine and theirs and measured(mine[0], metric) and measured(theirs[0], metric)
        if not asked or (stage == "train" and not _same_heldout(arm, other)):
            continue
        if stage == "train" or arm.settings[stage] == other.settings[stage]:
            return book.comparison(mine, theirs)
    return None


def _likelihood_difference(book: AnswerBook, arm: Arm, other: Arm) -> Figure | None:
    """None where they were asked in different ways, or likelihoods were not computed of both."""
    mine, theirs = arm.stages.get("eval-bbh", []), other.stages.get("eval-bbh", [])
    both = all(any(measured(record, LIKELIHOOD) for record in each) for each in (mine, theirs))
    if not both or arm.settings["eval-bbh"] != other.settings["eval-bbh"]:
        return None
    if (found := book.likelihood_difference(mine, theirs)) is None:
        return None
    difference, interval = found
    over_seeds = difference_interval(_by_seed(mine, LIKELIHOOD), _by_seed(theirs, LIKELIHOOD))
    known = [each for each in (interval, over_seeds) if each]
    above, below = all(low > 0 for low, _ in known), all(high < 0 for _, high in known)
    mark = "" if not interval else MORE_LIKELY if above else LESS_LIKELY if below else ""
    return Figure(difference, interval, mark, "questions" if interval else "")


def _loss_difference(arm: Arm, other: Arm, metric: str) -> Figure | None:
    mine, theirs = _by_seed(arm.stages.get("train", []), metric), _by_seed(other.stages.get("train", []), metric)
    if not mine or not theirs or not _same_heldout(arm, other):
        return None
    interval = difference_interval(mine, theirs)
    difference = statistics.fmean(mine.values()) - statistics.fmean(theirs.values())
    return Figure(difference, interval, over="seeds" if interval else "")


def _ratio(book: AnswerBook, arm: Arm, other: Arm, stage: str, metric: str) -> Figure | None:
    """How many times the reference's figure; None where one of them lacks it, or it was measured in another way."""
    mine, theirs = _runs(arm, other, stage, metric)
    top, bottom = figure_of(book, mine, metric), figure_of(book, theirs, metric)
    if top is None or bottom is None or not bottom.value or not _same_settings(arm, other, stage, metric):
        return None
    logs = [
        {seed: math.log(value) for seed, value in _by_seed(each, metric).items() if value > 0}
        for each in (mine, theirs)
    ]
    if interval := difference_interval(*logs):
        return Figure(top.value / bottom.value, (math.exp(interval[0]), math.exp(interval[1])), over="seeds")
    if top.over == bottom.over == "samples" and top.interval and bottom.interval:
        least, most = top.interval[0] / bottom.interval[1], top.interval[1] / bottom.interval[0]
        return Figure(top.value / bottom.value, (least, most), over="samples")
    return Figure(top.value / bottom.value)


def _runs(arm: Arm, other: Arm, stage: str, metric: str) -> tuple[Sequence[RunRecord], Sequence[RunRecord]]:
    """The records of a stage; of a training run's speed those that can be set beside each other."""
    mine, theirs = arm.telling(stage, metric), other.telling(stage, metric)
    if (stage, metric) != ("train", SPEED):
        return mine, theirs
    return alike(timed(mine), timed(theirs)) if all(map(alone, timed((*mine, *theirs)))) else ((), ())


def _same_heldout(arm: Arm, other: Arm) -> bool:
    mine, theirs = arm.settings.get("train", {}), other.settings.get("train", {})
    return all(mine.get(key) == theirs.get(key) for key in HELD_OUT)


def _same_settings(arm: Arm, other: Arm, stage: str, metric: str) -> bool:
    """Whether a speed or a size was measured in the same way; parameters are the same however they are counted."""
    if metric == "parameters":
        return True
    mine, theirs = arm.settings.get(stage, {}), other.settings.get(stage, {})
    return all(mine.get(key) == theirs.get(key) for key in ("device", "dtype", "batch", "length", "row_length"))


def _by_seed(records: Sequence[RunRecord], metric: str) -> dict[int, float]:
    name = metric.partition("/")[0]
    return {record.seed: value for record in records if (value := record.value(name)) is not None}


def _probability(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value >= 0.001 else "< 0.001"


def _tasks(comparison: Comparison) -> str:
    """How many tasks differ by the exact test, corrected for their number."""
    sure = [task for task in comparison.tasks.values() if task.p_value < ALPHA]
    better = sum(task.difference > 0 for task in sure)
    return f"{better}, {len(sure) - better} of {len(comparison.tasks)}"


def _notes(pairs: Sequence[tuple[Arm, Arm]], rows: Sequence[Row]) -> Iterable[str]:
    compared = [row for row in rows if row.comparison]
    if compared:
        yield (
            "Accuracy difference: on the same questions, by the plain mean over tasks; 95 % interval by the bootstrap "
            "over questions, each with the answers of all seeds. Other seeds could differ by more."
        )
        yield (
            "Verdict, from that interval: better or worse where it excludes 0; equivalent where the 90 % interval lies "
            f"within ±{100 * MARGIN:.0f} point (two one-sided tests at 5 %). Detectable: the smallest true difference, "
            f"in points, that these questions would show {100 * POWER:.0f} % of the time."
        )
        if len(compared) >= MANY:
            yield (
                f"{len(compared)} comparisons: were all of these arms equals, about {len(compared) / 20:.2g} would be "
                "called better or worse."
            )
        yield "McNemar's p: exact, over all questions, a value for each pair of seeds."
        yield "Tasks better, worse: by exact tests over a task's questions, corrected by Holm for all tasks."
    if any("likelihood_difference" in row.figures for row in rows):
        yield (
            "Log-likelihood difference: of the right answers, on the same questions, by the plain mean over the tasks "
            "that have choices; 95 % interval by the bootstrap over questions, each with the mean over seeds. "
            f"Other seeds could differ by more. {MORE_LIKELY} likelier than the reference has them, {LESS_LIKELY} less "
            "likely: 0 lies outside that interval and, where both have several seeds, outside that over seeds."
        )
    if any(figure.over == "samples" for row in rows for figure in row.figures.values()):
        yield "Ratios ±: half of what the samples of two single runs leave open."
    yield from _named_tasks(compared)
    losses = [figure for row in rows for name, _ in LOSSES.values() if (figure := row.figures.get(name))]
    if any(figure.interval is None for figure in losses):
        yield "Differences of losses without an interval are of one seed: another seed may turn them round."
    linear = [(arm, other) for arm, other in pairs if is_kan(arm) and is_linear(other)]
    rates = {
        record.settings.get("learning_rate")
        for record in itertools.chain(*(each.stages.get("train", []) for pair in linear for each in pair))
        if record.value("trained_tokens") != 0
    }
    if losses and len(rates) == 1 and None not in rates:
        yield f"All at one learning rate, {rates.pop():g}: another may turn differences of losses round."
    reached = {row.name for row in rows if TOKENS in row.figures}
    if reached:
        yield (
            "× tokens to its loss: the share of the other's tokens after which an arm's held-out loss is as low as the "
            "other's in the end, by straight lines between held-out losses."
        )
    late = dict.fromkeys(
        arm.name for arm, _ in pairs if has_curve(arm.stages.get("train", [])) and arm.name not in reached
    )
    if late:
        yield f"Not as low, in some seed, by the end: {', '.join(late)}."
    unequal = [f"'{arm.label}' and '{other.label}'" for arm, other in pairs if not _same_questions(arm, other)]
    if unequal:
        yield f"No accuracy difference where the questions, or how they were asked, differ: {'; '.join(unequal)}."
    yield from _speed_notes(pairs)
    for what, equal in (("size", matched), ("start", started_alike)):
        others = dict.fromkeys(f"'{arm.name}' beside '{other.name}'" for arm, other in linear if not equal(arm, other))
        if others:
            yield f"Not of equal {what}: {'; '.join(others)}."


def _speed_notes(pairs: Sequence[tuple[Arm, Arm]]) -> Iterable[str]:
    """Of which arms no training speeds were compared, or not of all seeds, since what they did was not the same."""
    apart, partly, unknown, shared = [], [], [], []
    for arm, other in pairs:
        all_runs = [timed(each.telling("train")) for each in (arm, other)]
        if not all(all_runs):
            continue
        left = alike(*all_runs)
        mine, theirs = (each.name if each.way else each.label for each in (arm, other))
        said = f"'{mine}' and '{theirs}'"
        if not all(map(alone, itertools.chain(*all_runs))):
            shared.append(said)
        elif not left[0]:
            apart.append(said)
        elif way_of(left[0][0]) == UNKNOWN:
            unknown.append(said)
        elif any(len(each) < len(every) for each, every in zip(left, all_runs, strict=True)):
            partly.append(said)
    why = "for one computed what frozen blocks give where the other read it, or did not note it"
    if apart:
        yield f"No ratio of training runs' speeds of {'; '.join(dict.fromkeys(apart))}, {why}."
    if shared:
        yield (
            "No ratio of training runs' speeds where other processes computed on the machine meanwhile: "
            f"{'; '.join(dict.fromkeys(shared))}."
        )
    if partly:
        yield f"× training speed by some of the seeds, others being unlike: {'; '.join(dict.fromkeys(partly))}."
    if unknown:
        yield (
            "× training speed: whether runs computed what frozen blocks give, or read it from a cache, which is "
            f"faster, was not noted of {'; '.join(dict.fromkeys(unknown))}."
        )


def _named_tasks(rows: Sequence[Row]) -> Iterable[str]:
    """Which tasks the corrected tests tell apart."""
    for row in rows:
        tasks: Mapping[str, Any] = row.comparison.tasks if row.comparison else {}
        found = [f"{name} {100 * task.difference:+.1f}" for name, task in tasks.items() if task.p_value < ALPHA]
        if found:
            yield f"{row.label} against {row.words[AGAINST]}, in points: {', '.join(found)}."


def _same_questions(arm: Arm, other: Arm) -> bool:
    mine, theirs = arm.settings.get("eval-bbh"), other.settings.get("eval-bbh")
    return mine is None or theirs is None or mine == theirs
