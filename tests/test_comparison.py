"""Comparisons of two arms: exact tests are exact, intervals cover as often as they say, words follow from both."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from kallm_bench.records.comparison import (
    ALIKE,
    BETTER,
    MARGIN,
    UNCLEAR,
    WORSE,
    Comparison,
    compare,
    holm,
    mcnemar,
    sign_flip,
)
from kallm_bench.records.statistics import difference_interval, mean_over_questions

BBH = (250,) * 23 + (187, 178, 146, 250)
"""Questions of BIG-Bench Hard's 27 tasks."""


def simulated(
    generator: np.random.Generator, sizes: Sequence[int], seeds: tuple[int, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Answers of two arms that know each question equally well, from not at all to surely."""
    ours, theirs = {}, {}
    for number, count in enumerate(sizes):
        skill = generator.beta(0.4, 0.8, size=count)
        ours[str(number)] = generator.random((seeds[0], count)) < skill
        theirs[str(number)] = generator.random((seeds[1], count)) < skill
    return ours, theirs


def share_of_misses(sizes: Sequence[int], seeds: tuple[int, int], repeats: int) -> Mapping[str, float]:
    """Of simulated comparisons of equals: how often the interval excludes 0, and either exact test is below 5 %."""
    generator, misses = np.random.default_rng(7), Counter[str]()
    for _ in range(repeats):
        found = compare(*simulated(generator, sizes, seeds))
        misses["interval"] += not found.interval[0] <= 0 <= found.interval[1]
        misses["mcnemar"] += found.mcnemar[0] <= 0.05
        misses["holm"] += min(task.p_value for task in found.tasks.values()) <= 0.05
    return {name: misses[name] / repeats for name in ("interval", "mcnemar", "holm")}


def of_counts(both: int, gained: int, lost: int, neither: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One task, one seed, with so many questions of each kind."""
    counts = [both, gained, lost, neither]
    return {"t": np.repeat([1, 1, 0, 0], counts)[None]}, {"t": np.repeat([1, 0, 1, 0], counts)[None]}


@pytest.mark.parametrize(("sizes", "seeds"), [((100, 60), (1, 1)), ((40,) * 8, (3, 3)), ((60,) * 5, (3, 1))], ids=str)
def test_equals_are_seldom_told_apart(sizes: tuple[int, ...], seeds: tuple[int, int]) -> None:
    """A quick look; 400 repeats leave a standard error of 1.1 %. The long test below has the figures."""
    missed = share_of_misses(sizes, seeds, repeats=400)
    assert 0.02 <= missed["interval"] <= 0.085
    assert missed["mcnemar"] <= 0.085
    assert missed["holm"] <= 0.085


@pytest.mark.long
@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("sizes", [BBH, (40,) * 8], ids=["all of BBH", "320 questions"])
def test_equals_are_told_apart_as_often_as_said(sizes: tuple[int, ...], seeds: tuple[int, int]) -> None:
    missed = share_of_misses(sizes, seeds, repeats=10_000)
    assert 0.04 <= missed["interval"] <= 0.06, missed
    assert missed["mcnemar"] <= 0.05 + 0.0045, missed  # two standard errors of the simulation itself
    assert missed["holm"] <= 0.05 + 0.0045, missed


def test_a_difference_of_the_margin_is_seldom_called_none() -> None:
    """Two one-sided tests: arms that differ by just a point are called equivalent at most 5 % of the time."""
    generator, called = np.random.default_rng(3), 0
    for _ in range(400):
        right = generator.random(20_000)
        ours, theirs = right < 0.3 + MARGIN, generator.permutation(right) < 0.3
        called += compare({"t": ours[None]}, {"t": theirs[None]}).equivalent
    assert called <= 400 * 0.085


def test_a_detectable_difference_is_found_four_times_in_five() -> None:
    generator, found, told = np.random.default_rng(5), 0, []
    for _ in range(300):
        skill = generator.random(1500)
        ours, theirs = generator.random(1500) < skill * 0.95 + 0.05, generator.random(1500) < skill
        outcome = compare({"t": ours[None]}, {"t": theirs[None]})
        found += outcome.verdict == BETTER
        told.append(outcome.detectable)
    true = 0.05 / 2  # the mean of 0.05 - 0.05 x over the skills
    power = stats.norm.cdf((stats.norm.ppf(0.8) + stats.norm.ppf(0.975)) * true / np.mean(told) - stats.norm.ppf(0.975))
    assert found / 300 == pytest.approx(power, abs=0.08)


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((300, 60, 10, 300), BETTER),
        ((300, 10, 60, 300), WORSE),
        ((30, 6, 5, 30), UNCLEAR),
        ((9000, 20, 18, 9000), ALIKE),
        ((9000, 60, 10, 9000), BETTER),  # by a fifth of a point: there, and named, and equivalent too
    ],
    ids=str,
)
def test_words(counts: tuple[int, int, int, int], verdict: str) -> None:
    ours, theirs = of_counts(*counts)
    found = compare(ours, theirs)
    assert found.verdict == verdict
    assert found.difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert found.equivalent == (sum(counts) > 10_000)
    back = compare(theirs, ours)
    assert back.difference == -found.difference
    assert {BETTER: WORSE, WORSE: BETTER}.get(back.verdict, back.verdict) == verdict
    assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]), abs=2e-3)


