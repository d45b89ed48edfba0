"""Stored answers read anew, without a model: another reading of the same replies or likelihoods, as its own record."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

from kallm_bench.bbh.evaluate import answerable, figures, reread
from kallm_bench.bbh.protocols import find_protocol
from kallm_bench.bbh.questions import load_questions
from kallm_bench.bbh.samples import SAMPLE_FIELDS
from kallm_bench.errors import BBHError, unknown
from kallm_bench.filing import CODE, new_id
from kallm_bench.records import ResultsStore, RunRecord, settings_key


def rescore(store: ResultsStore, wanted: str, reading: str | None = None, source: str | None = None) -> RunRecord:
    """Reads the samples of an evaluation anew, and files what they come to beside it.

    Args:
        wanted: the record's id, or how it begins.
        reading: of protocols.READINGS; None for the one it was read in, as it is now.
        source: of the questions it was asked, where that is not what KALLM_BBH_DIR or the hub has.

    Returns:
        The record itself where nothing comes out otherwise; an earlier one of this reading where there is one.

    Raises:
        BBHError: no such evaluation, its samples are gone, or the questions are others; see also evaluate.reread.
    """
    record = _find(store, wanted)
    if record.stage != "eval-bbh":
        raise BBHError(f"record '{record.id}' is of {record.stage}; --rescore reads the answers of an eval-bbh")
    samples = store.samples(record)
    if not samples:
        raise BBHError(f"{store.samples_path(record)} is missing or damaged, and there is nothing else to read")
    settings, protocol = record.settings, find_protocol(record.settings["protocol"])
    now = protocol.find_reading(settings.get("reading"))
    asked_for, reading = settings.get("asked_for", now), protocol.find_reading(reading or now)
    source = source or ("procedural" if record.data.get("source") == "procedural" else None)
    seed = settings.get("questions_seed", 0)
    everything = load_questions(source, settings["tasks"], settings.get("limit"), seed, protocol.tasks)
    if answerable(everything, protocol, asked_for).fingerprint != settings["questions"]:
        raise BBHError(f"{everything.source} has other questions than record '{record.id}'; pass its own as --source")
    whole = [dict.fromkeys(SAMPLE_FIELDS) | {"left_out_tokens": 0, "loglikelihoods": []} | each for each in samples]
    found = reread(whole, everything, protocol, reading, asked_for)
    metrics = tuple(figures(found, answerable(everything, protocol, reading), protocol, reading))
    if reading == now and found == whole and all(record.value(each.name) == each.value for each in metrics):
        return record
    started = datetime.now(UTC)
    settings = settings | {"reading": reading, "asked_for": asked_for, "rescored": record.key}
    key = settings_key("eval-bbh", CODE["eval-bbh"], settings, [record.key])
    if (known := store.find(key, record.testbed, record.suite, record.arm)) and known.metrics == metrics:
        return known
    new = dataclasses.replace(
        record,
        id=new_id(started, "eval-bbh", record.arm, record.seed, key),
        started=started.isoformat(timespec="seconds"),
        seconds=round((datetime.now(UTC) - started).total_seconds(), 3),
        parents=(record.id,),
        settings=settings,
        key=key,
        metrics=metrics,
        reused="",
    )
    store.write(new, found)
    return new


def _find(store: ResultsStore, wanted: str) -> RunRecord:
    found = [record for record in store.records() if record.id.startswith(wanted)]
    exact = [record for record in found if record.id == wanted]
    if len(exact or found) > 1:
        raise BBHError(f"{len(found)} records begin with '{wanted}'; pass more of the id")
    if not found:
        asked = [record.id for record in store.records() if record.stage == "eval-bbh"]
        raise BBHError(unknown(f"record in {store.folder}", wanted, asked))
    return (exact or found)[0]
