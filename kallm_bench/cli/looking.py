"""Commands that look at what is there: inspect, bases, generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.options import Checkpoint, Device, Dtype, Json, Seed, Trust


def inspect(
    checkpoint: Checkpoint,
    top: Annotated[int, typer.Option(min=1, max=50, help="Most curved functions of each layer to draw.")] = 3,
    fmt: Annotated[str, typer.Option("--format", help="Of the drawing: png, svg.")] = "png",
    out: Annotated[
        Path | None, typer.Option(help="Folder for curves.csv and the drawing; below runs/ if left out.")
    ] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Look at what a KAN learned: energy by basis function, curved and linear edges, the functions themselves.

    kallm inspect runs/... --top 5
    """
    import csv
    import dataclasses
    import io

    from kallm_bench.errors import SpecError, unknown
    from kallm_bench.files import write_file
    from kallm_bench.filing import find_ref
    from kallm_bench.models import load_weights
    from kallm_bench.models.inspect import curves_as_rows, inspect_model
    from kallm_bench.plots import FORMATS, draw_curves

    if fmt not in FORMATS:
        raise SpecError(unknown("format", fmt, FORMATS))
    ref = find_ref(checkpoint, trust_remote_code)
    facts, curves = inspect_model(load_weights(ref.open()), top)
    folder = out or Path("runs") / f"{ref.label}-inspect"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(curves_as_rows(curves))
    write_file(folder / "curves.csv", text.getvalue().encode())
    write_file(folder / f"curves.{fmt}", draw_curves(curves, fmt))
    if as_json:
        console.show_json([dataclasses.asdict(each) for each in facts])
        return
    console.show_rows(
        ("block", "layer", "energy by function", "edges", "linear within 1 %", "median curvature"),
        [
            (
                str(each.block),
                each.layer,
                " ".join(f"{100 * share:.0f}%" for share in each.energy),
                f"{each.edges:,}",
                f"{each.linear_edges:,}",
                f"{each.curvature:.3f}",
            )
            for each in facts
        ],
    )
    console.say(f"Written: {folder}/curves.csv, curves.{fmt}")


def bases(as_json: Json = False) -> None:
    """List the bases: arguments, domain, what one 576 -> 384 layer costs, and their first functions, drawn."""
    from kallm_bench.kan.catalogue import catalogue

    rows = catalogue()
    if as_json:
        console.show_json([entry._asdict() for entry in rows])
    else:
        console.show_rows(
            ("basis", "arguments", "squash, domain", "functions", "parameters", "MFLOP", "drawn"),
            [
                (
                    e.name,
                    e.arguments,
                    f"{e.squash}, {e.domain}",
                    str(e.functions),
                    f"{e.parameters:,}",
                    f"{e.flops / 1e6:.2f}",
                    e.drawing,
                )
                for e in rows
            ],
        )


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the reply is cut.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Let a model reply, as it goes.

    kallm generate bundled "What is a spline?"
    """
    from kallm_bench.generate import reply
    from kallm_bench.models import find_model
    from kallm_bench.profiling import find_device, find_dtype

    where = find_device(device)
    reply(
        find_model(checkpoint, trust_remote_code),
        prompt,
        console.stream,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        device=where,
        dtype=find_dtype(dtype, where),
    )
    console.stream("\n")
