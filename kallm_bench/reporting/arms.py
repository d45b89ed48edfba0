"""An arm as a report sees it: the newest record of each stage and seed, of equal settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.records import OTHERS, RunRecord

SPEED = "train_tokens_per_second"

COSTS = (SPEED, "train_mfu", "peak_vram_allocated_bytes", "peak_vram_reserved_bytes", "peak_resident_bytes")
"""What a training run costs; others on the same machine have a part in it."""

SHARED = "§"
"""Marks the speed of training runs that other processes had a part of the machine from."""


@dataclass(frozen=True)
class Sweep:
    """A training's learning rate, and all else that led to its loss, which those at other rates have `alike`."""

    alike: str
    rate: float


@dataclass(frozen=True)
class Arm:
    """Records of one arm that belong together: for each stage one a seed, of equal settings and one line of weights.

    Args:
        again: trainings of the same, done anew when what they had left was gone.
        base: fingerprint of the weights that all of it began from.
        tokens_before: that its weights had been trained for when its own training began.
        number: 1, 2, … where several arms go by this name, else 0.
        way: how its questions were asked, where that alone tells it from the others of its name.
    """

    name: str
    stages: dict[str, list[RunRecord]]
    again: tuple[RunRecord, ...] = ()
    base: str = ""
    tokens_before: float = 0.0
    number: int = 0
    way: str = ""

    @property
    def label(self) -> str:
        return labelled(self.name, self.number, self.way)

    @functools.cached_property
    def specs(self) -> list[dict[str, Any]]:
        """The specs of its retrofits, in order; empty where nothing was replaced."""
        for stage in ("profile", "eval-bbh", "train"):
            for record in self.stages.get(stage, []):
                if (specs := record.model.get("specs")) is not None:
                    return list(specs)
        return [record.settings["spec"] for record in self.stages.get("retrofit", [])[:1]]

    @property
    def spec(self) -> dict[str, Any] | None:
        """The last of them."""
        return self.specs[-1] if self.specs else None

    @functools.cached_property
    def replaced_parameters(self) -> float:
        records = [record for stage in ("retrofit", "profile") for record in self.stages.get(stage, [])]
        return next((value for record in records if (value := record.value("replaced_parameters"))), 0.0)

    @functools.cached_property
    def undisturbed(self) -> list[RunRecord]:
        """The newest training of each seed that had the machine to itself."""
        runs = sorted((*self.stages.get("train", []), *self.again), key=lambda record: (record.started, record.id))
        return list({record.seed: record for record in runs if alone(record)}.values())

    def telling(self, stage: str, metric: str = SPEED) -> list[RunRecord]:
        """The records that tell a figure: what training costs, those of undisturbed runs where there are any."""
        if (stage, metric in COSTS) == ("train", True) and self.undisturbed:
            return self.undisturbed
        return self.stages.get(stage, [])

    @property
    def measured(self) -> bool:
        """Whether there is more to tell than that a checkpoint was made."""
        return any(self.stages.get(stage) for stage in ("train", "eval-bbh", "profile"))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What its rows must share to be averaged, by stage."""
        return {stage: comparable(records[0]) for stage, records in self.stages.items() if records}

    @property
    def sweep(self) -> Sweep | None:
        """None where it was not trained."""
        settings = {stage: dict(self.settings[stage]) for stage in ("retrofit", "train") if stage in self.settings}
        rate = settings.get("train", {}).pop("learning_rate", None)
        alike = json.dumps([settings, self.base, self.tokens_before], sort_keys=True)
        return Sweep(alike, float(rate)) if isinstance(rate, int | float) else None

    @property
    def seeds(self) -> int:
        return len({record.seed for stage, records in self.stages.items() if stage != "retrofit" for record in records})


def alone(record: RunRecord) -> bool:
    """Whether a training had the machine to itself, as far as its record tells."""
    speed = next((metric for metric in record.metrics if metric.name == SPEED and metric.value is not None), None)
    return speed is not None and OTHERS not in speed.note


def labelled(name: str, number: int, way: str) -> str:
    """The name, and what tells it from others like it: how questions were asked if that does, else a number."""
    return f"{name} ({way or number})" if number else name


def asked_how(records: Sequence[RunRecord]) -> str:
    """Protocol, reading where it is none of its own, and questions where they are not BIG-Bench Hard's."""
    if not records:
        return ""
    settings, source = records[0].settings, records[0].data.get("source")
    parts = [settings.get("protocol"), settings.get("reading"), source if source != "BIG-Bench Hard" else None]
    return ", ".join(dict.fromkeys(str(part) for part in parts if part))


def comparable(record: RunRecord) -> dict[str, Any]:
    """A record's settings less what differs between seeds by nature, the seed and the weights.

    Nor does it matter whether likelihoods were computed besides the same replies.
    """
    left_out = ("seed", "weights", "likelihoods")
    settings = {key: value for key, value in record.settings.items() if key not in left_out}
    if "spec" in settings:
        settings["spec"] = {key: value for key, value in settings["spec"].items() if key != "seed"}
    return settings


