"""Options that several commands share, and how those that are lists are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="Hub id, folder, .gguf file, or 'bundled'.")]
Out = Annotated[Path | None, typer.Option(help="Checkpoint folder to write; named below runs/ if left out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the folder if it exists.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random start, or of the order of the data.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU, else float32.")]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache",
        help="Keep on disk what frozen blocks give, for other arms and seeds on the same data: about 1 KB a token.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences at once; chosen by device if left out.")]
Track = Annotated[
    str, typer.Option(help="Trackers that training is logged to, with commas: tensorboard, wandb, trackio, mlflow.")
]
Results = Annotated[Path, typer.Option(help="Folder of records.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that CKPT brings; look at it first.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def read_trackers(text: str) -> tuple[str, ...]:
    from kallm_bench.training import check_trackers

    names = tuple(dict.fromkeys(read_names(text, "--track"))) if text else ()
    check_trackers(names)
    return names


def read_names(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter(f"'{text}' names nothing; name something, or leave it out", param_hint=option)
    return names


def read_numbers(text: str, option: str = "--seeds") -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is no list of numbers; write 0,1,2", param_hint=option) from None
