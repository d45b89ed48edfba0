"""Run by benchmark_parity.py in a process of its own: lm-eval, as it is, asks a model BIG-Bench Hard by its protocols.

Takes JSON from stdin: {"model": folder, "questions": folder, "tasks": names, "limit": questions of each, "most": new
tokens, "batch": rows, "protocols": names}. Tasks, filters and averages are lm-eval's own; only where questions come
from is changed, and after how many tokens a reply ends. The last line printed is JSON: protocol -> {"score", "error",
"seconds", "processor_seconds": of the group, "samples": task -> rows of {"index", "prompt", "right"} and {"choices",
"loglikelihoods"} or {"reply", "answer"}}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

GROUPS = {
    "leaderboard": ("leaderboard_bbh", "acc_norm,none"),
    "zeroshot": ("bbh_zeroshot", "exact_match,flexible-extract"),
    "fewshot": ("bbh_fewshot", "exact_match,none"),
    "cot-fewshot": ("bbh_cot_fewshot", "exact_match,get-answer"),
    "cot-zeroshot": ("bbh_cot_zeroshot", "exact_match,flexible-extract"),
}
"""Our name -> lm-eval's group, and the figure of it that counts."""


def write_group(folder: Path, protocol: str, asked: dict[str, Any]) -> str:
    """Writes a group of lm-eval's own tasks, with questions from files; gives its name."""
    group, figure = GROUPS[protocol]
    metric, _, kind = figure.partition(",")
    tasks = []
    for task in asked["tasks"]:
        files = {"data_files": {"test": f"{asked['questions']}/bbh/{task}.json"}, "field": "examples"}
        own = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
        tasks.append({"task": f"{group}_{task}"} | own)
    aggregate = {"metric": metric, "aggregation": "mean", "weight_by_size": True, "filter_list": kind}
    name = f"{protocol}-from-files"
    content = {"group": name, "task": tasks, "aggregate_metric_list": [aggregate]}
    (folder / f"{protocol}.yaml").write_text(yaml.safe_dump(content))
    return name


def row_of(sample: dict[str, Any], metric: str, compared: bool) -> dict[str, Any]:
    """What lm-eval notes of one question, less what nobody asks for."""
    row = {"index": sample["doc_id"], "prompt": sample["arguments"][0][0], "right": bool(sample[metric])}
    if compared:
        row["choices"] = [follows for _, follows in sample["arguments"]]
        row["loglikelihoods"] = [float(answer[0][0]) for answer in sample["resps"]]
    else:
        row["reply"], row["answer"] = sample["resps"][0][0], sample["filtered_resps"][0]
    return row


def main() -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    asked = json.load(sys.stdin)
    model = HFLM(pretrained=asked["model"], dtype="float32", device="cpu", batch_size=asked["batch"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = {protocol: write_group(Path(folder), protocol, asked) for protocol in asked["protocols"]}
        manager = TaskManager(include_path=folder)
        for protocol, name in names.items():
            group, figure = GROUPS[protocol]
            metric, _, kind = figure.partition(",")
            compared = protocol == "leaderboard"
            before = time.perf_counter(), time.process_time()
            results = simple_evaluate(
                model,
                tasks=[name],
                task_manager=manager,
                limit=asked["limit"],
                gen_kwargs=None if compared else {"max_gen_toks": asked["most"]},
                bootstrap_iters=2,  # not 0, which leaves standard errors out; that of a mean is not drawn
                log_samples=True,
            )
            samples = {
                task.removeprefix(f"{group}_"): [row_of(e, metric, compared) for e in each if e["filter"] == kind]
                for task, each in results["samples"].items()
            }
            whole = results["groups"][name]
            error = whole[f"{metric}_stderr,{kind}"]  # "N/A" where a task has a single question
            found[protocol] = {
                "score": float(whole[figure]),
                "error": None if error == "N/A" else float(error),
                "seconds": time.perf_counter() - before[0],
                "processor_seconds": time.process_time() - before[1],
                "samples": samples,
            }
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
