"""Layers alone at a glance: a row a problem, our kernels beside the limit, compiled PyTorch, nn.Linear and packages."""

from __future__ import annotations

from collections.abc import Sequence

from kallm_bench.records import RunRecord
from kallm_bench.reporting.kernels import figures_of, newest_problems, problem_of
from kallm_bench.reporting.table import Figure, Row, Table

COLUMNS: tuple[tuple[str, str], ...] = (
    ("forward_backward_seconds/kallm", "kallm, forward + backward µs"),
    ("forward_backward_to_limit/kallm", "× limit"),
    ("forward_backward_seconds/compiled", "compiled µs"),
    ("forward_backward_seconds/linear", "nn.Linear µs"),
    ("forward_backward_seconds/gelu", "GELU µs"),
    ("forward_backward_seconds/package", "faster package µs"),
    ("forward_to_limit/kallm", "forward alone, × limit"),
    ("saved_bytes/kallm", "saved MiB"),
    ("peak_bytes/kallm", "peak MiB"),
    ("peak_bytes/linear", "nn.Linear's peak MiB"),
)
"""Metric, with whose it is, and heading; a column without a single value is left out."""

OWN = ("kallm", "reference", "compiled", "sparse", "linear", "gelu", "limit")
"""Contenders that are no packages."""

FEWEST = 4
"""Problems of which a table of all contenders is no longer taken in at a glance."""

EARLIER = "°"
"""Marks a time of another run than the rest of its row."""


def overview_table(suite: str, testbed: str, records: Sequence[RunRecord]) -> Table:
    """The newest record of each problem that has our time; of packages, the newest in which they were there.

    Args:
        records: of layers and others, oldest first.
    """
    newest = newest_problems(records)
    if len(newest) < FEWEST:
        return Table(suite, testbed, (), (), (), (), kind="overview")
    rows = [row for record in newest if (row := _row(record, newest, records)).figures]
    used = {metric for row in rows for metric in row.figures}
    columns = [(metric, heading) for metric, heading in COLUMNS if metric in used]
    notes = ["Median times and memory as in the table of all contenders, which has spreads and errors too."]
    if any(figure.mark == EARLIER for row in rows for figure in row.figures.values()):
        notes.append(f"{EARLIER} From an earlier run on this machine, when the packages were installed.")
    return Table(
        suite,
        testbed,
        tuple(rows),
        tuple(notes),
        tuple(metric for metric, _ in columns),
        tuple(heading for _, heading in columns),
        kind="overview",
    )


def _row(record: RunRecord, newest: Sequence[RunRecord], records: Sequence[RunRecord]) -> Row:
    found = figures_of(record)
    figures = {
        metric: Figure(value)
        for metric, _ in COLUMNS
        if (value := found.get(metric.partition("/")[2], {}).get(metric.partition("/")[0])) is not None
    }
    if "kallm" not in found or not found["kallm"]:
        return Row(problem_of(record, newest))
    if package := _package(record, records):
        figures["forward_backward_seconds/package"] = package
    return Row(problem_of(record, newest), figures=figures)


def _package(record: RunRecord, records: Sequence[RunRecord]) -> Figure | None:
    """The time of the fastest package on this problem, in the newest run that has any."""
    place = (record.settings["device"], record.settings["dtype"], record.arm)
    for other in reversed(records):
        if other.stage != "kernels" or (other.settings["device"], other.settings["dtype"], other.arm) != place:
            continue
        times = [
            time
            for name, figures in figures_of(other).items()
            if name not in OWN and (time := figures.get("forward_backward_seconds"))
        ]
        if times:
            return Figure(min(times), mark="" if other is record else EARLIER)
    return None
