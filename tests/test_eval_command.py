"""`kallm eval-bbh`: what it shows and files, what it refuses in a line, and stored answers read anew."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from small_questions import QUESTIONS, make_small

from kallm_bench.bbh.readings import read_reply
from kallm_bench.records import Metric, ResultsStore, RunRecord
from kallm_bench.reporting import build_tables, facts_of, to_markdown

TASKS = ",".join(QUESTIONS)


@pytest.fixture(scope="module")
def small(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_small(tiny_llama, folder)
    return folder


@pytest.fixture
def home(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the model and the questions in it."""
    for name in ("model", "data"):
        shutil.copytree(small / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KALLM_BBH_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def ask(kallm: Run, *words: str) -> dict[str, Any]:
    code, out, err = kallm("eval-bbh", "model", "--source", "data", "--tasks", TASKS, "--json", *words)
    assert code == 0, err
    [record] = json.loads(out)
    return record  # type: ignore[no-any-return]


def rescore(kallm: Run, record: dict[str, Any], *words: str) -> dict[str, Any]:
    code, out, err = kallm("eval-bbh", "--rescore", record["id"], "--source", "data", "--json", *words)
    assert code == 0, err
    [found] = json.loads(out)
    return found  # type: ignore[no-any-return]


def values(record: dict[str, Any]) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in record["metrics"]}


def samples(home: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    [path] = (home / "results").glob(f"*/*/{record['id']}.samples.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_an_accuracy_is_shown_with_its_interval_and_marked_where_that_includes_guessing(home: Path, kallm: Run) -> None:
    record = ask(kallm, "--protocol", "leaderboard")
    found = values(record)
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["accuracy_low"] <= found["guessing_accuracy"] <= found["accuracy_high"]
    assert set(found) >= {"leaderboard_score", "question_accuracy", "target_loglikelihood", "invalid_rate"}
    for task in QUESTIONS:
        assert found[f"accuracy_low/{task}"] <= found[f"accuracy/{task}"] <= found[f"accuracy_high/{task}"]
        assert found[f"target_loglikelihood/{task}"] < 0
    _, out, _ = kallm("eval-bbh", "model", "--source", "data", "--tasks", TASKS, "--protocol", "leaderboard")
    low, high, middle = (100 * found[name] for name in ("accuracy_low", "accuracy_high", "accuracy"))
    assert f"{middle:.1f} % [{low:.1f}, {high:.1f}] †" in out
    assert "† The interval includes guessing" in out
    assert "accuracy_low" not in out
    [table] = build_tables(ResultsStore(home / "results"))
    [row] = [row for row in table.rows if row.seeds]
    assert row.figures["accuracy"].mark == "†"
    assert row.figures["target_loglikelihood"].value == pytest.approx(found["target_loglikelihood"])
    told = to_markdown([table])
    assert "the likeliest choice a character, read as `lm-eval` has it" in told
    assert "log-likelihood of the right answer" in told


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.2, 0.4, ", an interval that includes guessing"), (0.1, 0.2, ", below guessing"), (0.4, 0.6, "")],
)
def test_a_card_says_so_too(low: float, high: float, words: str) -> None:
    metrics = [Metric("accuracy", 0.3, n=9), Metric("accuracy_low", low), Metric("accuracy_high", high)]
    record = RunRecord(
        id="r", stage="eval-bbh", suite="manual", arm="a", seed=0, testbed="t", started="", seconds=1.0, parents=(),
        settings={"protocol": "chat"}, key="k", model={}, data={}, environment={},
        metrics=(*metrics, Metric("guessing_accuracy", 0.3)),
    )  # fmt: skip
    assert ("eval-bbh: accuracy, chat", f"0.3 (n = 9){words}") in facts_of([record])


def test_prompts_beyond_the_context_are_counted_and_said(home: Path, kallm: Run) -> None:
    config = home / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 300}))
    words = (
        "eval-bbh",
        "model",
        "--source",
        "data",
        "--tasks",
        TASKS,
        "--protocol",
        "fewshot",
        "--max-new-tokens",
        "4",
    )
    code, out, err = kallm(*words)
    assert code == 0, err
    assert "cut_prompts" in out
    assert "their beginnings were left out" in " ".join(out.replace("│", " ").split())


def test_stored_replies_are_read_anew_without_a_model(home: Path, kallm: Run) -> None:
    """The same as if they had been asked for in that reading, since it ends them alike."""
    asked = ask(kallm, "--protocol", "zeroshot", "--max-new-tokens", "8")
    theirs = ask(kallm, "--protocol", "zeroshot", "--max-new-tokens", "8", "--reading", "lm-eval")
    shutil.rmtree(home / "model")
    found = rescore(kallm, asked, "--reading", "lm-eval")
    assert samples(home, found) == samples(home, theirs)
    assert found["metrics"] == theirs["metrics"]
    assert found["settings"] == asked["settings"] | {
        "reading": "lm-eval",
        "asked_for": "fixed",
        "rescored": asked["key"],
    }
    assert found["parents"] == [asked["id"]]
    assert rescore(kallm, asked, "--reading", "lm-eval")["id"] == found["id"]
    assert rescore(kallm, asked) == asked
    for name in ("target_loglikelihood", "likeliest_accuracy"):
        assert values(found)[name] == values(asked)[name]
    assert rescore(kallm, found, "--reading", "fixed")["metrics"] == asked["metrics"]


