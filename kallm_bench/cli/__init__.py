"""The command line: parse, call one function, show what came back. Heavy imports stay inside the commands."""

from kallm_bench.cli.application import app
from kallm_bench.cli.leaving import main

__all__ = ["app", "main"]
