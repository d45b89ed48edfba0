"""How a stage is filed: where it works, which model it starts from, under which key its record is found again.

A stage's key is a hash of its settings, of the record it builds on and of the weights it starts from. Where a record of
that key exists on this testbed, and what it left behind is still on the disk, the stage is not run again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kallm_bench.errors import CheckpointError, RemadeError
from kallm_bench.files import DiskError, check_writable, only_one, sha256
from kallm_bench.models import Source, find_model, read_base, read_lineage, specs_of
from kallm_bench.profiling import environment
from kallm_bench.progress import Watch, nobody
from kallm_bench.records import Artifact, Metric, ResultsStore, RunRecord, settings_key
from kallm_bench.sharing import Shared
from kallm_bench.training import ALONE, Processes

CODE = {"cut": 1, "retrofit": 1, "train": 2, "eval-bbh": 2, "profile": 4, "kernels": 5}
"""The stages, and the version of each one's code: raise it when a change of code changes results."""


@dataclass(frozen=True)
class Bench:
    """Where work is done and where it is filed.

    Args:
        store, testbed: where records go.
        runs: folder of weights and unfinished work.
        device, dtype: what computes, and in what; training keeps float32 parameters and computes in `dtype`.
        suite, arm, seed: what the records are filed under.
        suite_file: how the user named the suite, so that its report can say how to run it again.
        batch_size: sequences through the model at once; None chooses by device.
        processes: who else does this stage, where it is training; the first one files it.
        sharded: whether they split the model's weights.
        prefix_cache: whether training keeps on disk what frozen blocks give, for other arms and seeds.
        trackers: names in training.TRACKERS, told of every step of training.
        watch: told of progress.
        shared: what other stages of this process have found already.
    """

    store: ResultsStore
    testbed: str
    runs: Path
    device: torch.device
    dtype: torch.dtype
    suite: str = "manual"
    arm: str = ""
    seed: int = 0
    suite_file: str = ""
    batch_size: int | None = None
    processes: Processes = ALONE
    sharded: bool = False
    prefix_cache: bool = False
    keep_weights: bool = True
    trackers: tuple[str, ...] = ()
    watch: Watch = nobody
    shared: Shared = field(default_factory=Shared, compare=False)

    @property
    def autocast(self) -> torch.dtype | None:
        return None if self.dtype == torch.float32 else self.dtype

    @property
    def place(self) -> dict[str, str]:
        """The part of every stage's settings that says on what it computed."""
        return {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class ModelRef:
    """A model that a stage starts from.

    Args:
        name: anything find_model takes.
        fingerprint: of its weights.
        lineage: {"id", "key", "stage"} of the records that led to it, oldest first.
        base: {"source", "fingerprint"} of the model that was retrofitted first.
        before: the model that it was made from, which has the same tokenizer.
        remake: makes the weights again where they are gone.
        trust_remote_code: whether code that comes with the model may run.
    """

    name: str
    fingerprint: str
    lineage: tuple[dict[str, str], ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    before: ModelRef | None = None
    remake: Callable[[], RunRecord] | None = None
    trust_remote_code: bool = False

    @property
    def label(self) -> str:
        """The name without the path to it, for folders and tables."""
        return Path(self.name).name.removesuffix(".gguf")

    def open(self) -> Source:
        """The model on the disk; made again where it is missing or changed, if that is known how.

        Raises:
            RemadeError: it was made again, and is not what it was.
            CheckpointError: it is not what it was.
        """
        source = self._intact()
        if source is None and self.remake is not None:
            made = self.remake()
            source = find_model(str(_folder_of(made)))
        source = source or find_model(self.name, self.trust_remote_code)
        if source.fingerprint != self.fingerprint:
            if self.remake:
                raise RemadeError(
                    f"{self.name} was made again and its files differ from those that were recorded; "
                    "the same command goes on from the new ones"
                )
            raise CheckpointError(f"{self.name} has changed since it was recorded; its weights are not the same")
        return source

    def tokenizer_source(self) -> Source:
        """Where its tokenizer can be read: on the disk, or where it is gone, with the model before. Makes nothing."""
        if self.before is None:
            return self.open()
        return self._intact() or self.before.tokenizer_source()

    def _intact(self) -> Source | None:
        if self.remake is not None and not Path(self.name).is_dir():
            return None
        try:
            source = find_model(self.name, self.trust_remote_code)
        except CheckpointError:
            if self.remake is None:
                raise
            return None
        return source if source.fingerprint == self.fingerprint else None


def find_ref(name: str, trust_remote_code: bool = False) -> ModelRef:
    """A model a user named, and whether its own code may run. Raises as find_model does."""
    source = find_model(name, trust_remote_code)
    lineage, base = tuple(read_lineage(source.folder)), read_base(source.folder)
    if not lineage and not base:  # a path says nothing elsewhere, and does not belong into what is published
        shown = Path(name).name if Path(name).exists() else name
        base = {"source": shown, "fingerprint": source.fingerprint}
    return ModelRef(name, source.fingerprint, lineage, base, trust_remote_code=trust_remote_code)


def ref_after(record: RunRecord, before: ModelRef, remake: Callable[[], RunRecord] | None = None) -> ModelRef:
    """The model that a retrofit or training left, as the next stage's start; `before` itself where it left none."""
    if not record.artifacts:
        return before
    entry = {"id": record.id, "key": record.key, "stage": record.stage}
    lineage, left = (*before.lineage, entry), record.model["fingerprint"]
    return ModelRef(str(_folder_of(record)), left, lineage, before.base, before, remake)


def new_id(started: datetime, stage: str, arm: str, seed: int, key: str) -> str:
    """A record's id: no other has it."""
    return f"{started:%Y%m%dT%H%M%SZ}-{stage}-{arm}-s{seed}-{key[:8]}-{uuid.uuid4().hex[:4]}"


@dataclass
class Stage:
    """One stage about to run: its key, and how its record is written.

    Args:
        bench, ref: where it works and what it starts from; None for a stage that needs no model.
        name: a key of CODE.
        settings: everything that decides its result.
        folder: where it leaves a checkpoint, if it does.
    """

    bench: Bench
    name: str
    settings: dict[str, Any]
    ref: ModelRef | None = None
    folder: Path | None = None
    started: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        if self.ref:
            self.settings = {**self.settings, "weights": self.ref.fingerprint}
        parents = [entry["key"] for entry in self._lineage[-1:]]
        self.key = settings_key(self.name, CODE[self.name], self.settings, parents)

    @property
    def _lineage(self) -> tuple[dict[str, str], ...]:
        return self.ref.lineage if self.ref else ()

    @property
    def arm(self) -> str:
        """What the record is filed under: the suite's arm, else the checkpoint that is made, else the one at hand."""
        return self.bench.arm or (self.folder.name if self.folder else self.ref.label if self.ref else self.name)

    @functools.cached_property
    def id(self) -> str:
        return new_id(self.started, self.name, self.arm, self.bench.seed, self.key)

    @contextmanager
    def claimed(self, weights_needed: bool = True, again: bool = False) -> Iterator[RunRecord | None]:
        """Yields the record where the stage is done, else None with the stage held for this process alone.

        Where another process is at it, waits until that one is done or gone.

        Args:
            weights_needed: whether a record will not do without the weights it left.
            again: whether no record will do, so that None is yielded.
        """
        done = None if again else self._done(weights_needed)
        if done:
            yield done
            return

        def wait() -> None:
            self.bench.watch(f"waiting for another process that does this {self.name}", 0, 0)
            time.sleep(1.0)

        try:
            with only_one(self.bench.runs / "unfinished" / f"{self.key}.lock", wait):
                yield None if again else self._done(weights_needed)
        finally:
            with suppress(OSError):  # what is not empty stays
                (self.bench.runs / "unfinished").rmdir()
                self.bench.runs.rmdir()

    def _done(self, weights_needed: bool) -> RunRecord | None:
        """The record of this very stage, if there is one and what it left behind is still there, unchanged.

        Work that was done for another cell is not done again: its record is filed for this one too, as reused. So is
        work that the cell did before it did something else, so that its newest record is always what it stands for.
        """
        store = self.bench.store
        record = store.find(self.key, self.bench.testbed, self.bench.suite, self.arm)
        if record is None or (weights_needed and not all(_is_intact(each) for each in record.artifacts)):
            return None
        if self.folder and weights_needed and record.artifacts and _folder_of(record) != self.folder:
            return None
        if self._stands(record):
            return record
        again = dataclasses.replace(
            record,
            id=self.id,
            suite=self.bench.suite,
            arm=self.arm,
            seed=self.bench.seed,
            testbed=self.bench.testbed,
            started=self.started.isoformat(timespec="microseconds"),
            reused=record.reused or record.id,
        )
        store.write(again, store.samples(record) or None)
        return again

    def _stands(self, record: RunRecord) -> bool:
        """Whether `record` is what the report takes for this cell and stage: filed for it, and nothing after it."""
        if (record.suite, record.arm) != (self.bench.suite, self.arm):
            return False
        filed = self.bench.store.records(self.bench.suite, self.bench.testbed)
        same = [each for each in filed if (each.arm, each.seed, each.stage) == (self.arm, record.seed, self.name)]
        return not self.bench.arm or same[-1].id == record.id  # outside suites, one arm is asked in many ways

    def may_replace(self, force: bool) -> bool:
        """Whether a checkpoint at `folder` may be replaced: where asked to, or where this very stage made it.

        Raises:
            DiskError: something else stands there. Asked before the work, so that none is done in vain.
        """
        assert self.folder is not None
        lineage = read_lineage(self.folder)
        ours = (self.folder / "kallm.json").is_file()  # --force is for checkpoints: it never removes another folder
        allowed = (force and ours) or bool(lineage and lineage[-1]["key"] == self.key)
        if self.folder.exists() and force and not ours:
            raise DiskError(f"{self.folder} is no kallm checkpoint and is never replaced; pass another --out")
        if self.folder.exists() and not allowed:
            raise DiskError(f"{self.folder} exists; pass --force to replace it, or another --out")
        check_writable(self.folder.parent)
        return allowed

    @property
    def base(self) -> Mapping[str, str]:
        """The model that was retrofitted first."""
        return self.ref.base if self.ref else {}

    def lineage(self) -> tuple[dict[str, str], ...]:
        return (*self._lineage, {"id": self.id, "key": self.key, "stage": self.name})

    def finish(
        self,
        metrics: Sequence[Metric],
        *,
        model: PreTrainedModel | None = None,
        saved: bool = False,
        data: dict[str, Any] | None = None,
        samples: Sequence[dict[str, Any]] | None = None,
    ) -> RunRecord:
        """Writes the record and returns it. `saved`: whether a checkpoint was left in `folder`."""
        folder = self.folder if saved else None
        record = RunRecord(
            id=self.id,
            stage=self.name,
            suite=self.bench.suite,
            arm=self.arm,
            seed=self.bench.seed,
            testbed=self.bench.testbed,
            started=self.started.isoformat(timespec="microseconds"),
            seconds=round((datetime.now(UTC) - self.started).total_seconds(), 3),
            parents=tuple(entry["id"] for entry in self._lineage[-1:]),
            settings=self.settings,
            key=self.key,
            model=_described(self.ref, model, folder, metrics) if self.ref and model is not None else {},
            data=data or {},
            metrics=tuple(metrics),
            environment=environment(self.bench.device)
            | {"batch_size": self.bench.batch_size, "suite_file": self.bench.suite_file}
            | ({"processes": count} if (count := self.bench.processes.count) > 1 else {}),
            artifacts=_artifacts(folder) if folder else (),
        )
        self.bench.store.write(record, samples)
        return record


def _described(ref: ModelRef, model: PreTrainedModel, folder: Path | None, metrics: Sequence[Metric]) -> dict[str, Any]:
    """What a record says of the model after a stage, which may have left it in `folder`."""
    return {
        "source": ref.label,
        "fingerprint": find_model(str(folder)).fingerprint if folder else ref.fingerprint,
        "parameters": parameter_count(model),
        "trainable_parameters": next((each.value for each in metrics if each.name == "trainable_parameters"), None),
        "specs": [spec.to_json() for spec in specs_of(model.config)],
    }


def _folder_of(record: RunRecord) -> Path:
    return Path(record.artifacts[0].path).parent


def _is_intact(artifact: Artifact) -> bool:
    return Path(artifact.path).is_file() and sha256(Path(artifact.path)) == artifact.sha256


def _artifacts(folder: Path) -> tuple[Artifact, ...]:
    return tuple(Artifact(str(path), sha256(path)) for path in sorted(folder.glob("*.safetensors")))


def parameter_count(module: torch.nn.Module) -> int:
    """All values of a module; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())
