"""Whether a training run computed what its frozen blocks give, kept it on disk meanwhile, or read it from there.

Reading makes a step more than twice as fast, whatever the arm. So speeds say something of two arms only where both did
the same; a record from before this was noted does not tell, and is set beside its like alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from kallm_bench.records import RunRecord
from kallm_bench.reporting.arms import SPEED, Arm

SHARE = "prefix_cache_share"

COMPUTED, KEPT, READ, UNKNOWN = "computed", "computed and kept on disk", "read from the disk", "not noted"


def way_of(record: RunRecord) -> str:
    """What a run did, in words; alike for runs whose speeds can be compared."""
    metric = next((each for each in record.metrics if each.name == SHARE), None)
    if metric is None:
        return UNKNOWN
    if metric.value is None:
        return COMPUTED
    percent = round(100 * metric.value)
    return KEPT if percent == 0 else READ if percent == 100 else f"read from the disk for {percent} % of the rows"


def alike(mine: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> tuple[Sequence[RunRecord], Sequence[RunRecord]]:
    """Of two arms' runs those that did the same, in the way that most of them have in common; none where none has."""
    counts = [Counter(map(way_of, each)) for each in (mine, theirs)]
    common = {way: min(each[way] for each in counts) for way in counts[0] if counts[1][way]}
    if not common:
        return (), ()
    way = max(common, key=lambda name: (common[name], name))
    ours, others = ([record for record in each if way_of(record) == way] for each in (mine, theirs))
    return ours, others


def prefix_notes(arms: Sequence[Arm]) -> Iterable[str]:
    """Which arms' speeds are of runs that computed, kept or read, where some did other than compute."""
    ways: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for arm in arms:
        for record in timed(arm.telling("train")):
            ways[way_of(record)][arm.name].append(record.seed)
    if set(ways) <= {COMPUTED, UNKNOWN}:
        return
    seeds = {arm.name: {record.seed for record in timed(arm.telling("train"))} for arm in arms}
    told = []
    for way, names in ways.items():
        listed = [
            name if set(of) == seeds[name] else f"{name} (seed {', '.join(map(str, sorted(set(of))))})"
            for name, of in sorted(names.items())
        ]
        told.append(f"{way} in {', '.join(listed)}")
    yield f"Training speed: what frozen blocks give was {'; '.join(told)}. Reading it is faster, whatever the arm."


def timed(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Those of runs whose speed is known."""
    return [record for record in records if record.value(SPEED) is not None]
