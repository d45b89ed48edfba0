"""What a table's figures do not say: which questions, which data, which machine, what is missing, what differs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from kallm_bench.records import RunRecord, kind_of
from kallm_bench.reporting.arms import SHARED, Arm
from kallm_bench.reporting.chance import EXPLAINED
from kallm_bench.reporting.controls import missing_controls
from kallm_bench.reporting.prefixes import prefix_notes
from kallm_bench.reporting.table import Figure


def notes(suite: str, testbed: dict[str, Any], arms: Sequence[Arm], figures: Sequence[Figure]) -> Iterable[str]:
    """The notes below a table, the most important first.

    Args:
        testbed: what testbed.json says.
        figures: those that stand in the table.
    """
    marks = {figure.mark for figure in figures}
    yield from _question_notes(arms)
    yield from _likelihood_notes(arms)
    yield from _training_notes(arms)
    yield from (text for mark, text in EXPLAINED.items() if mark in marks)
    yield from _interval_notes(figures)
    yield from _seed_notes(arms)
    if missing := list(missing_controls(arms)):
        yield f"Not in this suite: {'; '.join(missing)}."
    yield from _variant_notes(arms)
    yield from _difference_notes(arms)
    yield from prefix_notes(arms)
    if SHARED in marks:
        meanwhile = "Other processes computed on the machine meanwhile"
        yield f"{SHARED} {meanwhile}: such a speed has no interval, and is set beside no other."
    yield from _undisturbed_notes(arms)
    yield from _measurement_notes(arms)
    yield place(testbed, [record for arm in arms for records in arm.stages.values() for record in records])
    if suite != "manual":
        records = [record for arm in arms for each in arm.stages.values() for record in each]
        yield f"Run it again: `kallm run {named_suite(records) or suite}`; this table: `kallm report --suite {suite}`."


def named_suite(records: Sequence[RunRecord]) -> str:
    """How the suite was named when the newest record was made; empty where that was not noted."""
    newest = max(records, key=lambda record: (record.started, record.id))
    return str(newest.environment.get("suite_file") or "")


def _question_notes(arms: Sequence[Arm]) -> Iterable[str]:
    told = set()
    for record in (record for arm in arms for record in arm.stages.get("eval-bbh", [])):
        source, tasks = record.data.get("source"), record.settings["tasks"]
        n = next((metric.n for metric in record.metrics if metric.name == "accuracy"), 0)
        line = (
            f"Accuracy: {source}, {n:,} questions of {len(tasks)} tasks, protocol `{record.settings['protocol']}`, "
            f"{_how(record)}; plain mean over tasks, 95 % bootstrap interval over questions."
        )
        if source == "procedural":
            line += " Procedural questions are generated in BIG-Bench Hard's format and are not BIG-Bench Hard."
        elif len(tasks) < 27:
            line += f" A subset: {', '.join(tasks)}."
        if line not in told:
            told.add(line)
            yield line


def _likelihood_notes(arms: Sequence[Arm]) -> Iterable[str]:
    records = [record for arm in arms for record in arm.stages.get("eval-bbh", [])]
    if any(record.value("target_loglikelihood") is not None for record in records):
        yield (
            "Log-likelihood of the right answer: in nats, where the answer is to begin; plain mean over the tasks that "
            "have choices; [ ] of one seed: 95 % bootstrap interval over questions."
        )
    if any(record.value("likeliest_accuracy") is not None for record in records):
        yield (
            "Right answer likeliest: of the questions that list their choices, those whose right one has the highest "
            "log-likelihood a character; interval and guessing as of accuracy."
        )


def _how(record: RunRecord) -> str:
    reading = record.settings.get("reading", "chat")
    read = "" if reading == "chat" else f", read as `{reading}` has it"
    most = record.settings["max_new_tokens"]
    return (f"greedy, at most {most} new tokens" if most else "the likeliest choice a character") + read


def _training_notes(arms: Sequence[Arm]) -> Iterable[str]:
    told = set()
    for record in (record for arm in arms for record in arm.stages.get("train", [])):
        settings, tokens = record.settings, record.value("trained_tokens") or 0
        if tokens:
            line = (
                f"Training: {tokens:,.0f} tokens of {record.data.get('source')} in rows of {settings['row_length']}, "
                f"{settings['rows_per_step']} a step, peak learning rate {settings['learning_rate']:g}, "
                f"scope `{settings['scope']}`."
            )
            if line not in told:
                told.add(line)
                yield line
    for record in (record for arm in arms for record in arm.stages.get("train", [])):
        n = next((metric.n for metric in record.metrics if metric.name == "class_accuracy"), 0)
        line = (
            f"Accuracy of classes: {n:,} held-out texts, the class given by a head on each text's last token; 95 % "
            "bootstrap interval over texts."
        )
        if n and line not in told:
            told.add(line)
            yield line
    losses = [record for arm in arms for record in arm.stages.get("train", []) if record.value("heldout_loss")]
    if losses:
        counts = {next(metric.n for metric in record.metrics if metric.name == "heldout_loss") for record in losses}
        over = " and ".join(f"{count:,}" for count in sorted(counts))
        yield f"Held-out loss: {kind_of('heldout_loss').unit}, over {over} tokens."


def _interval_notes(figures: Sequence[Figure]) -> Iterable[str]:
    """What stands in brackets or after ± where it is not over questions, which a note of its own tells."""
    over = {figure.over for figure in figures}
    if "seeds" in over:
        yield "[ ] of what is no accuracy: 95 % interval of the mean over seeds, by Student's t."
    if "samples" in over:
        yield (
            "±: half the 95 % interval of the median of one run's samples, by order statistics, of five or fewer half "
            "their range; it says nothing of other runs."
        )


def _seed_notes(arms: Sequence[Arm]) -> Iterable[str]:
    single = dict.fromkeys(arm.name if arm.way else arm.label for arm in arms if arm.seeds == 1)
    if single:
        yield f"One seed only: {', '.join(single)}. Differences between arms say nothing about other seeds."


def _variant_notes(arms: Sequence[Arm]) -> Iterable[str]:
    """Of rows that go by one name, and so were not averaged, in what they differ."""
    for name in dict.fromkeys(arm.name for arm in arms if arm.number and not arm.way):
        flat = {arm.label: _flat(arm) for arm in arms if arm.name == name}
        keys = sorted({key for each in flat.values() for key in each})
        keys = [key for key in keys if len({each.get(key) for each in flat.values()}) > 1]
        told = [label + ": " + ", ".join(f"{key} {each.get(key, '–')}" for key in keys) for label, each in flat.items()]
        yield f"Not averaged, for they differ: {'; '.join(told)}."


def _flat(arm: Arm) -> dict[str, str]:
    """All that seeds must share to be averaged, "stage setting" -> in few letters; and the weights at the start."""
    found = {"weights": _short(arm.base), "stages": "+".join(sorted(arm.stages))}
    for stage, settings in arm.settings.items():
        for key, value in settings.items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            found.update({f"{stage} {key} {part}".rstrip(): _short(each) for part, each in parts})
    return found


def _short(value: Any) -> str:
    """A value as JSON; of a long one, such as a fingerprint, the beginning."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 24 else f"{text[:10]}…"


