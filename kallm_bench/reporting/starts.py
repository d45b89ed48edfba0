"""What calibrated retrofits knew before any training: a row an arm, with the R² of each replaced block."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from kallm_bench.records import RunRecord
from kallm_bench.records.statistics import mean_interval
from kallm_bench.reporting.arms import Arm, what_it_is
from kallm_bench.reporting.table import Figure, Row, Table


def starts_table(suite: str, testbed: str, records: Sequence[RunRecord]) -> Table:
    """What each calibrated retrofit knew before any training: the newest of each arm and seed, seeds together."""
    newest = {(r.arm, r.seed): r for r in records if r.stage == "retrofit" and r.value("start_seconds") is not None}
    arms: dict[str, list[RunRecord]] = defaultdict(list)
    for (name, _), record in sorted(newest.items(), key=lambda pair: pair[1].started):
        arms[name].append(record)
    columns = [
        ("replaced_parameters", "new parameters"),
        ("heldout_loss", "held-out loss"),
        ("start_seconds", "seconds"),
    ]
    found = {metric.name for each in arms.values() for record in each for metric in record.metrics}
    sites = sorted((name for name in found if name.startswith("start_r2/")), key=_place)
    columns[1:1] = [(name, f"R² block {name.split('/')[1]}") for name in sites]
    rows = []
    for name, of_arm in arms.items():
        figures = {}
        for metric, _ in columns:
            if values := [value for record in of_arm if (value := record.value(metric)) is not None]:
                figures[metric] = Figure(
                    statistics.fmean(values), mean_interval(values), over="seeds" if len(values) > 1 else ""
                )
        rows.append(Row(name, what_it_is(Arm(name, {"retrofit": of_arm})), len(of_arm), figures))
    before = {f"{value:.3f}" for each in arms.values() for r in each if (value := r.value("heldout_loss_before"))}
    sources = {str(record.data.get("source")) for each in arms.values() for record in each}
    below = [
        f"Before the retrofit the held-out loss was {' and '.join(sorted(before))}; nothing here was trained.",
        f"Calibrated on {', '.join(sorted(sources))}. R²: of the replaced block's output, on held-out rows.",
    ]
    metrics, headings = [metric for metric, _ in columns], [heading for _, heading in columns]
    return Table(suite, testbed, tuple(rows), tuple(below), tuple(metrics), tuple(headings), kind="starts")


def _place(name: str) -> tuple[int, str]:
    """How "start_r2/3" and "start_r2/3.mlp.up_proj" are sorted."""
    block, _, layer = name.partition("/")[2].partition(".")
    return int(block), layer
