"""A record: what one stage did, with what, on which machine, and what came out. One JSON file, never changed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kallm_bench.errors import RecordError
from kallm_bench.records.metrics import kind_of

SCHEMA = 1

OTHERS = "other process"
"""Stands in the note of a metric that was measured while others used the GPU or the CPU."""

WIDE_SPREAD = 0.03
"""A spread of samples above this is told beside the value."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Args:
        name: a key of METRICS, with a part after a slash where there are several of its kind.
        value: None where it could not be measured; `note` then says why.
        n: how many observations it rests on.
        samples: the observations, where they are few enough to keep.
        note: what a reader should know beside the number, such as a wide spread.
    """

    name: str
    value: float | None
    n: int = 1
    samples: Sequence[float] = ()
    note: str = ""

    @property
    def spread(self) -> float:
        """The range of the samples over the value; 0 where there is none."""
        return (max(self.samples) - min(self.samples)) / self.value if self.samples and self.value else 0.0

    def to_json(self) -> dict[str, Any]:
        unit = kind_of(self.name).unit
        data = {"name": self.name, "value": self.value, "unit": unit, "n": self.n, "samples": list(self.samples)}
        return data | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Artifact:
    """A file that a stage left in the runs folder, which is not part of the record's evidence but of the next stage."""

    path: str
    sha256: str


@dataclass(frozen=True)
class RunRecord:
    """One stage of one cell.

    Args:
        id: unique; begins with the time it started.
        stage, suite, arm, seed, testbed: what ran, for which cell, where.
        started, seconds: UTC, and how long it took; of a reused one, when it was filed again.
        parents: ids of the records whose result it started from.
        settings: everything that decides the result, "weights" being the fingerprint of the model it started from.
        key: hash under which the stage is found again, see settings_key.
        model: {source, fingerprint, parameters, trainable_parameters, specs} after the stage; empty where it has none.
        data: {source, fingerprint} of conversations or questions; empty where there are none.
        metrics, environment, artifacts: what was measured, with what, and the files that were left.
        reused: id of the record that this one repeats for another cell, where the work was already done.
    """

    id: str
    stage: str
    suite: str
    arm: str
    seed: int
    testbed: str
    started: str
    seconds: float
    parents: tuple[str, ...]
    settings: dict[str, Any]
    key: str
    model: dict[str, Any]
    data: dict[str, Any]
    metrics: tuple[Metric, ...]
    environment: dict[str, Any]
    artifacts: tuple[Artifact, ...] = ()
    reused: str = ""
    schema: int = field(default=SCHEMA)

    def value(self, name: str) -> float | None:
        """The value of the metric called `name`; None where the stage did not measure it."""
        return next((metric.value for metric in self.metrics if metric.name == name), None)

    def to_json(self) -> str:
        """The file's text.

        Raises:
            RecordError: a metric that METRICS does not know, or a number that JSON does not.
        """
        for metric in self.metrics:
            try:
                kind_of(metric.name)
            except KeyError:
                raise RecordError(f"no metric '{metric.name}' in the table of metrics") from None
            if metric.value is not None and not math.isfinite(metric.value):
                raise RecordError(f"metric '{metric.name}' is {metric.value}")
        fields = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        fields["metrics"] = [metric.to_json() for metric in self.metrics]
        fields["artifacts"] = [dataclasses.asdict(artifact) for artifact in self.artifacts]
        ordered = {"schema": fields.pop("schema"), **fields}
        return json.dumps(ordered, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """The record that `to_json` wrote.

        Raises:
            RecordError: not a record, or one of another schema; says which.
        """
        try:
            data = json.loads(text)
            check_types(data, RunRecord, "the record")
            schema = data["schema"]
            if schema != SCHEMA:
                newer = "; a newer kallm reads it" if schema > SCHEMA else ""
                raise RecordError(f"written in schema {schema}, this program reads {SCHEMA}{newer}")
            data["metrics"] = tuple(
                Metric(m["name"], m["value"], m["n"], tuple(m["samples"]), m.get("note", "")) for m in data["metrics"]
            )
            data["artifacts"] = tuple(Artifact(**artifact) for artifact in data["artifacts"])
            data["parents"] = tuple(data["parents"])
            record = cls(**data)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecordError(f"not a record: {error}") from error
        missing = NEEDED.get(record.stage, set()) - set(record.settings)
        if missing:
            raise RecordError(f"not a record: its settings lack {', '.join(sorted(missing))}")
        return record


NEEDED = {
    "retrofit": {"spec"},
    "train": {"row_length", "rows_per_step", "learning_rate", "scope"},
    "eval-bbh": {"protocol", "tasks", "max_new_tokens"},
    "kernels": {"tokens", "in_features", "out_features", "basis", "device", "dtype"},
}
"""Settings that a record of each stage is read by."""

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "tuple": list, "dict": dict, "Sequence": list}


@functools.cache
def _fields(kind: type) -> list[tuple[str, Any, bool]]:
    """(name, types that JSON may give it, whether null will do) of each field of a dataclass."""
    written = [(entry.name, str(entry.type)) for entry in dataclasses.fields(kind)]
    return [(name, _KINDS[of.partition("[")[0].partition(" ")[0]], "None" in of) for name, of in written]


def check_types(data: Any, kind: type, where: str, number: int = -1) -> None:
    """Refuses JSON that a dataclass of records cannot be made of, with the field's name: TypeError."""
    if not isinstance(data, dict):
        raise TypeError(f"{_place(where, number)} is no JSON object")
    shape = (kind, *data, *map(type, data.values()))
    if shape not in _GOOD:
        for name, types, nullable in _fields(kind):
            value = data.get(name, _MISSING)
            if value is _MISSING or (value is None and nullable):
                continue  # what is missing is found when the record is made
            if isinstance(value, bool) or not isinstance(value, types):
                raise TypeError(f"{_place(where, number)}: {name} is {str(value)[:40]}")
        _GOOD.add(shape)
    for name, part in (("metrics", Metric), ("artifacts", Artifact)) if kind is RunRecord else ():
        for place, each in enumerate(data.get(name, [])):
            check_types(each, part, name, place)


def _place(where: str, number: int) -> str:
    return where if number < 0 else f"{where}[{number}]"


_MISSING = object()

_GOOD: set[tuple[Any, ...]] = set()
"""Names and types that were found right: of thousands of metrics nearly all are alike."""


def settings_key(stage: str, code: int, settings: dict[str, Any], parents: Sequence[str]) -> str:
    """The key under which a stage's result is found again.

    Args:
        stage, code: the stage and the integer version of its code, raised whenever a change of code changes results.
        settings: JSON-able; the fingerprint of the weights it starts from among them, so that a retrained model never
            meets old answers.
        parents: keys of the records it builds on.
    """
    text = json.dumps([stage, code, settings, list(parents)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
