"""What `kallm train --dry-run` predicts beside what training then takes: time, peak memory, the checkpoint's size.

Run it: python tests/benchmark_forecast.py [--tokens 40960] [--row-length 256] [--rows-per-step 8] [--out FILE]

Each arm is retrofitted once; then prediction and training run one after the other, each in a process of its own, as a
user would call them. What is tokenised is tokenised before. Prediction costs what the last column says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ARMS = {
    "linear": ["--basis", "linear"],
    "kan": ["--basis", "cheby2", "--degree", "2"],
    "glu-rational": ["--basis", "rational", "--form", "glu", "--hidden", "512"],
}


def kallm(folder: Path, *words: str) -> tuple[Any, float]:
    """What a command prints as JSON, and the seconds it took."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "kallm_bench.cli", *words, "--json"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout), time.perf_counter() - began


def compare(folder: Path, arm: str, training: list[str]) -> dict[str, Any]:
    """The predicted and the true figures of one arm."""
    kallm(folder, "retrofit", "bundled", "--blocks", "25-29", *ARMS[arm], "--out", arm)
    words = ["train", arm, *training, "--out", f"{arm}-trained"]
    predicted, seconds = kallm(folder, *words, "--dry-run")
    (record,), _ = kallm(folder, *words)
    true = {metric["name"]: metric["value"] for metric in record["metrics"]}
    files = sum(path.stat().st_size for path in (folder / f"{arm}-trained").glob("*.safetensors"))
    pairs = {"train_seconds": (predicted["seconds"], true["train_seconds"])}
    pairs |= {name: (value, true[name]) for name, value in predicted["peaks"].items()}
    pairs["checkpoint_bytes"] = (predicted["checkpoint_bytes"], files)
    return {"arm": arm, "pairs": pairs, "prediction_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--data", default="bundled")
    parser.add_argument("--arms", nargs="*", default=list(ARMS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    training = [f"--tokens={asked.tokens}", f"--row-length={asked.row_length}", f"--data={asked.data}"]
    training += [f"--rows-per-step={asked.rows_per_step}"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in asked.arms:
            found.append(compare(Path(folder), arm, training))
            for name, (predicted, true) in found[-1]["pairs"].items():
                miss = predicted / true - 1
                print(f"{arm:14} {name:28} predicted {predicted:16,.1f}  true {true:16,.1f}  {miss:+.0%}", flush=True)
            print(f"{arm:14} predicting took {found[-1]['prediction_seconds']:.1f} s", flush=True)
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
