"""The command that trains: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench
from kallm_bench.cli.options import (
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Force,
    Json,
    Out,
    PrefixCache,
    Results,
    Seed,
    Track,
    Trust,
    read_trackers,
)


def train(
    checkpoint: Checkpoint,
    data: Annotated[
        str,
        typer.Option(help="Hub id, JSONL(.gz) or parquet file, with 'messages' or 'text' and 'label'; or 'bundled'."),
    ] = "bundled",
    heldout: Annotated[
        str | None, typer.Option(help="Held-out data; every 50th conversation, or 10th text, if left out.")
    ] = None,
    heldout_rows: Annotated[int, typer.Option(help="How many of its rows are scored, the first ones.")] = 128,
    tokens: Annotated[int, typer.Option(help="How many tokens to see; 0 only measures the held-out loss.")] = 1_000_000,
    row_length: Annotated[int, typer.Option(help="Tokens in a row.")] = 1024,
    packing: Annotated[
        bool,
        typer.Option(help="Full rows of several conversations; without it a row for each, for models that mix them."),
    ] = True,
    rows_per_step: Annotated[int, typer.Option(help="Rows that make one optimiser step.")] = 32,
    scope: Annotated[
        str,
        typer.Option(
            help="What learns. replaced: the new modules; tail: all blocks from the first of them on, and the last "
            "norm; tail+head: the head too; all; lora: low-rank adapters, which end up in the weights."
        ),
    ] = "tail",
    task: Annotated[str, typer.Option(help="chat: the assistant's words; classify: each text's class.")] = "chat",
    learning_rate: Annotated[
        float,
        typer.Option(help="Its peak, after a warm-up; it falls as a cosine. Which layer leads can depend on it."),
    ] = 4e-4,
    distill: Annotated[
        float, typer.Option(help="Share of the loss that is what the untouched model would say, 0 to 1.")
    ] = 0.0,
    temperature: Annotated[
        float | None, typer.Option(help="With --distill: by which logits are divided for that; 2 if left out.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="With --distill: the untouched model; what CKPT was made of, if left out.")
    ] = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where a stopped run of this command stands, or anew.")
    ] = True,
    prefix_cache: PrefixCache = False,
    heldout_every: Annotated[
        float, typer.Option(help="Take the held-out loss after so many steps too; below 1, a share of all steps.")
    ] = 0.0,
    track: Track = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few steps, in memory alone, and say what training would come to.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split the weights over the processes (FSDP): for models that do not fit.")
    ] = False,
    out: Out = None,
    force: Force = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Train what was replaced, or more, on conversations; stopped with Ctrl-C, the same command goes on.

    kallm train runs/bundled-cheby2-25-29-... --tokens 1000000
    kallm train CKPT --tokens 1000000 --dry-run
    kallm train CKPT --distill 0.5
    kallm train runs/... --task classify --data train.jsonl.gz --heldout test.jsonl.gz --row-length 256
    torchrun --nproc-per-node 2 -m kallm_bench.cli train CKPT --tokens 1000000
    Schedules, other rates for new modules, weight decay, clipping and curricula are for suites: kallm run
    """
    from kallm_bench import engine
    from kallm_bench.budget import Room
    from kallm_bench.errors import TrainingError
    from kallm_bench.filing import find_ref
    from kallm_bench.profiling import find_device
    from kallm_bench.training import DistillationSettings, TrainSettings, join

    for option, given in (("--base", base), ("--temperature", temperature)):
        if given is not None and not distill:
            raise typer.BadParameter(f"{option} is for --distill")
    if out and not tokens:
        raise typer.BadParameter("--tokens 0 only measures the held-out loss, and saves no checkpoint; leave --out out")
    softened = {} if temperature is None else {"temperature": temperature}
    with join(find_device(device)) as processes:
        if shard and processes.count == 1:
            raise TrainingError("--shard splits weights over several processes; start them by torchrun, as --help says")
        with console.Display(silent=not processes.first) as display:
            with processes.in_turn():
                settings = TrainSettings(
                    data=data,
                    heldout=heldout,
                    heldout_rows=heldout_rows,
                    tokens=tokens,
                    row_length=row_length,
                    packing=packing,
                    rows_per_step=rows_per_step,
                    scope=scope,
                    task=task,
                    learning_rate=learning_rate,
                    heldout_every=heldout_every,
                    seed=seed,
                )
                bench = make_bench(
                    results, display, device, dtype, batch_size, seed, processes=processes, sharded=shard,
                    prefix_cache=prefix_cache, trackers=read_trackers(track), dry=dry_run,
                )  # fmt: skip
                ref = find_ref(checkpoint, trust_remote_code)
                lessons = engine.Lessons(
                    distillation=DistillationSettings(distill, **softened),
                    base=find_ref(base, trust_remote_code) if base else None,
                )
            if dry_run:
                coming = engine.try_training(bench, ref, settings, lessons)
            else:
                record = engine.train_model(bench, ref, settings, out, lessons=lessons, replace=force, resume=resume)
        if dry_run:
            console.show_training(coming, Room.of(bench.device, out or bench.runs), as_json)
        elif processes.first:
            console.show_records([record], as_json, bench.store.written)
