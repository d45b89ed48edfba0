"""Every error a user can cause.

    KallmError
    ├── SpecError         a retrofit that cannot be: unknown basis, degree, blocks, form
    ├── ModelError        a model that cannot be had: no such folder, hub id, GGUF file
    ├── CheckpointError   a checkpoint that is damaged, unknown, or would be overwritten
    │   └── RemadeError        weights that were gone came out otherwise when they were made again
    ├── DataError         training data that is missing, empty or malformed
    ├── BBHError          questions or tasks that are missing or malformed
    ├── SuiteError        a suite file that does not read
    ├── RecordError       a results store that cannot be read or written
    ├── TrainingError     training that cannot go on
    │   └── LeftAloneError     another process of the run has ended
    └── DeviceError       a device or dtype that is not there

The command line shows each as one line and leaves with 1. `Interrupted` is no error: work was saved, the exit code is
128 + the signal's number. Everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KallmError(Exception):
    """What was wrong, which value, and what would be right, in one line."""


class SpecError(KallmError):
    pass


class ModelError(KallmError):
    pass


class CheckpointError(KallmError):
    pass


class RemadeError(CheckpointError):
    pass


class DataError(KallmError):
    pass


class BBHError(KallmError):
    pass


class SuiteError(KallmError):
    pass


class RecordError(KallmError):
    pass


class TrainingError(KallmError):
    pass


class LeftAloneError(TrainingError):
    pass


class DeviceError(KallmError):
    pass


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked to stop; what was done is saved.

    Args:
        signal_number: the signal, e.g. signal.SIGINT.
        saved: what stands on disk now, for the user.
    """

    def __init__(self, signal_number: int, saved: str) -> None:
        super().__init__(saved)
        self.exit_code = 128 + signal_number


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist: with the nearest one if one is near, else with all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(names)}." if names else "There is none."
    return f"no {what} '{value}'. {hint}"
