"""Where everything is printed: results to standard output, errors and how work goes to standard error."""

from __future__ import annotations

import functools
import io
import json
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

_console = functools.partial(Console, highlight=False, markup=False, emoji=False)  # names are shown as users wrote them
out = _console(soft_wrap=not sys.stdout.isatty())
err = _console(stderr=True)


def prepare() -> None:
    """Lets a terminal that is not in UTF-8 show a question mark, instead of failing, for what it cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def say(text: str) -> None:
    """One line of result."""
    out.print(text)


def tell(text: str) -> None:
    """One line about how the work goes."""
    err.print(text, style="dim", soft_wrap=True)


def stream(text: str) -> None:
    """A piece of generated text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def fail(message: str) -> None:
    """The one line of an error."""
    err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def show_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