def variants(name: str, records: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> list[Arm]:
    """The arms that go by one name: seeds of equal settings together, another way of asking apart.

    Of each stage and seed the newest record counts; of evaluations, the newest for each way of asking. Evaluations and
    profiles of other weights than the newest training left are not of this arm any more. Where the newest training was
    done before, with equal settings from equal weights, the newest of them that was asked stands for it, and a profile
    may be of any: what a model costs depends on no rounding.

    Args:
        records: of one suite and testbed, oldest first.
        known: every record there is, by id, to follow parents in.
    """
    found: dict[str, dict[str, list[list[RunRecord]]]] = defaultdict(lambda: defaultdict(list))
    again: list[RunRecord] = []
    mine = [record for record in records if record.arm == name]
    for seed in sorted({record.seed for record in mine}):
        of_this = [record for record in mine if record.seed == seed]
        newest = {record.stage: record for record in of_this}
        trained = _alike(newest.get("train"), of_this)
        newest |= {"train": _asked(trained, of_this)} if trained else {}
        weights = _weights(newest)
        asked = _answers([r for r in of_this if r.stage == "eval-bbh" and r.settings.get("weights") == weights])
        same = {weights, *map(_left, trained)}
        profiled = [r for r in of_this if r.stage == "profile" and r.settings.get("weights") in same][-1:]
        again += [record for record in trained if record is not newest["train"]]
        base = [newest["train"]] if "train" in newest else []
        for answers in [[each] for each in asked] or [[]]:
            line = [*base, *answers, *profiled]
            of_seed = [*_retrofits(line or list(newest.values()), known), *line]
            if not of_seed:  # a model that others were made from
                continue
            alike = [record for record in of_seed if record.stage != "profile"]
            found[_signature(alike) + _base(of_seed, known)][_signature(profiled)].append(of_seed)
    several = [seeds for profiled in found.values() for seeds in _with_unprofiled(profiled)]
    arms = [arm for seeds in several if (arm := _arm(name, seeds, again, known)).measured]
    if len(arms) < 2:
        return arms
    ways = [asked_how(arm.stages.get("eval-bbh", [])) for arm in arms]
    tell = all(ways) and len(set(ways)) == len(ways)
    return [
        dataclasses.replace(arm, number=number, way=way if tell else "")
        for number, (arm, way) in enumerate(zip(arms, ways, strict=True), start=1)
    ]


ASKED = ("protocol", "tasks", "questions", "max_new_tokens", "device", "dtype")
"""Settings that make an evaluation another one, and have been noted from the first on."""


def _answers(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The newest evaluation for each way of asking; of `records`, oldest first.

    The earliest ones noted neither reading nor prompts: they count where nothing newer was asked the same.
    """
    found: dict[str, dict[str, RunRecord]] = defaultdict(dict)
    for record in records:
        settings = record.settings
        same = {name: settings.get(name) for name in ASKED}
        same |= {"reading": settings.get("reading") or settings.get("protocol")}
        same |= {"batch_invariant": bool(settings.get("batch_invariant"))}
        found[json.dumps(same, sort_keys=True)][settings.get("prompts") or ""] = record
    for by_prompts in found.values():
        if len(by_prompts) > 1:
            by_prompts.pop("", None)
    return [record for by_prompts in found.values() for record in by_prompts.values()]


def _with_unprofiled(found: dict[str, list[list[RunRecord]]]) -> list[list[list[RunRecord]]]:
    """Seeds alike in all but their profiles, by these; a seed without one belongs to the first: speed knows no seed."""
    unprofiled = found.pop(_signature([]), [])
    groups = list(found.values())
    if not groups:
        return [unprofiled]
    groups[0].extend(unprofiled)
    return [sorted(seeds, key=lambda seed: seed[0].seed) for seeds in groups]


def _weights(newest: Mapping[str, RunRecord]) -> str | None:
    """The weights that a row is about: what training left, else what was asked or profiled last."""
    if "train" in newest:
        return _left(newest["train"])
    last = max(newest.values(), key=lambda record: (record.started, record.id))
    return last.settings.get("weights")


def _left(trained: RunRecord) -> str:
    """The weights that a training left."""
    return str(trained.model.get("fingerprint"))


def _alike(trained: RunRecord | None, records: Sequence[RunRecord]) -> list[RunRecord]:
    """A training and those that were the same, oldest first."""
    return [record for record in records if trained and record.stage == "train" and record.key == trained.key]


def _asked(trained: Sequence[RunRecord], records: Sequence[RunRecord]) -> RunRecord:
    """The newest of equal trainings whose weights were asked, else the newest."""
    asked = {record.settings.get("weights") for record in records if record.stage == "eval-bbh"}
    return next((record for record in reversed(trained) if _left(record) in asked), trained[-1])


def _retrofits(records: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> list[RunRecord]:
    """The last retrofit that led to these records, found by following their parents."""
    for record in records:
        while record is not None:
            if record.stage == "retrofit":
                return [record]
            record = known.get(record.parents[-1]) if record.parents else None  # type: ignore[assignment]
    return []


def _base(records: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> str:
    """The weights that the first stage of all began from; empty where that has no record here."""
    record = records[0]
    while record.parents:
        if record.parents[0] not in known:
            return ""
        record = known[record.parents[0]]
    return str(record.settings.get("weights", ""))


def _tokens_before(records: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> float:
    """The tokens of all trainings that led to this one, found by following its parents."""
    trained = next((record for record in records if record.stage == "train"), None)
    found = 0.0
    while trained and trained.parents and (trained := known.get(trained.parents[-1])):
        found += (trained.value("trained_tokens") or 0.0) if trained.stage == "train" else 0.0
    return found


def _arm(name: str, seeds: list[list[RunRecord]], again: Sequence[RunRecord], known: Mapping[str, RunRecord]) -> Arm:
    stages: dict[str, list[RunRecord]] = defaultdict(list)
    for record in itertools.chain.from_iterable(seeds):
        stages[record.stage].append(record)
    keys = {record.key for record in stages["train"]}
    again = tuple(record for record in again if record.key in keys)
    return Arm(name, dict(stages), again, _base(seeds[0], known), _tokens_before(seeds[0], known))


def _signature(records: Sequence[RunRecord]) -> str:
    return json.dumps({record.stage: comparable(record) for record in records}, sort_keys=True)


def what_it_is(arm: Arm) -> str:
    """What the arm is, from the specs of its retrofits, and how it was taught, where that was in no plain way."""
    trained = any((record.value("trained_tokens") or 0) > 0 for record in arm.stages.get("train", []))
    lora = _lora(arm) if trained else ""
    if arm.specs:
        what = "; then ".join(_described(spec) for spec in arm.specs) + (f", {lora}" if lora else "")
    else:
        what = f"{lora or 'fine-tuned'}, nothing replaced" if trained else "untouched"
    return "; ".join([what, *_taught(arm)])


def _lora(arm: Arm) -> str:
    """The low-rank adapters that it was trained with, in words; empty where it was without."""
    settings = arm.settings["train"]
    if settings.get("scope") != "lora":
        return ""
    targets = settings["lora_targets"]
    return f"LoRA of rank {settings['lora_rank']}" + (f" on {' and '.join(targets)}" if targets else "")


def _taught(arm: Arm) -> list[str]:
    """How a curriculum and a teacher took part, in words."""
    settings = arm.settings.get("train", {})
    curriculum, distillation = settings.get("curriculum") or {}, settings.get("distillation")
    words = {
        "start_degree": "degree rising from {}",
        "stages": "replaced block by block, {}",
        "anneal": "annealed from the original's output, {}",
    }
    found = [text.format(curriculum[key]) for key, text in words.items() if curriculum.get(key) is not None]
    if distillation:
        found.append(f"distilled, weight {distillation['weight']:g} at temperature {distillation['temperature']:g}")
    return found


TARGETS = {
    "linears": "each linear layer in the feed-forward of ",
    "attention": "each linear layer in the attention of ",
    "linears+attention": "each linear layer in the attention and the feed-forward of ",
}
"""How a retrofit of single layers says where it is."""


def _described(spec: dict[str, Any]) -> str:
    where = TARGETS.get(spec.get("target", "feedforward"), "")
    blocks = f"{where}blocks {_ranges(spec['blocks'])}"
    if spec["basis"] == "drop":
        return f"no feed-forward in {blocks}"
    if spec["basis"] == "linear":
        hidden = f"hidden {spec['hidden']}" if spec["hidden"] else "full width"
        kind = "linear restart" if spec.get("start", "random") == "random" else "linear"
        if spec.get("activation") == "drop":
            hidden += ", no activation"
        return f"{kind}, {hidden}, {blocks}{_started(spec)}"
    degree = f" degree {spec['degree']}" if spec["degree"] is not None else ""
    hidden = f", hidden {spec['hidden']}" if spec["hidden"] else ""
    extras = ", constant per edge" if spec["constant"] == "edge" else ""
    extras += ", linear path" if spec.get("linear") else ""
    extras += f", {spec['groups']} groups" if spec.get("groups") else ""
    extras += ", up path too" if spec.get("up") else ""
    extras += ", no activation" if spec.get("activation") == "drop" else ""
    if (rank := spec.get("rank")) is not None:
        return f"{spec['basis']}{degree} {spec['form']}, rank {rank}{extras}, beside {blocks}"
    form = "" if where else f", {spec['form']}"
    return f"{spec['basis']}{degree}{form}{hidden}{extras}, {blocks}{_started(spec)}"


def _started(spec: dict[str, Any]) -> str:
    start = spec.get("start", "random")
    steps = f" {spec.get('start_steps', 400)} steps" if "distill" in start or "sequence" in start else ""
    return "" if start == "random" else f", start {start}{steps}"


def _ranges(numbers: Iterable[int]) -> str:
    """ "0,3,5-7" from 0, 3, 5, 6, 7."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(parts)
