"""The bootstrap's series says what a great many draws would say, and gives way to draws where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from kallm_bench.records import bootstrap
from kallm_bench.records.bootstrap import drawn, resampled

LEVELS = (0.025, 0.05, 0.95, 0.975)

DRAWS = 100_000
"""Leave an error of 0.9 % of a standard deviation at the outermost of these levels."""


def answers(kind: str, tasks: int, questions: int) -> list[np.ndarray]:
    generator = np.random.default_rng([tasks, questions])
    of_kind = {
        "right": lambda: (generator.random((1, questions)) < 0.3).mean(axis=0),
        "seldom right": lambda: (generator.random((1, questions)) < 0.02).mean(axis=0),
        "right in three seeds": lambda: (generator.random((3, questions)) < 0.3).mean(axis=0),
        "apart": lambda: generator.choice([-1.0, 0.0, 1.0], questions, p=[0.1, 0.8, 0.1]),
        "nats": lambda: generator.normal(size=questions) * generator.exponential(size=questions),
    }
    return [of_kind[kind]() for _ in range(tasks)]


@pytest.mark.parametrize(
    ("kind", "ends", "prior"),
    [
        ("right", (0.0, 1.0), 1.0),
        ("seldom right", (0.0, 1.0), 1.0),
        ("right in three seeds", (0.0, 1.0), 1.0),
        ("apart", (-1.0, 1.0), 1 / 8),
        ("nats", (), 0.0),
    ],
    ids=["right", "seldom right", "right in three seeds", "apart", "nats"],
)
@pytest.mark.parametrize(("tasks", "questions"), [(8, 8), (3, 60)], ids=str)
def test_quantiles_are_those_of_many_draws(
    kind: str, ends: tuple[float, ...], prior: float, tasks: int, questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "REPLICATES", DRAWS)
    asked = answers(kind, tasks, questions)
    found = resampled(asked, LEVELS, ends, prior)
    draws = drawn(asked, ends, prior, DRAWS, np.random.default_rng(1))
    assert found.deviation == pytest.approx(draws.std(), rel=0.02)
    assert found.quantiles == pytest.approx(np.quantile(draws, LEVELS), abs=0.04 * found.deviation)


@pytest.mark.parametrize(("tasks", "settled"), [(1, False), (27, True)], ids=str)
def test_what_is_drawn_is_what_the_series_cannot_tell(
    tasks: int, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing right of eight, in one task or in many: one is far from normal, the mean of many is not."""
    called = []
    monkeypatch.setattr(bootstrap, "drawn", lambda *arguments: called.append(1) or drawn(*arguments))
    low, high = resampled([np.zeros(8)] * tasks, (0.025, 0.975), (0.0, 1.0), 1.0).quantiles
    assert bool(called) != settled
    assert low < high


def test_the_series_has_settled_on_full_tasks() -> None:
    """Of 250 questions in each of 27 tasks, what the last two orders say is out of sight."""
    asked = answers("right", 27, 250)
    mean, variance, *higher = bootstrap._cumulants(asked, (0.0, 1.0), 1.0)
    assert mean == pytest.approx(np.mean(asked))
    orders = bootstrap._series([each / variance ** (n / 2) for n, each in enumerate(higher, 3)], np.array([-1.96]))
    assert [abs(float(each[0])) for each in orders[3:]] == pytest.approx([0, 0], abs=1e-4)


def test_what_never_varies_has_no_spread() -> None:
    found = resampled([np.full(5, 0.25)] * 3, (0.1, 0.9))
    assert (found.deviation, found.quantiles) == (0.0, (0.25, 0.25))
