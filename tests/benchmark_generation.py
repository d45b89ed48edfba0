"""Decoding throughput of the generation engine and of transformers' generate, and how often their replies differ.

Run it: python tests/benchmark_generation.py [--data FOLDER] [--questions 16] [--new 64] [--batch 16] [--out FILE]
        python tests/benchmark_generation.py --ways step parts [--rows 16 64 256 1024] [--tokens 256] [--batch 1024]

Real questions of BIG-Bench Hard with their few-shot chains of thought, greedy, to the same stops. Seconds hold all but
loading: prompts, comparison at the start, prefill, decoding. `decode` keeps nothing but the steps: batches that are
full, of prompts that are computed beforehand, without stops. Differing replies are counted against generate with one
prompt at a time; in float32 on a CPU there should be none, in bfloat16 there are, since logits tie.

`step` times a step by rows, with the kernels and without, each row with so many tokens of its own behind a beginning of
its block; `parts` says where the time of a run goes: recording, beginnings, prompts, steps, and all that is left, which
is Python's looks and what prompts cost before they are tokens. Each part waits for the device, which costs a little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kallm_bench.bbh import plain
from kallm_bench.bbh.decoding import Decoder, Room, grain_of
from kallm_bench.bbh.generation import Reply, generate
from kallm_bench.bbh.prompts import Prompt, build_prompts
from kallm_bench.bbh.protocols import PROTOCOLS
from kallm_bench.bbh.questions import load_questions
from kallm_bench.bbh.shapes import kernels_fit, layers_of
from kallm_bench.bbh.stops import Ending
from kallm_bench.models import load_model
from kallm_bench.profiling.hardware import environment

Tokens = dict[int, tuple[int, ...]]


def few_shot_prompts(folder: Path, tasks: list[str], questions: int, new: int) -> list[Prompt]:
    protocol = PROTOCOLS["cot-fewshot"]
    return build_prompts(load_questions(str(folder), tasks, questions), protocol, None, "lm-eval", new)


def by_engine(model: Any, tokenizer: Any, prompts: list[Prompt], batch: int, invariant: bool) -> tuple[float, Tokens]:
    synchronise(model)
    begin = time.perf_counter()
    replies: list[Reply] = list(generate(model, tokenizer, prompts, batch_size=batch, batch_invariant=invariant))
    return time.perf_counter() - begin, {reply.number: reply.tokens for reply in replies}


def by_generate(model: Any, tokenizer: Any, prompts: list[Prompt], batch: int) -> tuple[float, Tokens]:
    synchronise(model)
    begin = time.perf_counter()
    found = {}
    ids = [tokenizer(prompt.shared + prompt.question)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda at: -len(ids[at]))
    end = frozenset([model.generation_config.eos_token_id])
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        endings = [Ending(end, prompts[at].stops, prompts[at].max_new_tokens) for at in part]
        replies = plain.replies(model, tokenizer, [ids[at] for at in part], endings)
        found |= {at: tuple(tokens) for at, (tokens, _) in zip(part, replies, strict=True)}
    return time.perf_counter() - begin, found


def decode_rates(model: Any, tokenizer: Any, prompt: Prompt, batch: int, new: int) -> tuple[float, float]:
    """Tokens a second of steps alone: the engine's, and generate's less the time of its first token."""
    shared = tokenizer(prompt.shared)["input_ids"]
    own = tokenizer(prompt.question)["input_ids"]
    decoder = full_decoder(model, batch, [shared], len(own) + new, fused_on(model))
    decoder.admit(dict.fromkeys(range(batch), own))
    grain = decoder.grain
    decoder.steps(1, batch, decoder.room.own)
    synchronise(model)
    begin = time.perf_counter()
    for start in range(0, new - 1, grain.steps):
        decoder.steps(min(grain.steps, new - 1 - start), batch, decoder.room.own)
    ours = (new - 1) * batch / (time.perf_counter() - begin)
    seconds = []
    for count in (1, new):
        synchronise(model)
        begin = time.perf_counter()
        plain.replies(model, tokenizer, [shared + own] * batch, [Ending(frozenset(), (), count)] * batch)
        seconds.append(time.perf_counter() - begin)
    return ours, (new - 1) * batch / (seconds[1] - seconds[0])


def fused_on(model: Any) -> bool:
    return kernels_fit(model.device, layers_of(model, 1))


def full_decoder(model: Any, rows: int, beginnings: Sequence[Sequence[int]], own: int, fused: bool) -> Decoder:
    """With so many rows at least, whose blocks have these beginnings, one after the other."""
    grain = grain_of(model.device)
    room = Room(-(-rows // grain.block) * grain.block, own + grain.steps, max(map(len, beginnings)), len(beginnings))
    decoder = Decoder(model, layers_of(model, 1), room, grain, fused=fused)
    for place, beginning in enumerate(beginnings):
        decoder.begin(place, beginning)
        first, last = (each * room.rows // len(beginnings) for each in (place, place + 1))
        if blocks := range(-(-first // grain.block) * grain.block, last, grain.block):
            decoder.share(blocks, place)
    return decoder


def step_seconds(
    model: Any, beginnings: Sequence[Sequence[int]], rows: int, tokens: int, fused: bool
) -> tuple[float, float]:
    """Of a step, the median of several runs of steps; and of the first run, which records."""
    decoder = full_decoder(model, rows, beginnings, tokens, fused)
    count, seconds = decoder.grain.steps, []
    for _ in range(2 + 8 // count + 4 * (model.device.type == "cuda")):
        with torch.inference_mode():
            decoder.positions[:] = tokens - count
        synchronise(model)
        begin = time.perf_counter()
        decoder.steps(count, rows, tokens)
        synchronise(model)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]) / count, seconds[0]


@contextmanager
def timed_parts(model: Any) -> Iterator[dict[str, float]]:
    """Inside, seconds of each part of generation are added up; those of recording are part of steps' too."""
    found: dict[str, float] = defaultdict(float)
    names = {"_record": "recording", "begin": "beginnings", "admit": "prompts", "steps": "steps", "move": "moves"}
    before = {name: getattr(Decoder, name) for name in names}

    def timing(name: str) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            synchronise(model)
            begin = time.perf_counter()
            result = before[name](*given, **named)
            synchronise(model)
            found[names[name]] += time.perf_counter() - begin
            found["steps taken"] += given[1] if name == "steps" else 0
            found["rows stepped"] += given[1] * given[2] if name == "steps" else 0
            return result

        return timed

    for name in names:
        setattr(Decoder, name, timing(name))
    try:
        yield found
    finally:
        for name, method in before.items():
            setattr(Decoder, name, method)


