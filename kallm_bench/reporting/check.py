"""Conditions on a report, for scripts: "kan.accuracy >= linear.accuracy - 1" holds or does not.

An operand is an arm, a dot and a metric of the tables. Fractions count in points, as the tables show them, so that the
1 above is one point of accuracy; all else counts in the unit of the table of metrics: bytes, tokens/s, nats/token.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.errors import RecordError, unknown
from kallm_bench.records import METRICS, kind_of
from kallm_bench.reporting.failures import SEED, why_missing
from kallm_bench.reporting.table import Row, Table

ARITHMETIC: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
COMPARED: dict[type, Callable[[float, float], bool]] = {
    ast.Lt: lambda a, b: a < b and not _same(a, b),
    ast.LtE: lambda a, b: a < b or _same(a, b),
    ast.Gt: lambda a, b: a > b and not _same(a, b),
    ast.GtE: lambda a, b: a > b or _same(a, b),
}
FORM = "Write it as in: kan.accuracy >= linear.accuracy - 1"


@dataclass(frozen=True)
class Outcome:
    """Whether a condition holds in one suite on one testbed, and the values that it was found with."""

    where: str
    holds: bool
    values: str


KINDS = ("arms", "failures")
"""The tables that know of arms."""


@dataclass(frozen=True)
class Place:
    """A suite on a testbed: the rows of its arms, and of what failed."""

    title: str
    rows: Sequence[Row]
    failed: Sequence[Row]

    @property
    def arms(self) -> set[str]:
        """What rows may be called by: their names, and with a number where several go by one."""
        return {name for row in (*self.rows, *self.failed) for name in (row.name, row.label)}

    def value(self, arm: str, metric: str) -> float:
        """The figure that the arm has there, or an error that says why it has none."""
        called = [row for row in self.rows if arm in (row.name, row.label)]
        having = [row for row in called if metric in row.figures]
        if not having:
            why = [why_missing(row) for row in self.failed if arm == row.name]
            measured = sorted({name for row in called for name in row.figures})
            told = [*why, f"it has {', '.join(measured) or 'no figures'}"]
            raise RecordError(f"{self.title}: {arm} has no {metric}; {'; '.join(told)}")
        if len(having) > 1:
            labels = ", ".join(row.label for row in having)
            raise RecordError(
                f"{self.title}: {len(having)} rows go by '{arm}'; name one: {labels}. The notes tell them apart"
            )
        return _in_points(having[0], metric)

    def reservation(self, arm: str) -> str:
        """What to say beside a figure of an arm of which something failed when it was last run."""
        failed = [f"seed {row.words[SEED]}" for row in self.failed if arm == row.name]
        return f" ({', '.join(failed)} failed when last run)" if failed else ""


def check(expression: str, tables: Sequence[Table]) -> list[Outcome]:
    """Asks a condition of each suite and testbed that has all its arms, or where they failed.

    Raises:
        RecordError: it does not read, no table has its arms or metrics, an arm stands there in several rows, or it has
            no figure since it failed.
    """
    names, condition = _read(expression, tables)
    having = [each for each in _places(tables) if {arm for arm, _ in names.values()} <= each.arms]
    if not having:
        raise RecordError(f"no suite and testbed has all arms of '{expression}'")
    outcomes = []
    for place in having:
        values = {name: place.value(arm, metric) for name, (arm, metric) in names.items()}
        told = ", ".join(
            f"{arm}.{metric} = {values[name]:.6g}{place.reservation(arm)}" for name, (arm, metric) in names.items()
        )
        try:
            holds = bool(_evaluated(condition, values, expression))
        except ZeroDivisionError:
            raise RecordError(f"'{expression}' divides by zero: {told}") from None
        outcomes.append(Outcome(place.title, holds, told))
    return outcomes


def _read(expression: str, tables: Sequence[Table]) -> tuple[dict[str, tuple[str, str]], ast.expr]:
    """Placeholder -> (arm, metric), and the condition with them. Names may hold signs: the longest that fits counts."""
    arms = {arm for place in _places(tables) for arm in place.arms}
    metrics = {metric for table in tables if table.kind in KINDS for metric in table.metrics}
    operand = re.compile(rf"(?<![\w.])({_any_of(arms)})\.({_any_of(metrics)}|[A-Za-z_]\w*)(?!\w)")
    names: dict[str, tuple[str, str]] = {}

    def placeholder(found: re.Match[str]) -> str:
        names[f"_{len(names)}"] = (found[1], found[2])
        return f" _{len(names) - 1} "

    text = operand.sub(placeholder, expression)
    if other := re.search(r"([A-Za-z][\w+-]*)\.[A-Za-z_]", text):
        raise RecordError(f"--check '{expression}': {unknown('arm', other[1], arms)}")
    for _, metric in names.values():
        if metric.partition("/")[0] not in METRICS:
            raise RecordError(f"--check '{expression}': {unknown('metric', metric, METRICS)}")
    try:
        condition = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RecordError(f"--check '{expression}' does not read. {FORM}") from None
    if not names or not isinstance(condition, ast.Compare | ast.BoolOp):
        raise RecordError(f"--check '{expression}' is no condition on arms. {FORM}")
    return names, condition


def _places(tables: Sequence[Table]) -> list[Place]:
    """Each suite and testbed of these tables, in their order."""
    found: dict[tuple[str, str], dict[str, Sequence[Row]]] = defaultdict(dict)
    for table in tables:
        if table.kind in KINDS:
            found[table.suite, table.testbed][table.kind] = table.rows
    return [
        Place(f"{suite} on {testbed}", kinds.get("arms", ()), kinds.get("failures", ()))
        for (suite, testbed), kinds in found.items()
    ]


def _any_of(names: Iterable[str]) -> str:
    """A pattern for any of these names, the longest first; for none of none."""
    return "|".join(re.escape(name) for name in sorted(names, key=lambda name: (-len(name), name))) or "(?!)"


def _same(a: float, b: float) -> bool:
    """Equal but for rounding: 0.55 is 55 points and not 55.00000000000001."""
    return math.isclose(a, b, rel_tol=1e-9)


def _in_points(row: Row, metric: str) -> float:
    value = row.figures[metric].value
    return 100 * value if kind_of(metric).unit == "fraction" else value


def _evaluated(node: ast.expr, values: dict[str, float], expression: str) -> Any:
    """The value of a syntax tree of comparisons and arithmetic; of nothing else, so that no code ever runs."""
    match node:
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluated(operand, values, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](_evaluated(left, values, expression), _evaluated(right, values, expression))
        case ast.BoolOp(op=op, values=parts):
            found = [_evaluated(part, values, expression) for part in parts]
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in COMPARED for op in ops):
            sides = [_evaluated(side, values, expression) for side in (left, *others)]
            return all(COMPARED[type(op)](a, b) for op, a, b in zip(ops, sides[:-1], sides[1:], strict=True))
    raise RecordError(f"--check '{expression}' may hold + - * / < <= > >= and, or, numbers and arms alone. {FORM}")
