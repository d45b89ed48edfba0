"""Records and their store: whole or not at all, never changed, found again by what made them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from kallm_bench.errors import RecordError
from kallm_bench.files import DiskError, write_file
from kallm_bench.records import METRICS, Artifact, Metric, ResultsStore, RunRecord, settings_key
from kallm_bench.records.comparison import mcnemar, sign_flip
from kallm_bench.records.statistics import accuracy_interval, mean_interval
from kallm_bench.reporting import Memory

MACHINE = {"cpu": "a processor", "cores": 2, "memory_gib": 24, "gpus": [], "system": "Linux"}


def a_record(number: int = 0, **changes: object) -> RunRecord:
    record = RunRecord(
        id=f"20260101T0000{number:02d}Z-profile-kan-s0-{number:08x}",
        stage="profile",
        suite="try",
        arm="kan",
        seed=0,
        testbed="local-0",
        started=f"2026-01-01T00:00:{number:02d}+00:00",
        seconds=1.5,
        parents=("before",),
        settings={"batch": 4, "weights": "abc"},
        key=f"{number:064x}",
        model={"source": "bundled", "fingerprint": "abc", "parameters": 10, "trainable_parameters": None},
        data={},
        metrics=(Metric("parameters", 10), Metric("load_seconds", 0.1, n=3, samples=(0.1, 0.1, 0.2), note="noisy")),
        environment={"python": "3.11"},
        artifacts=(Artifact("runs/x/model.safetensors", "00"),),
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    record = a_record()
    path = store.write(record, samples=[{"task": "snarks", "reply": "né"}])
    assert path == tmp_path / "local-0" / "try" / f"{record.id}.json"
    (read,) = store.records()
    assert read.to_json() == record.to_json()
    assert store.samples(read) == [{"task": "snarks", "reply": "né"}]
    units = {metric["name"]: metric["unit"] for metric in json.loads(path.read_text())["metrics"]}
    assert units == {"parameters": "parameters", "load_seconds": "s"}
    with pytest.raises(RecordError, match="never rewritten"):
        store.write(record)


def test_the_newest_record_of_a_key_is_found(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    older, newer = a_record(1, key="k"), a_record(2, key="k")
    store.write(newer)
    store.write(older)
    assert store.find("k", "local-0") == newer
    assert store.find("k", "local-1") is None
    assert store.find("other", "local-0") is None


def test_the_key_depends_on_everything_that_matters() -> None:
    base = ("train", 1, {"a": 1, "b": [2]}, ["p"])
    keys = [
        settings_key(*base),
        settings_key("profile", *base[1:]),
        settings_key("train", 2, *base[2:]),
        settings_key("train", 1, {"a": 1, "b": [3]}, ["p"]),
        settings_key("train", 1, {"a": 1, "b": [2]}, ["q"]),
    ]
    assert len(set(keys)) == len(keys)
    assert settings_key("train", 1, {"b": [2], "a": 1}, ["p"]) == keys[0]


def test_what_does_not_belong_in_a_record_is_refused(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    with pytest.raises(RecordError, match="no metric 'speed'"):
        store.write(a_record(metrics=(Metric("speed", 1.0),)))
    with pytest.raises(RecordError, match="nan"):
        store.write(a_record(metrics=(Metric("accuracy", float("nan")),)))
    assert list(tmp_path.glob("**/*.json")) == []


def test_damaged_and_newer_records_are_set_aside_by_name(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    good = store.write(a_record())
    newer = json.loads(good.read_text()) | {"schema": 99}
    wrong = {"settings": 5, "arm": [], "seed": "0", "metrics": [{"name": "accuracy", "value": "x", "n": 1}]}
    odd = {name: json.dumps(json.loads(good.read_text()) | {name: value}) for name, value in wrong.items()}
    odd["stage"] = json.dumps(json.loads(good.read_text()) | {"stage": "eval-bbh"})
    for name, text in {"cut": good.read_text()[:50], "newer": json.dumps(newer), "other": "[]", **odd}.items():
        (good.parent / f"{name}.json").write_text(text)
    assert len(store.records()) == 1
    reasons = {path.stem: reason for path, reason in store.damaged}
    assert set(reasons) == {"cut", "newer", "other", *odd}
    assert "metrics[0]: value is" in reasons["metrics"]
    assert "settings is" in reasons["settings"]
    assert "protocol" in reasons["stage"]
    assert "schema 99" in reasons["newer"]


def test_merging_two_stores_is_copying_files(tmp_path: Path) -> None:
    one, two = ResultsStore(tmp_path / "one"), ResultsStore(tmp_path / "two")
    one.write(a_record(1))
    two.write(a_record(2, testbed="local-1"))
    shutil.copytree(two.folder, one.folder, dirs_exist_ok=True)
    assert [record.testbed for record in one.records()] == ["local-0", "local-1"]


def test_a_testbed_is_known_again_and_keeps_its_records_when_named(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    name = store.testbed(MACHINE)
    assert name.startswith("local-")
    assert store.testbed(MACHINE) == name
    assert store.testbed(MACHINE | {"cores": 4}) != name
    store.write(a_record(testbed=name))
    assert store.name_testbed(MACHINE, "desk") == "desk"
    assert store.testbed(MACHINE) == "desk"
    assert [record.testbed for record in store.records()] == ["desk"]
    assert store.find(a_record().key, "desk") is not None
    for bad in ("Desk top", "local-x", "../up", ""):
        with pytest.raises(RecordError, match="cannot name"):
            store.name_testbed(MACHINE, bad)
    with pytest.raises(RecordError, match="another testbed"):
        store.name_testbed(MACHINE | {"cores": 4}, "desk")


def test_what_changes_is_told_of_a_testbed_and_makes_no_other_one(tmp_path: Path) -> None:
    store = ResultsStore(tmp_path)
    name = store.testbed(MACHINE, {"driver": "580.1"})
    assert store.describe(name)["driver"] == "580.1"
    assert store.testbed(MACHINE, {"driver": "590.0"}) == store.testbed(MACHINE) == name
    assert store.name_testbed(MACHINE, "desk", {"driver": "590.0"}) == "desk"
    assert store.describe("desk")["driver"] == "580.1"  # as it was when the machine was first met


def test_a_store_that_cannot_be_written_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="part of the path is a file"):
        ResultsStore(tmp_path / "file" / "results").testbed(MACHINE)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """A file-size limit stands in for the disk's end: the write fails half-way, for real."""
    program = f"""
import resource, signal
from pathlib import Path
from kallm_bench.files import DiskError, write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "record.json")!r})
write_file(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_file(path, b"x" * 1_000_000)
except DiskError as error:
    print(error)
assert path.read_bytes() == b"old"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_an_interrupted_write_removes_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x", b"content")
    assert list(tmp_path.iterdir()) == []


def test_every_metric_says_its_unit_and_how_it_is_computed() -> None:
    for name, kind in METRICS.items():
        assert kind.unit, name
        assert kind.computed, name
        assert "/" not in name


def test_the_interval_of_a_mean_is_students() -> None:
    values = [2.389, 2.391, 2.398]
    low, high = mean_interval(values) or (0, 0)
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert mean_interval([1.0]) is None


@pytest.mark.parametrize(
    ("skill", "questions"),
    [((0.3, 0.5, 0.7), 100), ((0.05,) * 8, 8), ((0.02, 0.3, 0.5, 0.5, 0.02, 0.3, 0.5, 0.5), 8)],
    ids=["large", "small and hard", "small and mixed"],
)
def test_the_accuracy_interval_covers_as_often_as_it_says(skill: tuple[float, ...], questions: int) -> None:
    """Simulated: 400 evaluations with known skill; a 95 % interval misses 5 % of the time, and never far more."""
    generator = np.random.default_rng(1)
    truth = sum(skill) / len(skill)
    misses = 0
    for _ in range(400):
        correct = {str(n): generator.random((1, questions)) < share for n, share in enumerate(skill)}
        low, high = accuracy_interval(correct)
        misses += not low <= truth <= high
    assert misses <= 400 * 0.085


def test_an_accuracy_of_nothing_right_is_not_exact() -> None:
    low, high = accuracy_interval({"task": np.zeros((1, 8))})
    assert low == 0
    assert 0.1 < high < 0.3


def test_seeds_are_no_new_questions() -> None:
    """The same answers from three seeds say no more than from one: the interval stays as wide."""
    answers = (np.arange(100) % 2 == 0)[None]
    one = accuracy_interval({"task": answers})
    assert accuracy_interval({"task": np.repeat(answers, 3, axis=0)}) == one
    assert 0.17 < one[1] - one[0] < 0.22  # 2 × 1.96 × √(0.25 / 100)


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    memory, asked = Memory(tmp_path), []

    def known(number: int) -> int | None:
        asked.append(number)
        return number if number else None

    for _ in range(2):
        assert [memory.get(str(number), functools.partial(known, number)) for number in (0, 1, 2, 1)] == [None, 1, 2, 1]
    assert asked == [0, 1, 2, 0], "what came to nothing is asked again, and only that"
    memory.keep()
    assert Memory(tmp_path).get("2", functools.partial(known, 9)) == 2


def test_chances_are_scipys() -> None:
    generator = np.random.default_rng(0)
    for trials in (1, 2, 9, 250):
        ours, theirs = generator.integers(0, 2, (2, trials))
        gained, lost = int(np.sum(ours > theirs)), int(np.sum(ours < theirs))
        expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert mcnemar(ours, theirs) == pytest.approx(expected, rel=1e-12)
        assert sign_flip(ours[None], theirs[None]) == pytest.approx(expected, rel=1e-9)