def _difference_notes(arms: Sequence[Arm]) -> Iterable[str]:
    """Says in which settings the rows of one table differ, beyond what makes them different arms."""
    for stage in ("train", "eval-bbh", "profile"):
        settings = [arm.settings[stage] for arm in arms if stage in arm.settings]
        names = sorted({key for each in settings for key in each})
        different = [key for key in names if len({json.dumps(each.get(key), sort_keys=True) for each in settings}) > 1]
        different = [key for key in different if not (stage == "train" and key == "tokens")]
        if different:
            yield f"Rows differ in {stage} settings: {', '.join(different)}."


RESERVED = ("prefill_tokens_per_second", "decode_tokens_per_second", "train_tokens_per_second")
"""Figures of a table that tell of reservations below it; of their spread they tell themselves."""


def together(reservations: Iterable[str]) -> dict[str, str]:
    """Each reservation -> what stands for it: those that differ in a share of 100 alone are one, with a range."""
    shares: dict[str, set[int]] = {}
    alike = {said: _SHARE.sub("{}", said, count=1) for said in reservations}
    for said, form in alike.items():
        shares.setdefault(form, set()).update(int(share) for share in _SHARE.findall(said)[:1])
    ranges = {
        form: f"{min(of)}% to {max(of)}%" if len(of) > 1 else f"{min(of, default=0)}%" for form, of in shares.items()
    }
    return {said: form.replace("{}", ranges[form]) for said, form in alike.items()}


