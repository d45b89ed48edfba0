"""What preparing conversations costs: seconds after imports and peak memory, to the first use and from then on.

Conversations are those of a file, repeated until there are as many as asked for, each made a little different so that
none is the very same. Without a file they are the bundled ones. A quarter of them, last, tells whether memory grows
with the data.

Run it: python tests/benchmark_data.py [FILE.jsonl.gz] [--conversations 100000] [--cores 2]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_retrofit import peak_memory

KINDS = ("jsonl.gz", "parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default="bundled")
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--cores", type=int, default=2)
    given = parser.parse_args()
    print("| conversations | file | tokens | seconds | processor | again | peak memory, GiB | of it imports |")
    print("| --: | --- | --: | --: | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as temporary:
        sizes = [(given.conversations, kind) for kind in KINDS] + [(given.conversations // 4, KINDS[0])]
        for number, (conversations, kind) in enumerate(sizes):
            data = Path(temporary) / f"{number}.{kind}"
            write_conversations(data, given.source, conversations)
            told = measure(data, given.cores)
            cells = [f"{conversations:,}", kind, f"{told['tokens']:,.0f}", f"{told['seconds']:.1f}"]
            cells += [f"{told['processor_seconds']:.1f}"]
            cells += [f"{told['again']:.2f}", f"{told['peak'] / 2**30:.2f}", f"{told['imports'] / 2**30:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def write_conversations(path: Path, source: str, count: int) -> None:
    """`count` conversations of `source` in a file of that ending; numbered from the second round on."""
    import pyarrow
    import pyarrow.parquet

    from kallm_bench.training import find_data

    found = [conversation.messages for conversation in find_data(source).read()]
    rows = []
    for number, messages in enumerate(itertools.islice(itertools.cycle(found), count)):
        turn = number // len(found)
        first = messages[0]
        begun = {**first, "content": f"{turn}: {first['content']}"} if turn else first
        rows.append({"messages": [begun, *messages[1:]]})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)


def measure(data: Path, cores: int) -> dict[str, float]:
    """Prepares `data` in a process of its own: tokens, seconds at first and again, peak and imports in bytes."""
    with tempfile.TemporaryDirectory(dir=data.parent) as cache:
        command = [sys.executable, str(Path(__file__).absolute()), "--once", str(data), cache, str(cores)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told


def prepare_once(data: str, cache: str, cores: str) -> dict[str, float]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    from kallm_bench.models import find_model, load_tokenizer
    from kallm_bench.training import prepare

    tokenizer = load_tokenizer(find_model("bundled"))
    imports = peak_memory()
    began, used = time.perf_counter(), time.process_time()
    rows, _ = prepare(data, tokenizer, 1024, Path(cache), heldout=None)
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - used
    began = time.perf_counter()
    prepare(data, tokenizer, 512, Path(cache), heldout=None)
    again = time.perf_counter() - began
    return {
        "tokens": len(rows) * 1024 * 50 / 49,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "again": again,
        "peak": peak_memory(),
        "imports": imports,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(prepare_once(*sys.argv[2:])))
    else:
        main()
