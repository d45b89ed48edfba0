"""Commands that make a model out of another: retrofit, cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench
from kallm_bench.cli.options import Checkpoint, Device, Force, Json, Out, Results, Seed, Trust


def retrofit(
    checkpoint: Checkpoint = "bundled",
    blocks: Annotated[
        str | None,
        typer.Option(help="Which: 25-29, 0,3,5-7, last:5, all. If left out last:5, or with --revert all."),
    ] = None,
    basis: Annotated[
        str, typer.Option(help="Basis (`kallm bases` lists them), or linear (fresh feed-forward), or drop (none).")
    ] = "cheby2",
    target: Annotated[
        str,
        typer.Option(
            help="feedforward: as a whole; linears: each layer inside it; attention: each of its layers; or "
            "linears+attention."
        ),
    ] = "feedforward",
    degree: Annotated[int | None, typer.Option(help="Highest polynomial degree, where the basis has one.")] = None,
    hidden: Annotated[
        int | None, typer.Option(help="Inner width; a quarter of the original's for KANs, the original's for linear.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="stack: two KAN layers; single: one; gated: two multiplied; glu: SwiGLU, learned gate. Beside single "
            "layers, which stay: adapter (LoRA of two KAN layers), adapter-code (LoRA with learned functions between)."
        ),
    ] = "stack",
    rank: Annotated[int | None, typer.Option(help="How narrow an adapter is; 16 if left out.")] = None,
    constant: Annotated[
        str, typer.Option(help="Where the constant function goes: one bias, or on every edge as published.")
    ] = "bias",
    linear: Annotated[bool, typer.Option("--linear", help="Give KAN layers a path past the basis.")] = False,
    groups: Annotated[int | None, typer.Option(help="Learned functions in form glu; 8 if left out.")] = None,
    up: Annotated[bool, typer.Option("--up", help="In form glu, learned functions on the up path too.")] = False,
    params: Annotated[
        str | None, typer.Option(help="Choose --hidden for so many parameters in all: a number, or original.")
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            help="random; lstsq, distill or inherit (from what is replaced; joined by +, such as inherit+distill; "
            "sequence may end it); convert (what the blocks' KANs do, in the new basis). auto: convert, or random."
        ),
    ] = "auto",
    start_steps: Annotated[int, typer.Option(min=1, help="Of distillation.")] = 400,
    calibration: Annotated[
        str, typer.Option(help="Text that a start is calibrated on: as --data of `kallm train`.")
    ] = "bundled",
    calibration_tokens: Annotated[int, typer.Option(min=1024, help="How much of it.")] = 20_480,
    calibration_row: Annotated[int, typer.Option(min=16, help="Tokens in a row of it.")] = 512,
    activation: Annotated[
        str, typer.Option(help="With --target linears: keep the feed-forward's own activation, or drop it.")
    ] = "keep",
    experts: Annotated[bool, typer.Option("--experts", help="Replace mixtures of experts too, as a whole.")] = False,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would come to.")] = False,
    reverting: Annotated[bool, typer.Option("--revert", help="Put the model's own modules back instead.")] = False,
    base: Annotated[
        str | None, typer.Option(help="With --revert: where they come from; what CKPT was made of, if left out.")
    ] = None,
    out: Out = None,
    force: Force = False,
    device: Device = "auto",
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Replace the feed-forward parts of some blocks by KAN layers, and save the checkpoint.

    kallm retrofit --blocks 25-29 --basis cheby2
    kallm retrofit --form glu --basis rational --hidden 512 --start inherit
    kallm retrofit --target linears --start inherit --dry-run
    kallm retrofit runs/CKPT --revert --blocks 25,26
    """
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.models import CalibrationSettings, KANSpec

    if reverting:
        if dry_run:
            raise typer.BadParameter("--revert has no --dry-run: it only puts modules back")
        with console.Display() as display:
            bench = make_bench(results, display, device, "float32", None, seed)
            ref, source = find_ref(checkpoint, trust_remote_code), find_ref(base) if base else None
            record = engine.revert(bench, ref, blocks or "all", source, out, replace=force)
        console.show_records([record], as_json, bench.store.written)
        return
    if base is not None:
        raise typer.BadParameter("--base is for --revert")
    size = int(params) if params and params.isdecimal() else params
    spec = KANSpec(
        blocks or "last:5", basis, degree, hidden, form, constant, seed, linear=linear, groups=groups, up=up,
        start=start, start_steps=start_steps, params=size, target=target, activation=activation, experts=experts,
        rank=rank,
    )  # fmt: skip
    if dry_run:
        from kallm_bench.forecast import forecast
        from kallm_bench.models import find_model, load_config

        console.show_forecast(forecast(load_config(find_model(checkpoint, trust_remote_code)), spec), as_json)
        return
    text = None
    if spec.needs_calibration:
        text = CalibrationSettings(calibration, tokens=calibration_tokens, row_length=calibration_row)
    with console.Display() as display:
        bench = make_bench(results, display, device, "float32", None, seed)
        record = engine.retrofit(
            bench, find_ref(checkpoint, trust_remote_code), spec, out, calibration=text, replace=force
        )
    console.show_records([record], as_json, bench.store.written)


def cut(
    checkpoint: Checkpoint = "bundled",
    blocks: Annotated[
        int | None, typer.Option(min=1, help="How many to keep, the first ones; all if left out.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Texts whose tokens stay: as --data of `train --task classify`; all if left out."),
    ] = None,
    out: Out = None,
    force: Force = False,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Cut a small model out of a large one, for quick screens: its first blocks, the tokens that a data set needs.

    kallm cut --blocks 3 --data ag_news.jsonl.gz
    """
    from kallm_bench import engine
    from kallm_bench.filing import find_ref
    from kallm_bench.models import CutSettings

    with console.Display() as display:
        bench = make_bench(results, display, "cpu", "float32", None)
        ref = find_ref(checkpoint, trust_remote_code)
        record = engine.cut_model(bench, ref, CutSettings(blocks, data), out, replace=force)
    console.show_records([record], as_json, bench.store.written)