def test_replies_that_were_better_than_they_were_read_count_when_read_anew(home: Path, kallm: Run) -> None:
    """Completions as a model might give them, put into the store by hand."""
    asked = ask(kallm, "--protocol", "cot-zeroshot", "--max-new-tokens", "2")
    [path] = (home / "results").glob(f"*/*/{asked['id']}.samples.jsonl.gz")
    told = [sample | {"completion": f"the answer is {sample['target']}"} for sample in samples(home, asked)]
    path.write_bytes(gzip.compress("".join(json.dumps(sample) + "\n" for sample in told).encode()))
    found = rescore(kallm, asked)
    assert values(found)["accuracy"] == 1.0 > values(asked)["accuracy"]
    assert found["id"] != asked["id"]
    assert found["settings"]["reading"] == "fixed"


def test_replies_come_with_the_likelihood_of_the_right_answer_unless_one_does_without(home: Path, kallm: Run) -> None:
    words = ("--protocol", "fewshot", "--max-new-tokens", "4")
    with_them, without = ask(kallm, *words), ask(kallm, *words, "--no-likelihoods")
    assert with_them["settings"] == without["settings"] | {"likelihoods": True}
    assert with_them["key"] != without["key"]
    more = {name.partition("/")[0] for name in set(values(with_them)) - set(values(without))}
    assert more == {"target_loglikelihood", "likeliest_guessing"} | {
        f"likeliest_accuracy{end}" for end in ("", "_low", "_high")
    }
    assert values(with_them)["accuracy"] == values(without)["accuracy"]
    assert ask(kallm, *words, "--no-likelihoods")["id"] == without["id"]
    _, out, _ = kallm("eval-bbh", "model", "--source", "data", "--tasks", TASKS, *words)
    low, high, middle = (100 * values(with_them)[f"likeliest_accuracy{end}"] for end in ("_low", "_high", ""))
    assert f"{middle:.1f} % [{low:.1f}, {high:.1f}]" in out
    assert "likeliest_accuracy_low" not in out
    assert kallm("eval-bbh", "--rescore", with_them["id"], "--source", "data", "--no-likelihoods")[0] == 2


def test_a_report_shows_likelihoods_with_their_interval_and_compares_records_with_and_without(
    home: Path, kallm: Run
) -> None:
    """Replies are the same: an arm that was asked in both ways is one arm, and the newer record counts."""
    words = ("--protocol", "fewshot", "--max-new-tokens", "4")
    ask(kallm, *words, "--no-likelihoods")
    found = values(ask(kallm, *words))
    [table] = build_tables(ResultsStore(home / "results"))
    [row, guessing, _] = table.rows
    assert row.figures["target_loglikelihood"].value == pytest.approx(found["target_loglikelihood"])
    assert row.figures["target_loglikelihood"].over == "questions"
    low, high = row.figures["target_loglikelihood"].interval or (0.0, 0.0)
    assert low < found["target_loglikelihood"] < high < 0
    assert row.figures["likeliest_accuracy"].interval == (
        found["likeliest_accuracy_low"], found["likeliest_accuracy_high"]
    )  # fmt: skip
    assert guessing.figures["likeliest_accuracy"].value == found["likeliest_guessing"] == 0.5
    told = to_markdown([table])
    assert "plain mean over the tasks that have choices" in told
    assert "right answer likeliest" in told


def test_stored_likelihoods_are_read_anew_without_a_model(home: Path, kallm: Run) -> None:
    asked = ask(kallm, "--protocol", "leaderboard")
    shutil.rmtree(home / "model")
    found = rescore(kallm, asked, "--reading", "fixed")
    assert found["settings"]["reading"] == "fixed"
    assert found["metrics"] == asked["metrics"]  # these tasks list no options, so that nothing comes out otherwise


def test_what_cannot_be_read_anew_is_refused(home: Path, kallm: Run) -> None:
    asked = ask(kallm, "--protocol", "fewshot", "--reading", "lm-eval", "--max-new-tokens", "2")
    before = sorted((home / "results").rglob("*"))

    def refused(*words: str) -> str:
        code, _, err = kallm("eval-bbh", "--rescore", *words)
        assert code == 1
        assert "Traceback" not in err
        assert sorted((home / "results").rglob("*")) == before
        return " ".join(err.split())

    assert "ask again with --reading fixed" in refused(asked["id"], "--source", "data", "--reading", "fixed")
    assert "Did you mean" in refused(asked["id"][:-1] + "x", "--source", "data")
    assert "'chat' is not" not in refused(asked["id"], "--source", "data", "--reading", "lm_eval")
    assert "other questions" in refused(asked["id"], "--source", "procedural")
    path = home / "data" / "bbh" / "navigate.json"
    path.write_text(path.read_text().replace("Take", "Make", 1))
    assert "other questions than record" in refused(asked["id"], "--source", "data")
    assert kallm("eval-bbh", "--rescore", asked["id"], "--protocol", "chat")[0] == 2
    [stored] = (home / "results").glob(f"*/*/{asked['id']}.samples.jsonl.gz")
    stored.write_bytes(b"gone")
    before = sorted((home / "results").rglob("*"))
    assert "is missing or damaged" in refused(asked["id"], "--source", "data")


