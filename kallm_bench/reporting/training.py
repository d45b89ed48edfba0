"""Training steps done in several ways: a row for each arm and way, and what it gains over the plain loop."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from kallm_bench.records import RunRecord

TRAINING_COLUMNS: tuple[tuple[str, str], ...] = (
    ("train_tokens_per_second", "tokens/s"),
    ("train_to_plain", "× plain"),
    ("train_mfu", "MFU"),
    ("peak_vram_reserved_bytes", "peak GPU memory"),
    ("peak_resident_bytes", "peak memory"),
)
"""Metric and heading of each column; a column without a single value is left out."""

WAYS = {
    "plain": "a plain Hugging Face loop",
    "": "kallm train",
    "kept": "kallm train, what frozen blocks give kept on disk",
}
"""The part after a metric's slash, and what a row says of it."""


def step_figures(records: Sequence[RunRecord]) -> dict[tuple[str, str], dict[str, float]]:
    """(arm, way) -> metric -> mean over seeds, of profiles that did training steps in more than one way."""
    values: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    newest = {(each.arm, each.seed): each for each in records if each.stage == "profile"}
    for record in newest.values():
        found = {metric.name: metric.value for metric in record.metrics if metric.value is not None}
        ways = [way for way in WAYS if f"train_tokens_per_second/{way}".rstrip("/") in found]
        if len(ways) < 2:
            continue
        for way in ways:
            for metric, _ in TRAINING_COLUMNS:
                if (value := found.get(f"{metric}/{way}".rstrip("/"))) is not None:
                    values[record.arm, WAYS[way]][metric].append(value)
            if plain := found.get("train_tokens_per_second/plain"):
                values[record.arm, WAYS[way]]["train_to_plain"].append(
                    found[f"train_tokens_per_second/{way}".rstrip("/")] / plain
                )
    return {key: {name: statistics.fmean(each) for name, each in of.items()} for key, of in values.items()}


def step_notes(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """What the table's numbers are of."""
    profiles = [each for each in records if each.stage == "profile"]
    settings = max(profiles, key=lambda record: (record.started, record.id)).settings
    peak = "what the allocator holds, CUDA graphs' memory included"
    if settings["device"] == "cpu":
        peak = "the process's resident size, libraries included"
    return (
        f"A training step: {settings['batch']} rows of {settings['length']:,} tokens like packed chats, 30 % of them "
        f"bearing loss, scope {settings['scope']}, {settings['dtype']} on {settings['device']}. Median of "
        f"{settings['repeats']} steps.",
        "Plain loop: model in that dtype, its own loss over all logits, documents that see each other. Peak: "
        f"{peak}. MFU: FLOP that a step needs, over the data sheet's.",
    )
