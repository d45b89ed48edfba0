"""Run by test_protocols.py in a process of its own: what lm-eval, as it is, makes of BIG-Bench Hard.

Takes JSON from stdin and prints JSON as its last line.
prompts: a folder of the questions -> protocol -> task -> digest, as test_protocols.digest makes it.
read: [protocol, task, question, target, reply] .. -> what each filter finds and whether it is right; nothing where
    lm-eval crashes.
aggregate: task -> scores -> [mean over questions, its standard error].
numbers: texts -> the number that word2number reads, null where it refuses.
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

FOLDERS = {
    "leaderboard": "leaderboard/bbh_mc",
    "zeroshot": "bbh/zeroshot",
    "fewshot": "bbh/fewshot",
    "cot-fewshot": "bbh/cot_fewshot",
    "cot-zeroshot": "bbh/cot_zeroshot",
}


def tasks_of(protocol: str) -> list[Path]:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks" / FOLDERS[protocol]
    return sorted(path for path in folder.glob("*.yaml") if not path.name.startswith("_"))


@cache
def open_task(path: Path, questions: str) -> Any:
    """lm-eval's own task, with its questions from a file."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = load_yaml(path, resolve_func=True)
    settings |= {"dataset_path": "json", "dataset_name": None}
    settings |= {"dataset_kwargs": {"data_files": {"test": questions}, "field": "examples"}}
    task = ConfigurableTask(config=settings)
    task.set_fewshot_seed(1234)
    return task


def prompts(folder: str) -> dict[str, dict[str, str]]:
    return {
        protocol: {path.stem: _digest(path, f"{folder}/bbh/{path.stem}.json") for path in tasks_of(protocol)}
        for protocol in FOLDERS
    }


def _digest(path: Path, questions: str) -> str:
    task = open_task(path, questions)
    task.build_all_requests()
    asked: dict[int, list[Any]] = {}
    for instance in task.instances:
        asked.setdefault(instance.doc_id, []).append(instance)
    whole = hashlib.sha256()
    for _, instances in sorted(asked.items()):
        contexts = {instance.arguments[0] for instance in instances}
        assert len(contexts) == 1
        follows = [i.arguments[1] for i in instances if i.request_type == "loglikelihood"]
        limits = instances[0].arguments[1] if not follows else {}
        ends = [limits.get("max_gen_toks", 256), *limits["until"]] if limits else []
        whole.update(json.dumps([contexts.pop(), follows, ends]).encode() + b"\n")
    return whole.hexdigest()


def read(rows: list[list[str]]) -> list[dict[str, tuple[str, bool]]]:
    import tempfile

    from lm_eval.api.instance import Instance

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"examples": [{"input": "List: a", "target": "a"}]}, file)
        file.flush()
        tasks = {(name, path.stem): open_task(path, file.name) for name in FOLDERS for path in tasks_of(name)}
    found = []
    for protocol, name, question, target, reply in rows:
        task, doc = tasks[protocol, name], {"input": question, "target": target}
        instance = Instance("generate_until", doc, ("", {}), 0)
        for stop in task.config.generation_kwargs["until"]:
            reply = reply.split(stop)[0]
        instance.resps = [reply]
        task._instances = [instance]
        try:
            task.apply_filters()
        except (ValueError, IndexError):  # word2number, of a number that is none
            found.append({})
            continue
        answers = instance.filtered_resps
        right = {kind: task.process_results(doc, [answer])["exact_match"] for kind, answer in answers.items()}
        found.append({kind: (answer, bool(right[kind])) for kind, answer in answers.items()})
    return found


def aggregate(scores: dict[str, list[float]]) -> list[float]:
    from lm_eval.api.metrics import aggregate_subtask_metrics, mean, mean_stderr, pooled_sample_stderr

    sizes = [len(values) for values in scores.values()]
    combined = aggregate_subtask_metrics([mean(values) for values in scores.values()], sizes)
    return [combined, float(pooled_sample_stderr([mean_stderr(values) for values in scores.values()], sizes))]


def numbers(texts: list[str]) -> list[int | None]:
    from word2number import w2n

    def number(text: str) -> int | None:
        try:
            return w2n.word_to_num(text)  # type: ignore[no-any-return]
        except (ValueError, IndexError):
            return None

    return [number(text) for text in texts]


if __name__ == "__main__":
    done = {"prompts": prompts, "read": read, "aggregate": aggregate, "numbers": numbers}[sys.argv[1]](
        json.load(sys.stdin)
    )
    sys.stdout.write("\n" + json.dumps(done) + "\n")