_SHARE = re.compile(r"\b(\d+)%")


def _undisturbed_notes(arms: Sequence[Arm]) -> Iterable[str]:
    """Which arms' training costs are of some seeds alone, since other runs shared the machine."""
    found: dict[str, list[str]] = {}
    for arm in arms:
        seeds = [record.seed for record in arm.undisturbed]
        if seeds and len(seeds) < len(arm.stages["train"]):
            found.setdefault(f"seed {', '.join(map(str, sorted(seeds)))}", []).append(arm.name)
    if found:
        told = "; ".join(f"{seeds} of {', '.join(dict.fromkeys(names))}" for seeds, names in found.items())
        yield f"Training speed, MFU, memory: of runs that had the machine to themselves, where there are any: {told}."


def _measurement_notes(arms: Sequence[Arm]) -> Iterable[str]:
    noted: dict[str, dict[str, dict[str, None]]] = {}  # reservation -> metric -> arms, in order
    for arm in arms:
        for record in (*arm.telling("train"), *arm.telling("profile")):
            for metric in record.metrics:
                said = [part for part in metric.note.split("; ") if part and not part.startswith("spread")]
                for reservation in said if metric.value is not None and metric.name in RESERVED else ():
                    noted.setdefault(reservation, {}).setdefault(metric.name, {})[arm.name] = None
    stands_for = together(noted)
    merged: dict[str, dict[str, dict[str, None]]] = {}
    for reservation, found in noted.items():
        for name, of_arms in found.items():
            merged.setdefault(stands_for[reservation], {}).setdefault(name, {}).update(of_arms)
    for reservation, metrics in merged.items():
        where = "; ".join(f"{metric} of {', '.join(names)}" for metric, names in metrics.items())
        yield f"Measured with reservations: {reservation} ({where})."


def _machine(testbed: dict[str, Any]) -> str:
    listed = testbed.get("gpus")
    found = [gpu for gpu in listed if isinstance(gpu, dict)] if isinstance(listed, list) else []
    gpus = ", ".join(str(gpu.get("name")) for gpu in found) or "no GPU"
    cores, memory = testbed.get("cores", "?"), testbed.get("memory_gib", "?")
    return f"{testbed.get('cpu', 'unknown')}, {cores} cores, {memory} GiB, {gpus}"


def place(testbed: dict[str, Any], records: Sequence[RunRecord]) -> str:
    """Where records were made: the machine, what computed, the code's commits."""
    states = [state for record in records if (state := record.environment.get("git"))]
    commits = {state["commit"][:10] + (" (changed)" if state.get("dirty") else "") for state in states}
    devices = {
        f"{record.settings['device']} in {record.settings['dtype']}" for record in records if "dtype" in record.settings
    }
    code = f" Code: {', '.join(sorted(commits))}." if commits else ""
    return f"Machine: {_machine(testbed)}. Computed on {', '.join(sorted(devices))}.{code}"
