"""What records say of a checkpoint, in a few lines for its card."""

from __future__ import annotations

from collections.abc import Sequence

from kallm_bench.records import Metric, RunRecord
from kallm_bench.reporting.chance import AT_CHANCE, BELOW_CHANCE, judged

SHOWN = {
    "retrofit": ("conversion_error",),
    "train": ("trained_tokens", "trainable_parameters", "heldout_loss"),
    "eval-bbh": ("accuracy", "guessing_accuracy"),
}
"""The stages that a card tells of, and their figures."""

WORDS = {"": "", AT_CHANCE: ", an interval that includes guessing", BELOW_CHANCE: ", below guessing"}


def facts_of(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """(what, value) of each record, oldest first: arm and seed, data, figures."""
    facts: list[tuple[str, str]] = []
    for record in records:
        if record.stage not in SHOWN:
            continue
        if record.suite != "manual":
            facts.append((f"{record.stage}: arm", f"{record.arm} of suite {record.suite}, seed {record.seed}"))
        if record.data:
            facts.append((f"{record.stage}: data", record.data["source"]))
        for name in SHOWN[record.stage]:
            facts += [
                (_named(record, metric), _shown(metric) + WORDS[judged(record, name)[1]])
                for metric in record.metrics
                if metric.name == name
            ]
    return list(dict.fromkeys(facts))


def _named(record: RunRecord, metric: Metric) -> str:
    protocol = f", {record.settings['protocol']}" if "protocol" in record.settings else ""
    return f"{record.stage}: {metric.name.replace('_', ' ')}{protocol}"


def _shown(metric: Metric) -> str:
    if metric.value is None:
        return metric.note or "–"
    value = metric.value
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"
    return text + (f" (n = {metric.n:,})" if metric.n > 1 else "")
