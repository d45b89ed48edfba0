"""The console script: runs the application, and leaves with a code and at most one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

from kallm_bench import console
from kallm_bench.cli.application import app
from kallm_bench.errors import Interrupted, KallmError, LeftAloneError
from kallm_bench.interrupts import Stop, ignore_signals, stop_on_signals


def main() -> NoReturn:
    """The console script: 0 fine, 1 the user's input or environment, 2 usage, 128 + signal when stopped."""
    stop_on_signals()
    console.prepare()
    try:
        Path.cwd()
        code = app(standalone_mode=False)
    except Interrupted as stopped:
        _leave(f"Stopped: {stopped}. The same command goes on from there.", stopped.exit_code)
    except Stop as stop:
        _leave("Stopped. What was finished is kept; the same command goes on from there.", 128 + stop.number)
    except KallmError as error:
        if not _follows():
            console.fail(str(error))
        elif not isinstance(error, LeftAloneError):  # whoever left has said why
            console.fail(f"process {os.environ['RANK']}: {error}")
        sys.exit(1)
    except typer.Exit as leaving:
        sys.exit(leaving.exit_code)
    except Exception as error:  # looked at for what can be said in one line; all else keeps its traceback
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # usage, as click tells it
            error.show()
            sys.exit(error.exit_code)
        if reason := _environment(error):
            console.fail(reason)
            sys.exit(1)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _leave(message: str, code: int) -> NoReturn:
    ignore_signals()  # an impatient second one would only add a traceback
    if not _follows():
        console.tell(message)
    sys.exit(code)


def _follows() -> bool:
    """Whether this is one of several processes, and not the first, which speaks for all."""
    return int(os.environ.get("RANK") or 0) > 0


def _environment(error: Exception) -> str:
    """One line for what no code of ours can foresee or mend: no memory left, no current folder. Else empty."""
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "t allocate memory" in str(error)
    ):
        return "out of memory. A smaller --batch-size, --hidden, --length or --row-length needs less"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "the current folder does not exist any more; go to another one"
    return ""
