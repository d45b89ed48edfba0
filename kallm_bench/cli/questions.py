"""The command that asks BIG-Bench Hard: eval-bbh."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kallm_bench import console
from kallm_bench.cli.bench import make_bench
from kallm_bench.cli.options import BatchSize, Checkpoint, Device, Dtype, Json, Results, Trust, read_names


def eval_bbh(
    checkpoint: Checkpoint = "bundled",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="chat (if left out), or lm-eval's leaderboard, zeroshot, fewshot, cot-fewshot, cot-zeroshot."
        ),
    ] = None,
    reading: Annotated[
        str | None,
        typer.Option(help="Of lm-eval's: lm-eval, as it is, or fixed, without its faults in reading replies."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="BIG-Bench-Hard folder, hub id, or 'procedural'; KALLM_BBH_DIR, then the hub, if left out."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Task names, with commas; all if left out.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each task.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Where an answer is cut.")] = None,
    prompts_only: Annotated[
        bool,
        typer.Option("--prompts-only", help="Write what would be asked to --out; of all lm-eval protocols if none."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --prompts-only: JSON lines to write.")] = None,
    rescore: Annotated[
        str | None,
        typer.Option(metavar="RECORD", help="Read the answers of this record anew, as --reading has it; no model."),
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Replies that no batch size changes by a bit; slower.")
    ] = False,
    likelihoods: Annotated[
        bool,
        typer.Option(
            "--likelihoods/--no-likelihoods",
            help="How likely the right answer is in a reply's place; not where replies reason first.",
        ),
    ] = True,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    results: Results = Path("results"),
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Ask a model BIG-Bench Hard, or fresh questions like it, and score the answers beside guessing.

    kallm eval-bbh runs/... --source path/to/BIG-Bench-Hard --limit 20
    kallm eval-bbh --prompts-only --out prompts.jsonl
    kallm eval-bbh --rescore 20261122T134327Z-eval-bbh --reading lm-eval
    torchrun --nproc-per-node 2 -m kallm_bench.cli eval-bbh CKPT --protocol leaderboard
    """
    if prompts_only != (out is not None):
        raise typer.BadParameter("--prompts-only and --out FILE go together")
    asked = protocol or tasks or limit or max_new_tokens or batch_invariant or not likelihoods
    if rescore is not None and (prompts_only or asked):
        raise typer.BadParameter("--rescore takes --reading, --source and --results: the record says the rest")
    from kallm_bench import engine
    from kallm_bench.bbh.evaluate import EvalSettings
    from kallm_bench.bbh.protocols import LM_EVAL_PROTOCOLS
    from kallm_bench.filing import find_ref
    from kallm_bench.profiling import find_device
    from kallm_bench.records import ResultsStore
    from kallm_bench.training import join

    if rescore is not None:
        store = ResultsStore(results)
        console.show_records([engine.rescore(store, rescore, reading, source)], as_json, store.written)
        return
    chosen = tuple(read_names(tasks, "--tasks")) if tasks else ()
    settings = EvalSettings(
        protocol or "chat", source, chosen, limit, max_new_tokens, 0, reading, batch_invariant, likelihoods
    )
    if out is not None:
        protocols = [protocol] if protocol else LM_EVAL_PROTOCOLS
        counts = engine.write_prompts(lambda: find_ref(checkpoint, trust_remote_code), settings, protocols, out)
        if as_json:
            console.show_json({"out": str(out), "prompts": counts})
        else:
            console.say(f"{sum(counts.values()):,} prompts in {out}")
        return
    with join(find_device(device)) as processes, console.Display(silent=not processes.first) as display:
        with processes.in_turn():
            bench = make_bench(results, display, device, dtype, batch_size, processes=processes)
            ref = find_ref(checkpoint, trust_remote_code)
        record = engine.eval_bbh(bench, ref, settings)
    if processes.first:
        console.show_records([record], as_json, bench.store.written)
