"""Conditions for scripts: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_reporting import Bench

from kallm_bench.errors import RecordError
from kallm_bench.reporting import Table, build_tables
from kallm_bench.reporting.check import check


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    """Accuracies of 50, 62.5 and 25 %; losses of 2.5, 2.4 and 3."""
    bench = Bench(tmp_path_factory.mktemp("results"))
    bench.arm("linear", 0, {"basis": "linear"}, 2.5, right=4)
    bench.arm("linear-kan", 0, {"basis": "cheby2", "degree": 2}, 2.4, right=5)
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 3}, 3.0, right=2)
    bench.arm("twice", 0, {"basis": "cheby2", "degree": 2}, 3.0, right=2)
    bench.arm("twice", 1, {"basis": "cheby2", "degree": 3}, 3.0, right=2)
    return build_tables(bench.store)


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("linear-kan.accuracy >= linear.accuracy + 12.5", True),
        ("linear-kan.accuracy > linear.accuracy + 12.5", False),
        ("kan.accuracy >= linear.accuracy - 1", False),
        ("kan.accuracy>=linear.accuracy-25", True),
        ("linear.accuracy-kan.accuracy <= 25", True),
        ("kan.accuracy/linear.accuracy < 0.51", True),
        ("linear-kan.heldout_loss < linear.heldout_loss < kan.heldout_loss", True),
        ("kan.heldout_loss < 2 or (kan.heldout_loss <= 3 and -kan.accuracy < 0)", True),
        ("2 * kan.accuracy < linear.accuracy and kan.accuracy > 0", False),
        ("kan.parameters > 134e6", True),
        ("kan.decode_tokens_per_second > 75", True),
        ("guessing.accuracy > linear.accuracy", False),
        ("twice (1).accuracy <= twice (2).accuracy and (twice (1).accuracy) > 5", True),
        ("kan.accuracy >= majority answer.accuracy - 30", True),
    ],
)
def test_conditions(tables: list[Table], expression: str, holds: bool) -> None:
    (outcome,) = check(expression, tables)
    assert outcome.holds is holds
    assert outcome.where == tables[0].title


def test_the_values_are_told(tables: list[Table]) -> None:
    assert check("kan.accuracy < linear.accuracy", tables)[0].values == "kan.accuracy = 25, linear.accuracy = 50"


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("kam.accuracy > 1", "no arm 'kam'. Did you mean 'kan'?"),
        ("kan.acuracy > 1", "no metric 'acuracy'. Did you mean 'accuracy'?"),
        ("kan.train_mfu > 1", "kan has no train_mfu; it has accuracy, "),
        ("twice.accuracy > 1", "2 rows go by 'twice'; name one: twice (1), twice (2)."),
        ("kan.accuracy", "is no condition on arms. Write it as in"),
        ("1 < 2", "is no condition on arms"),
        ("kan.accuracy >", "does not read"),
        ("", "does not read"),
        ("(" * 5000 + "kan.accuracy", "does not read"),
        ("kan.accuracy > 1 / 0", "divides by zero: kan.accuracy = 25"),
        ("kan.accuracy > 2 ** 9", "may hold"),
        ("kan.accuracy > exit(1)", "may hold"),
        ("kan.accuracy > True", "may hold"),
        ("kan.accuracy > '1'", "may hold"),
        ("not kan.accuracy > 1", "is no condition"),
        ("kan.accuracy == 25", "may hold"),  # figures are seldom equal
        ("kan.accuracy > [1]", "may hold"),
    ],
)
def test_what_is_no_condition_is_refused_in_words(tables: list[Table], expression: str, told: str) -> None:
    with pytest.raises(RecordError) as refused:
        check(expression, tables)
    assert told in str(refused.value)


def test_each_suite_and_testbed_that_has_the_arms_is_asked(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=8)
    bench.testbed = "other"
    bench.arm("kan", 0, {"basis": "cheby2", "degree": 2}, 2.0, right=2)
    bench.testbed = "third"
    bench.arm("linear", 0, {"basis": "linear"}, 2.0, right=2)
    outcomes = check("kan.accuracy > 50", build_tables(bench.store))
    assert sorted(outcome.holds for outcome in outcomes) == [False, True]
    with pytest.raises(RecordError, match="no suite and testbed has all arms"):
        check("kan.accuracy > linear.accuracy", build_tables(bench.store))