def test_arms_that_never_differ_on_few_questions_are_not_called_equivalent() -> None:
    """Eight questions answered alike say little; ten thousand say much."""
    assert compare(*of_counts(4, 0, 0, 4)).verdict == UNCLEAR
    assert compare(*of_counts(5000, 0, 0, 5000)).verdict == ALIKE
    assert compare(*of_counts(4, 0, 0, 4)).mcnemar == (1.0,)


def test_mcnemar_against_a_worked_example() -> None:
    """Nine of ten differing questions one way: 2 (1 + 10) / 2^10."""
    ours, theirs = of_counts(50, 1, 9, 50)
    assert mcnemar(ours["t"][0], theirs["t"][0]) == pytest.approx(22 / 1024)


@pytest.mark.parametrize("number", range(5))
def test_flipping_signs_is_mcnemar_for_one_seed(number: int) -> None:
    generator = np.random.default_rng(number)
    ours, theirs = generator.random((1, 60)) < 0.4, generator.random((1, 60)) < 0.6
    assert sign_flip(ours, theirs) == pytest.approx(mcnemar(ours[0], theirs[0]), rel=1e-9)


@pytest.mark.parametrize("seeds", [(3, 3), (2, 1), (1, 3)], ids=str)
def test_flipping_signs_against_trying_all(seeds: tuple[int, int]) -> None:
    generator = np.random.default_rng(1)
    ours, theirs = generator.random((seeds[0], 11)) < 0.5, generator.random((seeds[1], 11)) < 0.2
    apart = ours.mean(axis=0) - theirs.mean(axis=0)
    sums = [abs(np.dot(signs, apart)) for signs in itertools.product((-1, 1), repeat=11)]
    assert sign_flip(ours, theirs) == pytest.approx(np.mean(np.array(sums) >= abs(apart.sum()) - 1e-9))


def test_holm_against_a_worked_example() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_seeds_are_paired_by_place_or_set_beside_the_only_one() -> None:
    generator = np.random.default_rng(0)
    three, one = {"t": generator.random((3, 50)) < 0.5}, {"t": generator.random((1, 50)) < 0.5}
    assert compare(three, one).mcnemar == tuple(mcnemar(three["t"][n], one["t"][0]) for n in range(3))
    assert compare(three, three).mcnemar == (1.0, 1.0, 1.0)
    assert len(compare(three, {"t": three["t"][:2]}).mcnemar) == 2


def test_seeds_are_no_new_questions() -> None:
    """The same answers from three seeds say no more than from one."""
    ours, theirs = of_counts(30, 12, 6, 30)
    threefold: Comparison = compare({"t": np.repeat(ours["t"], 3, 0)}, {"t": np.repeat(theirs["t"], 3, 0)})
    assert threefold.interval == compare(ours, theirs).interval
    assert threefold.tasks == compare(ours, theirs).tasks


def test_a_mean_over_questions_has_an_interval_as_wide_as_its_error_and_none_from_one_question() -> None:
    values = {str(n): np.random.default_rng(n).normal(n, 1 + n, size=(1, 40)) for n in range(3)}
    mean, interval = mean_over_questions(values)
    error = np.sqrt(sum(each.var(ddof=1) / 40 for each in values.values())) / 3
    assert mean == pytest.approx(np.mean([each.mean() for each in values.values()]))
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2 * error)
    assert mean_over_questions(values | {"3": np.array([5.0])})[1] is None


def test_differences_of_losses_are_paired_where_seeds_are_the_same() -> None:
    ours, theirs = {0: 2.1, 1: 2.3, 2: 2.2}, {0: 2.0, 1: 2.25, 2: 2.1}
    paired = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval()
    assert difference_interval(ours, theirs) == pytest.approx((paired.low, paired.high))
    others = {5: 2.0, 6: 2.25, 7: 2.1}
    welch = stats.ttest_ind(list(ours.values()), list(others.values()), equal_var=False).confidence_interval()
    assert difference_interval(ours, others) == pytest.approx((welch.low, welch.high))
    assert difference_interval(ours, {0: 2.0}) is None
    assert difference_interval({0: 2.0, 1: 2.0}, {0: 1.5, 2: 1.5}) == (0.5, 0.5)
