"""Runs `kallm` many times at the cost of one start: imports once, then forks a process for each command.

Reads lines of JSON, each a list of commands that run side by side, and answers each by a line with their exit codes,
outputs and errors. Those that end leave the number of their moments in the file "moments" of their folder. A command is
{"words": [...], "folder": ..., "environment": {...}} and may have
    "signal_at": [n, number]    it sends itself this signal at its n-th moment (see `moments`)
    "signal_after": [n, number] the same after its n-th step
    "largest_file": bytes       the system lets no file grow beyond, as a full disk would
    "patience": seconds         after which it is killed, its exit code then being None
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import kallm_bench.engine  # noqa: F401 - so that no command has to
from kallm_bench import cli, console
from kallm_bench.training import loop


def moments(at: int, number: int, *, steps: bool) -> Callable[[], int]:
    """Counts what changes the disk below a run's folders, and what is shown; sends this process a signal at the n-th.

    With `steps`, counts steps of training alone.

    Returns what tells how many there were.
    """
    count = 0

    def one_more() -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)

    def changes(event: str, arguments: tuple[Any, ...]) -> None:
        if steps or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.")):
            path = str(arguments[0]) if arguments else ""
            if any(part in path for part in ("unfinished", "trained", "results", "step-", "state.")):
                one_more()

    show = console.Display.__call__

    def shown(self: Any, work: str, done: int, total: int, note: str = "") -> None:
        show(self, work, done, total, note)
        if work == "training" or not steps:
            one_more()

    sys.addaudithook(changes)
    console.Display.__call__ = shown  # type: ignore[method-assign]
    return lambda: count


def run(command: dict[str, Any], out: Any, err: Any) -> NoReturn:
    """Becomes the command."""
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(command["folder"])
    os.environ.update(command.get("environment", {}))
    loop.SAVE_EVERY_SECONDS, loop.SAVE_SHARE = 0.0, float("inf")
    after_step = "signal_after" in command
    count = moments(*command.get("signal_after" if after_step else "signal_at", (0, 0)), steps=after_step)
    if "largest_file" in command:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest_file"], resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.argv = ["kallm", *command["words"]]
    code = 70
    try:
        cli.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    Path("moments").write_text(str(count()))
    os._exit(code)


def finish(started: dict[int, int], patience: float) -> dict[int, int | None]:
    """Process id -> exit code, minus the signal's number, or None for those that had to be killed here."""
    deadline = time.monotonic() + patience
    codes: dict[int, int | None] = {}
    while len(codes) < len(started):
        for child in set(started) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(0.005)
    return codes


def main() -> None:
    for line in sys.stdin:
        commands = json.loads(line)
        started, files = {}, []
        for place, command in enumerate(commands):
            files.append((tempfile.TemporaryFile(), tempfile.TemporaryFile()))  # noqa: SIM115 - closed below
            child = os.fork()
            if child == 0:
                run(command, *files[place])
            started[child] = place
        codes = finish(started, max(command.get("patience", 60.0) for command in commands))
        answer: list[Any] = [None] * len(commands)
        for child, place in started.items():
            texts = []
            for file in files[place]:
                file.seek(0)
                texts.append(file.read().decode())
                file.close()
            answer[place] = [codes[child], *texts]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # taking all apart takes seconds
