"""Training throughput and peak memory: the plain Hugging Face loop, ours, and ours with what frozen blocks give kept.

Run it: python tests/benchmark_training.py [--data FILE] [--rows 32] [--length 1024] [--steps 20] [--out FILE]

Arms replace blocks 25-29's feed-forwards and train them with their attention and the final norm, as in osre25. Each row
is the median step of a run of its own, after its first steps. The plain loop is what a tutorial would write: the model
and what is frozen of it in the compute dtype, its own loss, AdamW; documents packed into a row see each other there,
which spares it the masks. FLOP for MFU are those that have to be: forward once, and for what learns twice more.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kallm_bench.files import cache_folder
from kallm_bench.models import KANSpec, load_model, retrofit
from kallm_bench.profiling.flops import peak_flops, training_flops
from kallm_bench.profiling.hardware import environment
from kallm_bench.training import Forward, TrainSettings, apply_scope, prepare
from kallm_bench.training.data import Rows

ARMS = {
    "linear": KANSpec("25-29", "linear"),
    "linear-matched": KANSpec("25-29", "linear", hidden=512),
    "kan": KANSpec("25-29", "cheby2", degree=2),
    "glu-rational": KANSpec("25-29", "rational", form="glu", hidden=512),
}


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one way to train one arm."""

    arm: str
    way: str
    tokens_per_second: float
    spread: float
    peak_bytes: int
    mfu: float | None
    first_seconds: float
    loss: float


def step_of(forward: Forward, rows: Rows, numbers: Iterator[list[int]], settings: TrainSettings) -> Callable[[], float]:
    learning = [parameter for parameter in forward.model.parameters() if parameter.requires_grad]
    fused = learning[0].is_cuda
    optimiser = torch.optim.AdamW(learning, lr=settings.learning_rate, weight_decay=0.0, fused=fused)
    following = next(numbers)

    def step() -> float:
        nonlocal following
        batch = forward.batch(rows, following)
        following = next(numbers)
        forward.prefetch(rows, following)
        loss, count = forward.loss_sum(batch)
        torch.autograd.backward(loss / count)
        torch.nn.utils.clip_grad_norm_(learning, settings.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach()) / count

    return step


def plain_step(model: Any, rows: Rows, numbers: Iterator[list[int]], dtype: torch.dtype) -> Callable[[], float]:
    model.to(dtype).train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=4e-4, weight_decay=0.0)

    def step() -> float:
        batch = rows.batch(next(numbers), model.device)
        labels = batch["targets"].roll(1, dims=1)  # the model's own loss shifts them back
        loss = model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def measure(arm: str, way: str, step: Callable[[], float], model: Any, rows: Rows, count: int, steps: int) -> Figures:
    """`steps` steps, after five that do not count."""
    on_gpu = model.device.type == "cuda"
    begin = time.perf_counter()
    for _ in range(5 if on_gpu else 1):
        loss = step()
    if on_gpu:
        torch.cuda.synchronize()
    first, seconds = time.perf_counter() - begin, []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    middle, tokens = statistics.median(seconds), count * rows.tokens.shape[1]
    peak = torch.cuda.max_memory_reserved() if on_gpu else 0  # graphs keep memory that is not counted as allocated
    most = peak_flops(model.device, torch.bfloat16 if on_gpu else torch.float32)
    mfu = training_flops(model) * tokens / middle / most if most else None
    spread = (max(seconds) - min(seconds)) / middle
    return Figures(arm, way, tokens / middle, spread, peak, mfu, first, loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--rows", type=int, default=32 if torch.cuda.is_available() else 4)
    parser.add_argument("--length", type=int, default=1024 if torch.cuda.is_available() else 256)
    parser.add_argument("--steps", type=int, default=20 if torch.cuda.is_available() else 5)
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--ways", nargs="*", default=["plain", "ours", "cached"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autocast = torch.bfloat16 if device.type == "cuda" else None
    settings = TrainSettings(tokens=asked.rows * asked.length, row_length=asked.length, rows_per_step=asked.rows)
    _, tokenizer = load_model(asked.model)
    rows, _ = prepare(asked.data, tokenizer, asked.length, cache_folder())
    found: list[Figures] = []
    for arm in asked.arms:
        for way in asked.ways:
            model, _ = load_model(asked.model, torch.float32, device)
            retrofit(model, ARMS[arm])
            apply_scope(model, "tail", 25)

            def numbers(start: int = 0) -> Iterator[list[int]]:
                while True:
                    yield [(start + each) % len(rows) for each in range(asked.rows)]
                    start = (start + asked.rows) % (asked.rows * (asked.steps + 5))

            with contextlib.ExitStack() as stack:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                if way == "plain":
                    step = plain_step(model, rows, numbers(), autocast or torch.float32)
                else:
                    forward = stack.enter_context(Forward(model, autocast=autocast, fast=True))
                    if way == "cached":
                        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                        forward.keep(folder, {rows: len(rows)})
                        fill = step_of(forward, rows, numbers(), settings)
                        for _ in range(asked.steps + 5):
                            fill()
                        forward.settle()
                    forward.train(True)
                    step = step_of(forward, rows, numbers(), settings)
                found.append(measure(arm, way, step, model, rows, asked.rows, asked.steps))
                show(found[-1])
            del model, step
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
    if asked.out:
        facts = {"environment": environment(device), "settings": vars(asked) | {"out": None}}
        asked.out.write_text(json.dumps(facts | {"figures": [dataclasses.asdict(each) for each in found]}, indent=1))


def show(figures: Figures) -> None:
    mfu = "–" if figures.mfu is None else f"{figures.mfu:.0%}"
    print(
        f"{figures.arm:16} {figures.way:8} {figures.tokens_per_second:12,.0f} tokens/s (spread {figures.spread:.0%})  "
        f"peak {figures.peak_bytes / 2**30:6.2f} GiB  MFU {mfu}  first steps {figures.first_seconds:.1f} s  "
        f"loss {figures.loss:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
