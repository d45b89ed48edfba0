"""What the leaderboard's log-likelihoods cost here and in lm-eval's hf backend, on the same questions, in turn.

Both in float32 on the CPU, each in a process of its own, seconds after loading, tokenising included. Where others work
on the machine, compare the processor's time, with one thread: several that wait for each other count as work. It also
says how far the two lie apart.

Run it: python tests/benchmark_loglikelihood.py FOLDER [--limit 10] [--tasks snarks] [--batch-size 8] [--threads 1]
FOLDER is the BIG-Bench-Hard repository. lm-eval may take an hour for all tasks.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lm_eval_choices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--batch-size", type=int, default=8, help="rows, of lm-eval; here as many tokens in one go")
    parser.add_argument("--threads", type=int, default=0, help="of both; 1 where others work on the machine too")
    given = parser.parse_args()

    import torch

    from kallm_bench.bbh.prompts import build_prompts
    from kallm_bench.bbh.protocols import PROTOCOLS
    from kallm_bench.bbh.questions import load_questions
    from kallm_bench.bbh.scoring import SLOTS, score_choices
    from kallm_bench.models import load_model

    protocol, tasks = PROTOCOLS["leaderboard"], [task for task in given.tasks.split(",") if task]
    questions = load_questions(str(given.folder), tasks, given.limit, among=protocol.tasks)
    prompts = build_prompts(questions, protocol)
    if given.threads:
        torch.set_num_threads(given.threads)
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
    model, tokenizer = load_model("bundled")
    before = time.perf_counter(), time.process_time()
    scores = list(score_choices(model, tokenizer, prompts))
    seconds, processor = time.perf_counter() - before[0], time.process_time() - before[1]

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
        lm_eval_choices.write(place / "asked.json", prompts)
        asked = [str(place / "model"), str(place / "asked.json"), str(given.batch_size)]
        command = [sys.executable, lm_eval_choices.__file__, *asked]
        own = {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
        theirs = lm_eval_choices.read(done.stdout, prompts)

    apart = max(
        abs(one - other)
        for each in scores
        for one, other in zip(each.loglikelihoods, theirs.loglikelihoods[each.task, each.index], strict=True)
    )
    tokens = sum(each.forwarded_tokens for each in scores)
    print(f"{len(prompts)} questions; log-likelihoods at most {apart:.1e} apart; load {os.getloadavg()[0]:.1f}")
    print("| | seconds | processor seconds | tokens |")
    print("| --- | --: | --: | --: |")
    print(f"| kallm, up to {SLOTS['cpu']} tokens at once | {seconds:.1f} | {processor:.1f} | {tokens:,} |")
    print(f"| lm-eval, {given.batch_size} rows at once | {theirs.seconds:.1f} | {theirs.processor_seconds:.1f} | |")
    print(f"| times as fast | {theirs.seconds / seconds:.1f} | {theirs.processor_seconds / processor:.1f} | |")


if __name__ == "__main__":
    main()
