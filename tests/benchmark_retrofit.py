"""What a retrofit costs: seconds after imports and peak memory, of the bundled model and of about 2 GiB in shards.

The starts that look at text run the model, a block at a time; the bundled one is loaded whole too, to compare.

Run it: python tests/benchmark_retrofit.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

SHARD = 600 * 10**6
"""Bytes in a shard, at most."""


TOKENS = 4096
"""To calibrate on: a few more than least squares has unknowns for 128 hidden channels."""


def main() -> None:
    print("| checkpoint | start | GiB | largest shard | new modules | seconds | peak memory, GiB | of it imports |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sharded"
        make_sharded(folder)
        runs = [(name, "random") for name in ("bundled", "bundled", str(folder), str(folder))]
        for name, start in [*runs, ("bundled", "lstsq"), ("bundled", "lstsq, whole")]:  # files are hashed but once
            told = measure(name, Path(temporary), start)
            cells = [f"{told[key] / 2**30:.2f}" for key in ("size", "largest", "new")]
            cells += [f"{told['seconds']:.1f}", f"{told['peak'] / 2**30:.2f}", f"{told['imports'] / 2**30:.2f}"]
            print(f"| {Path(name).name} | {start} | {' | '.join(cells)} |")


def make_sharded(folder: Path, blocks: int = 9) -> None:
    """Writes a Llama of random weights: about 0.2 GiB a block in float32, and an embedding of 0.25."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_768,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=SHARD)


def measure(name: str, home: Path, start: str = "random") -> dict[str, float]:
    """A retrofit in a process of its own, below the folder `home`: seconds after imports; sizes and peak in bytes.

    Args:
        start: a spec's; with ", whole" behind it nothing is streamed.
    """
    with tempfile.TemporaryDirectory(dir=home) as place:
        command = [sys.executable, str(Path(__file__).absolute()), name, start]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=True)
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told


def retrofit_once(name: str, start: str) -> dict[str, float]:
    from kallm_bench import engine
    from kallm_bench.filing import Bench, find_ref
    from kallm_bench.models import CalibrationSettings, KANSpec, Original, weights_folder
    from kallm_bench.profiling import identity
    from kallm_bench.records import ResultsStore

    torch.set_num_threads(2)
    start, _, whole = start.partition(", ")
    if whole:
        Original.streams = False  # type: ignore[assignment, method-assign]
    source = weights_folder(find_ref(name).open()) if name == "bundled" else Path(name)  # dequantised before the clock
    imports = peak_memory()
    began = time.perf_counter()
    store = ResultsStore(Path("results"))
    bench = Bench(store, store.testbed(identity()), Path("runs"), torch.device("cpu"), torch.float32)
    text = None if start == "random" else CalibrationSettings(tokens=TOKENS, heldout_tokens=1024, row_length=512)
    spec = KANSpec("last:2" if name != "bundled" else "last:5", "cheby2", hidden=128 if text else None, start=start)
    record = engine.retrofit(bench, find_ref(name), spec, calibration=text)
    seconds = time.perf_counter() - began
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    new = next(metric.value for metric in record.metrics if metric.name == "replaced_parameters")
    return {
        "seconds": seconds,
        "peak": peak_memory(),
        "imports": imports,
        "size": sum(sizes),
        "largest": max(sizes),
        "new": 4 * new,
    }


def peak_memory() -> int:
    """The most memory that this process has held at once, in bytes, as Linux tells it."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(told.split()[1]) * 1024


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(retrofit_once(*sys.argv[1:])))
    else:
        main()