def parts_of(model: Any, tokenizer: Any, prompts: list[Prompt], batch: int, kernels: bool) -> dict[str, Any]:
    """Where the seconds of a run go."""
    notes: list[str] = []
    synchronise(model)
    begin = time.perf_counter()
    with timed_parts(model) as found:
        replies = list(
            generate(
                model,
                tokenizer,
                prompts,
                batch_size=batch or None,
                kernels=kernels,
                watch=lambda work, done, total, note="": None if note.endswith("tokens/s") else notes.append(note),
            )
        )
    seconds = time.perf_counter() - begin
    found["steps"] -= found["recording"]
    left = seconds - sum(found[name] for name in ("recording", "beginnings", "prompts", "steps", "moves"))
    return {"kernels": kernels, "seconds": seconds, **found, "all else": left, "notes": notes} | {
        "reply tokens": sum(len(reply.tokens) for reply in replies)
    }


def synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def differing(some: Tokens, others: Tokens) -> int:
    return sum(some[number] != others[number] for number in some)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bbh"))
    parser.add_argument("--tasks", nargs="*", default=["navigate", "object_counting"])
    parser.add_argument("--questions", type=int, default=250 if on_gpu else 8)
    parser.add_argument("--new", type=int, default=512 if on_gpu else 48)
    parser.add_argument("--batch", type=int, default=256 if on_gpu else 8)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--ways", nargs="*", default=["decode", "engine", "invariant", "generate", "single"],
                        help="also: step, parts")  # fmt: skip
    parser.add_argument("--rows", nargs="*", type=int, default=[16, 64, 256, 1024] if on_gpu else [1, 4, 16])
    parser.add_argument("--tokens", type=int, default=256 if on_gpu else 64, help="of a row's own, in `step`")
    parser.add_argument("--kernels", nargs="*", default=["True", "False"], help="in `step` and `parts`; or one of both")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    model, tokenizer = load_model(asked.model, getattr(torch, asked.dtype), device)
    prompts = few_shot_prompts(asked.data, asked.tasks, asked.questions, asked.new)
    rows: list[dict[str, Any]] = []
    found: dict[str, Tokens] = {}
    both = [fused for fused in (True, False) if str(fused) in asked.kernels and (fused_on(model) or not fused)]
    if "step" in asked.ways:
        beginnings = [tokenizer(shared)["input_ids"] for shared in dict.fromkeys(prompt.shared for prompt in prompts)]
        for count in asked.rows:
            for fused in both:
                step, first = step_seconds(model, beginnings, count, asked.tokens, fused)
                rows.append({"way": "step", "rows": count, "kernels": fused, "seconds": step, "first_run": first})
                print(
                    f"step       {count:5} rows   {'kernels' if fused else 'plain':7}   {step * 1e3:8.2f} ms   "
                    f"{count / step:10,.0f} tokens/s   first run of steps {first:.2f} s",
                    flush=True,
                )
    if "parts" in asked.ways:
        for fused in both:
            row = parts_of(model, tokenizer, prompts, asked.batch, fused)
            rows.append({"way": "parts"} | row)
            print(f"parts      {'kernels' if fused else 'plain'}", flush=True)
            for name, value in row.items():
                print(
                    f"           {name:14} {value:,.2f}"
                    if isinstance(value, float)
                    else f"           {name:14} {value}"
                )
    if "decode" in asked.ways:
        ours, theirs = decode_rates(model, tokenizer, prompts[0], asked.batch, asked.new)
        rows.append({"way": "decode", "engine": ours, "generate": theirs, "unit": "token/s"})
        print(
            f"decode     engine {ours:10,.1f} tokens/s   generate {theirs:10,.1f} tokens/s   {ours / theirs:.2f} times"
        )
    ways = {
        "engine": lambda: by_engine(model, tokenizer, prompts, asked.batch, False),
        "invariant": lambda: by_engine(model, tokenizer, prompts, asked.batch, True),
        "generate": lambda: by_generate(model, tokenizer, prompts, asked.batch),
        "single": lambda: by_generate(model, tokenizer, prompts, 1),
    }
    for name in [name for name in ways if name in asked.ways]:
        seconds, found[name] = ways[name]()
        tokens = sum(map(len, found[name].values()))
        rows.append({"way": name, "seconds": seconds, "tokens": tokens})
        print(f"{name:10} {seconds:8.1f} s   {tokens:7} tokens   {tokens / seconds:10,.1f} tokens/s", flush=True)
    truth = "single" if "single" in found else next(iter(found), "")
    for name in found:
        if name != truth:
            count = differing(found[name], found[truth])
            rows.append({"way": name, "differing": count, "of": len(prompts), "from": truth})
            print(f"{name:10} differs from {truth} in {count} of {len(prompts)} replies ({count / len(prompts):.1%})")
    if asked.out:
        settings = {name: str(value) for name, value in vars(asked).items()}
        facts = {"environment": environment(device), "settings": settings, "figures": rows}
        asked.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
