"""The application and the list of its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.checkpoints import cut, retrofit
from kallm_bench.cli.looking import bases, generate, inspect
from kallm_bench.cli.machine import doctor, fetch, name_testbed
from kallm_bench.cli.profiling import profile
from kallm_bench.cli.questions import eval_bbh
from kallm_bench.cli.report import show_report
from kallm_bench.cli.suites import run
from kallm_bench.cli.training import train

app = typer.Typer(
    help="Puts Kolmogorov-Arnold networks into language models and finds out, honestly, whether they are worth it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with `kallm run quickstart`. CKPT is a hub id, a folder, a .gguf file, or 'bundled'.",
)


@app.callback(invoke_without_command=True)
def kallm(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        console.say(installed("kallm-bench"))
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "retrofit": retrofit,
    "cut": cut,
    "train": train,
    "eval-bbh": eval_bbh,
    "profile": profile,
    "run": run,
    "report": show_report,
    "inspect": inspect,
    "bases": bases,
    "generate": generate,
    "fetch": fetch,
    "testbed": name_testbed,
    "doctor": doctor,
}
"""By the names that users call them, in the order of --help."""

for name, command in COMMANDS.items():
    app.command(name)(command)
