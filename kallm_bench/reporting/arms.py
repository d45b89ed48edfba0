"""An arm as a report sees it: the newest record of each stage and seed, of equal settings."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.records import RunRecord

AT_CHANCE = "†"
"""Marks an accuracy whose interval includes guessing."""


@dataclass(frozen=True)
class Arm:
    """The newest record of each stage and seed of one arm, all of equal settings."""

    name: str
    stages: dict[str, list[RunRecord]]

    @property
    def spec(self) -> dict[str, Any] | None:
        """The spec of its retrofit; None where nothing was replaced."""
        retrofits = self.stages.get("retrofit")
        return retrofits[0].settings["spec"] if retrofits else None

    @property
    def replaced_parameters(self) -> float:
        return self.stages["retrofit"][0].value("replaced_parameters") or 0.0

    def settings(self) -> dict[str, Any]:
        """What its rows must share to be averaged, by stage."""
        return {stage: comparable(records[0]) for stage, records in self.stages.items() if records}

    @property
    def seeds(self) -> int:
        return len({record.seed for records in self.stages.values() for record in records})


def comparable(record: RunRecord) -> dict[str, Any]:
    """A record's settings less what differs between seeds by nature: the seed and the weights."""
    settings = {key: value for key, value in record.settings.items() if key not in ("seed", "weights")}
    if "spec" in settings:
        settings["spec"] = {key: value for key, value in settings["spec"].items() if key != "seed"}
    return settings


def variants(name: str, records: Sequence[RunRecord]) -> list[Arm]:
    """The arms that go by one name: seeds of equal settings together, another way of asking apart.

    Of each stage and seed the newest record counts; of evaluations, the newest for each way of asking.

    Args:
        records: of one suite and testbed, oldest first.
    """
    newest: dict[tuple[str, int, str], RunRecord] = {}
    for record in records:
        if record.arm == name:
            newest[record.stage, record.seed, _signature([record]) if record.stage == "eval-bbh" else ""] = record
    ways = sorted({asked for stage, _, asked in newest if stage == "eval-bbh"}) or [""]
    found: dict[str, list[list[RunRecord]]] = defaultdict(list)
    for way, seed in itertools.product(ways, sorted({seed for _, seed, _ in newest})):
        of_seed = [record for (_, number, asked), record in newest.items() if number == seed and asked in ("", way)]
        found[_signature(of_seed)].append(of_seed)
    return [_arm(name, seeds) for seeds in found.values()]


def _arm(name: str, seeds: list[list[RunRecord]]) -> Arm:
    stages: dict[str, list[RunRecord]] = defaultdict(list)
    for record in itertools.chain.from_iterable(seeds):
        stages[record.stage].append(record)
    return Arm(name, dict(stages))


def _signature(records: Sequence[RunRecord]) -> str:
    return json.dumps({record.stage: comparable(record) for record in records}, sort_keys=True)


def what_it_is(arm: Arm) -> str:
    """What the arm is, from the spec of its retrofit."""
    spec = arm.spec
    trained = any((record.value("trained_tokens") or 0) > 0 for record in arm.stages.get("train", []))
    if spec is None:
        return "fine-tuned, nothing replaced" if trained else "untouched"
    blocks = f"blocks {_ranges(spec['blocks'])}"
    if spec["basis"] == "drop":
        return f"no feed-forward in {blocks}"
    if spec["basis"] == "linear":
        hidden = f"hidden {spec['hidden']}" if spec["hidden"] else "full width"
        return f"linear restart, {hidden}, {blocks}"
    degree = f" degree {spec['degree']}" if spec["degree"] is not None else ""
    hidden = f", hidden {spec['hidden']}" if spec["hidden"] else ""
    per_edge = ", constant per edge" if spec["constant"] == "edge" else ""
    return f"{spec['basis']}{degree}, {spec['form']}{hidden}{per_edge}, {blocks}"


def _ranges(numbers: Iterable[int]) -> str:
    """ "0,3,5-7" from 0, 3, 5, 6, 7."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(parts)
