"""Experiment trackers, by accelerate's wrappers of them: what training says of each step goes there too, on request.

A tracker is begun when there is something to log, and a resumed run goes on in the log of the stopped one. Nothing of
it is imported where none is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kallm_bench.errors import KallmError, TrainingError, unknown
from kallm_bench.files import explained, write_file
from kallm_bench.progress import Log

PROJECT = "kallm"
"""What runs are filed under where a tracker has projects or experiments."""


@dataclass(frozen=True)
class _Run:
    """A run that is tracked, and the first step that is logged this time."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    step: int

    @property
    def remembered(self) -> Path:
        """The file that says as what MLflow knows this run."""
        return self.folder / self.name / "mlflow-run"


def _tensorboard(run: _Run) -> dict[str, Any]:
    """`purge_step` hides what a killed run logged after its last state."""
    return {"run_name": run.name, "logging_dir": str(run.folder), "purge_step": run.step or None}


def _wandb(run: _Run) -> dict[str, Any]:
    return {
        "run_name": PROJECT, "name": run.name, "id": run.name[-64:], "resume": "allow", "dir": str(run.folder),
        "config": dict(run.settings),
    }  # fmt: skip


def _trackio(run: _Run) -> dict[str, Any]:
    return {"run_name": PROJECT, "name": run.name, "resume": "allow", "config": dict(run.settings)}


def _mlflow(run: _Run) -> dict[str, Any]:
    known = run.remembered.read_text(encoding="utf-8") if run.remembered.is_file() else None
    return {"experiment_name": PROJECT, "run_name": run.name, "run_id": known}


TRACKERS: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}
"""Names of trackers, which are those of their packages too, and what accelerate's wrapper of each is made with."""


def check_trackers(names: Sequence[str]) -> None:
    """Asks whether there are such trackers here. TrainingError, with what to install, if not."""
    for name in names:
        if name not in TRACKERS:
            raise TrainingError(unknown("tracker", name, TRACKERS))
        if importlib.util.find_spec(name) is None:
            raise TrainingError(f"--track {name} needs a package that is not installed: pip install {name}")


@contextmanager
def tracking(
    names: Sequence[str], run: str, folder: Path, settings: Mapping[str, Any], *, on_cpu: bool
) -> Iterator[Log]:
    """Yields the Log that tells all these trackers.

    Args:
        names: keys of TRACKERS, checked before.
        run: the same name for a run that goes on.
        folder: where trackers that write files shall write them.
        settings: of the run, which JSON can hold.

    Raises:
        DiskError: the disk refused what a tracker wrote; from the Log too.
        TrainingError: the same of all else that a tracker raises, such as that it wants a login, or finds no server.
    """
    begun: dict[str, Any] = {}

    def log(step: int, figures: Mapping[str, float]) -> None:
        for name in names:
            with _told(name, folder):
                if name not in begun:
                    begun[name] = _begin(name, _Run(run, folder, settings, step), on_cpu)
                begun[name].log(dict(figures), step=step)

    with _quiet_writers():
        try:
            yield log
        finally:
            for name, each in begun.items():
                with _told(name, folder):
                    each.finish()


@contextmanager
def _told(name: str, folder: Path) -> Iterator[None]:
    """Turns whatever a tracker raises into one line."""
    try:
        with explained(folder):
            yield
    except KallmError:
        raise
    except Exception as error:  # they have errors of their own, which only they know
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TrainingError(f"--track {name}: {reason}") from error


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Shows no traceback of a thread that the disk refused: the tracker raises what it died of when it is used next."""
    before = threading.excepthook
    threading.excepthook = lambda died: None if isinstance(died.exc_value, OSError) else before(died)
    try:
        yield
    finally:
        threading.excepthook = before


def _begin(name: str, run: _Run, on_cpu: bool) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=on_cpu)  # accelerate's loggers want it
    tracker = LOGGER_TYPE_TO_CLASS[name](**TRACKERS[name](run))
    tracker.start()
    if name == "tensorboard" and not run.step:
        tracker.log({"settings": json.dumps(run.settings, indent=1, default=str)}, step=0)
    if name == "mlflow":
        if not run.remembered.is_file():
            tracker.store_init_configuration(dict(run.settings))
        write_file(run.remembered, tracker.tracker.info.run_id.encode())
    return tracker