BAD: dict[str, tuple[str, str]] = {
    "a missing task file": ("--protocol zeroshot --tasks snarks", "has no bbh/snarks.json; it should be a checkout"),
    "a malformed file": ("--protocol zeroshot --tasks navigate", "does not read as BIG-Bench Hard"),
    "a malformed question": ("--protocol zeroshot --tasks web_of_lies", "question 2 needs an 'input' and a 'target'"),
    "no worked examples": ("--protocol fewshot --tasks object_counting", "no cot-prompts/object_counting.txt"),
    "an unknown task": ("--protocol zeroshot --tasks object_countin", "Did you mean 'object_counting'"),
    "an unknown protocol": ("--protocol leaderbord", "Did you mean 'leaderboard'"),
    "an unknown reading": ("--protocol zeroshot --reading fix", "Did you mean 'fixed'"),
    "a task without choices": ("--protocol leaderboard --tasks word_sorting", "no fixed answers to compare"),
    "no chat template": (
        "--protocol chat --tasks object_counting",
        "--protocol zeroshot asks the same questions in plain",
    ),
    "longer than the context": (
        "--protocol zeroshot --tasks object_counting --max-new-tokens 5000",
        "5000 new tokens; the model's context has 2048",
    ),
    "no such record": ("--rescore 2026", "no record in results '2026'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_a_line_and_leaves_nothing(home: Path, kallm: Run, name: str) -> None:
    words, complaint = BAD[name]
    (home / "data/bbh/navigate.json").write_text("{")
    path = home / "data/bbh/web_of_lies.json"
    examples = json.loads(path.read_text())["examples"]
    path.write_text(json.dumps({"examples": [*examples[:2], {"input": "What?"}, *examples[3:]]}))
    (home / "cot-prompts/object_counting.txt").unlink(missing_ok=True)
    (home / "data/cot-prompts/object_counting.txt").unlink()
    model = () if "--rescore" in words else ("model",)
    code, out, err = kallm("eval-bbh", *model, "--source", "data", *words.split())
    assert (code, out) == (1, "")
    errors = " ".join(err.split()).partition("error: ")[2]
    assert complaint in errors
    assert "Traceback" not in err
    assert not (home / "runs").exists()
    assert not list((home / "results").glob("*/manual/*"))


def test_what_the_reading_of_a_reply_is_based_on_is_in_the_samples(home: Path, kallm: Run) -> None:
    """Every sample says enough to be judged again by hand."""
    from kallm_bench.bbh.protocols import PROTOCOLS
    from kallm_bench.bbh.questions import load_questions

    record = ask(kallm, "--protocol", "zeroshot", "--max-new-tokens", "6", "--batch-invariant", "--batch-size", "3")
    assert record["settings"]["batch_invariant"] is True
    questions = {(q.task, q.index): q for q in load_questions("data", list(QUESTIONS)).questions}
    for sample in samples(home, record):
        question = questions[sample["task"], sample["index"]]
        read = read_reply(PROTOCOLS["zeroshot"], "fixed", question, sample["completion"])
        assert (sample["extracted"], sample["correct"]) == read


SUITE = """
model = "./model"
stages = ["eval-bbh"]
seeds = [0]

[eval]
source = "./data"
tasks = ["navigate", "web_of_lies"]
limit = 3
max_new_tokens = 2

[[arm]]
name = "likelihoods"
eval.protocol = "leaderboard"

[[arm]]
name = "replies"
eval.protocol = "fewshot"
eval.batch_invariant = true
eval.likelihoods = false
"""


def test_a_suite_asks_by_any_protocol(home: Path, kallm: Run) -> None:
    (home / "asked.toml").write_text(SUITE)
    code, _, err = kallm("run", "asked.toml")
    assert code == 0, err
    found = {record.arm: record for record in ResultsStore(home / "results").records()}
    assert found["likelihoods"].settings["protocol"] == "leaderboard"
    assert found["likelihoods"].value("target_loglikelihood") is not None
    assert found["replies"].settings["batch_invariant"] is True
    assert found["replies"].value("target_loglikelihood") is None
    (home / "asked.toml").write_text(SUITE.replace('"web_of_lies"', '"word_sorting"'))
    code, _, err = kallm("run", "asked.toml")
    assert code == 1
    assert "word_sorting' has no fixed answers to compare" in " ".join(err.split())
