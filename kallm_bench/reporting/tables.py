"""Records become tables: one row an arm, means over seeds, intervals where they can be had, notes that say the rest.

Seeds are averaged where data, protocol, device, settings and the weights they began from are equal. Where they are not,
an arm has several rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kallm_bench.errors import RecordError, unknown
from kallm_bench.records import WIDE_SPREAD, Ending, ResultsStore, RunRecord, standing_failures
from kallm_bench.records.store import collector_paused
from kallm_bench.reporting.answers import AnswerBook
from kallm_bench.reporting.arms import Arm, variants
from kallm_bench.reporting.differences import differences_table
from kallm_bench.reporting.failures import failure_notes, failures_table, why_missing
from kallm_bench.reporting.kernels import KERNEL_COLUMNS, WIDE, figures_of, kernel_notes, newest_problems, problem_of
from kallm_bench.reporting.memory import Memory
from kallm_bench.reporting.notes import named_suite, notes
from kallm_bench.reporting.overview import overview_table
from kallm_bench.reporting.rows import STAGE_COLUMNS, arm_row, chance_rows
from kallm_bench.reporting.starts import starts_table
from kallm_bench.reporting.table import Figure, Row, Table
from kallm_bench.reporting.training import TRAINING_COLUMNS, step_figures, step_notes


def build_tables(
    store: ResultsStore,
    suite: str | None = None,
    testbed: str | None = None,
    stands: Callable[[RunRecord | Ending], bool] = lambda filed: True,
    reference: str | None = None,
    memory: Memory | None = None,
    order: Callable[[str], Sequence[str]] = lambda suite: (),
) -> list[Table]:
    """The tables of each suite and testbed in the store, or of those named; of what `stands` lets pass.

    Args:
        stands: asked of each record, and of each failure that no later success has made void.
        reference: the arm that others are set beside; without it, each KAN is set beside its linear control.
        memory: what earlier reports computed; what this one does joins it, for its owner to keep.
        order: the names of a suite's arms in the order of its file, given how the user named it; arms that it does not
            name come after these, in that of their first records.

    Raises:
        RecordError: no table has an arm called `reference`.
    """
    with collector_paused():
        groups: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
        known = {record.id: record for record in store.records()}
        for record in known.values():
            if suite in (None, record.suite) and testbed in (None, record.testbed) and stands(record):
                groups[record.testbed, record.suite].append(record)
        failed: dict[tuple[str, str], list[Ending]] = defaultdict(list)
        for failure in standing_failures(store.endings(suite, testbed), known.values()):
            if stands(failure):
                failed[failure.testbed, failure.suite].append(failure)
        book = AnswerBook(store, memory or Memory())
        tables = _tables(store, groups, failed, known, reference, book, order)
    store.damaged.sort()
    if reference is not None and not any(table.kind == "differences" and table.rows for table in tables):
        names = {row.name for table in tables if table.kind == "arms" for row in table.rows if row.seeds}
        for row in (row for table in tables if table.kind == "failures" for row in table.rows):
            if row.name == reference and reference not in names:
                raise RecordError(f"{reference} has no figures: {why_missing(row)}")
        if reference not in names and names:
            raise RecordError(unknown("arm", reference, names))
    return [table for table in tables if table.rows]


def _tables(
    store: ResultsStore,
    groups: Mapping[tuple[str, str], Sequence[RunRecord]],
    failed: Mapping[tuple[str, str], Sequence[Ending]],
    known: Mapping[str, RunRecord],
    reference: str | None,
    book: AnswerBook,
    order: Callable[[str], Sequence[str]],
) -> list[Table]:
    """All tables of each (testbed, suite), those without rows too."""
    tables = []
    for where, name in sorted({*groups, *failed}):
        records, failures = groups.get((where, name), ()), failed.get((where, name), ())
        of_models = _in_order([record for record in records if record.stage != "kernels"], order)
        arms = _arms(of_models, known)
        tables.append(_table(book, name, where, store.describe(where), arms, failures))
        tables.append(failures_table(name, where, failures))
        tables.append(differences_table(book, name, where, arms, reference))
        tables.append(starts_table(name, where, of_models))
        tables.append(_training(name, where, of_models))
        tables.append(overview_table(name, where, records))
        tables.append(_kernels(name, where, store.describe(where), newest_problems(records)))
    return tables


def _in_order(records: Sequence[RunRecord], order: Callable[[str], Sequence[str]]) -> list[RunRecord]:
    """By their arms as `order` has them; of an arm, and of arms that it does not name, as they come."""
    places = {name: place for place, name in enumerate(order(named_suite(records)) if records else ())}
    return sorted(records, key=lambda record: places.get(record.arm, len(places)))


def _arms(records: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> list[Arm]:
    of_name: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        of_name[record.arm].append(record)
    return [arm for name, of_arm in of_name.items() for arm in variants(name, of_arm, known)]


def _table(
    book: AnswerBook,
    suite: str,
    testbed: str,
    machine: dict[str, Any],
    arms: Sequence[Arm],
    failed: Sequence[Ending],
) -> Table:
    if not arms:
        return Table(suite, testbed, (), (), (), ())
    rows = [*(arm_row(book, arm) for arm in arms), *chance_rows(arms)]
    below = [
        *failure_notes(failed),
        *notes(suite, machine, arms, [figure for row in rows for figure in row.figures.values()]),
    ]
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for _, metric, heading in STAGE_COLUMNS if metric in used]
    return Table(suite, testbed, tuple(rows), tuple(below), *_unzipped(columns))


def _training(suite: str, testbed: str, records: Sequence[RunRecord]) -> Table:
    """Training steps in several ways, where a profile did that."""
    found = step_figures(records)
    rows = [
        Row(arm, way, 0, {name: Figure(value) for name, value in figures.items()})
        for (arm, way), figures in found.items()
    ]
    used = {metric for figures in found.values() for metric in figures}
    columns = [(metric, heading) for metric, heading in TRAINING_COLUMNS if metric in used]
    below = step_notes(records) if rows else ()
    return Table(suite, testbed, tuple(rows), below, *_unzipped(columns), kind="training")


def _kernels(suite: str, testbed: str, machine: dict[str, Any], records: Sequence[RunRecord]) -> Table:
    """Layers alone, a record a problem: a row for each of its contenders."""
    rows = []
    for record in records:
        for contender, values in figures_of(record).items():
            wide = WIDE if values.get("timing_spread", 0.0) > WIDE_SPREAD else ""
            figures = {name: Figure(value, mark=wide * (name == "timing_spread")) for name, value in values.items()}
            rows.append(Row(problem_of(record, records), contender, 0, figures))
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for metric, heading in KERNEL_COLUMNS if metric in used]
    below = kernel_notes(suite, machine, records) if records else ()
    return Table(suite, testbed, tuple(rows), tuple(below), *_unzipped(columns), kind="kernels")


def _unzipped(columns: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(metric for metric, _ in columns), tuple(heading for _, heading in columns)
