"""lm-eval's five protocols: prompts byte for byte, replies read as it reads them or better, its averages."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval_bbh
import numpy as np
import pytest
from conftest import Run

from kallm_bench.bbh.aggregate import leaderboard_score, mean_and_error
from kallm_bench.bbh.evaluate import Exam, ask, reread
from kallm_bench.bbh.fixed_reading import read_fixed
from kallm_bench.bbh.lm_eval_reading import INVALID, answers, cut, number_in_words
from kallm_bench.bbh.prompts import Prompt, build_prompts, fingerprint
from kallm_bench.bbh.protocols import LM_EVAL_PROTOCOLS, PROTOCOLS, find_protocol
from kallm_bench.bbh.questions import QuestionSet, load_questions
from kallm_bench.bbh.readings import by_likelihood, read_reply
from kallm_bench.bbh.samples import SAMPLE_FIELDS, Unfinished
from kallm_bench.bbh.scores import score, score_as_lm_eval
from kallm_bench.bbh.tasks import TASKS, Question
from kallm_bench.errors import BBHError
from kallm_bench.models import save_checkpoint

GOLDEN = Path(__file__).parent / "golden"
REPLIES = [json.loads(line) for line in (GOLDEN / "replies.jsonl").read_text().splitlines()]
"""Replies with what lm-eval's filters and the fixed reading find in them: every fault that is known, and plain ones."""

REPLYING = [name for name in LM_EVAL_PROTOCOLS if not PROTOCOLS[name].compared]

oracle = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install lm-eval word2number"
)

NAVIGATE = "Given a series of navigation instructions, determine whether one would end up back at the starting point."
WORKED = "".join(
    f"\n\nQ: Take {steps} steps.\nA: Let's think step by step.{gap}You end at {steps}.\nSo the answer is {word}."
    for steps, gap, word in ((1, "\n", "No"), (0, " ", "Yes"), (2, "\n", "No"), (9, "\n", "No"))
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout of the repository with one question of our own, and four worked ones, of which three are shown."""
    (tmp_path / "bbh").mkdir()
    (tmp_path / "cot-prompts").mkdir()
    examples = [{"input": "Take 5 steps.\nOptions:\n- Yes\n- No", "target": "No"}]
    (tmp_path / "bbh/navigate.json").write_text(json.dumps({"examples": examples}))
    (tmp_path / "cot-prompts/navigate.txt").write_text(f"Never train on this.\n-----\n{NAVIGATE}{WORKED}")
    return tmp_path


def build(folder: Path | str, name: str, *tasks: str, reading: str | None = None) -> list[Prompt]:
    protocol = PROTOCOLS[name]
    return build_prompts(load_questions(str(folder), tasks, among=protocol.tasks), protocol, None, reading)


QUESTION = "Q: Take 5 steps.\nOptions:\n- Yes\n- No\nA:"
THINK = " Let's think step by step."
SHORT = "Q: Take 1 steps.\nA: No\n\nQ: Take 0 steps.\nA: Yes\n\nQ: Take 2 steps.\nA: No\n\n"
LONG = (
    f"Q: Take 1 steps.\nA:{THINK}\nYou end at 1.\nSo the answer is No.\n\n"
    f"Q: Take 0 steps.\nA:{THINK}\nYou end at 0.\nSo the answer is Yes.\n\n"
    f"Q: Take 2 steps.\nA:{THINK}\nYou end at 2.\nSo the answer is No.\n\n"
)


@pytest.mark.parametrize(
    ("name", "shared", "question"),
    [
        ("leaderboard", f"{NAVIGATE}{SHORT}", QUESTION),
        ("zeroshot", f"{NAVIGATE}\n\n", QUESTION),
        ("fewshot", f"{NAVIGATE}\n\n{SHORT}", QUESTION),
        ("cot-fewshot", f"{NAVIGATE}\n\n{LONG}", f"{QUESTION}{THINK}\n"),
        ("cot-zeroshot", f"{NAVIGATE}\n\n", f"{QUESTION}{THINK}"),
    ],
)
def test_each_protocol_puts_a_question_in_its_own_way(folder: Path, name: str, shared: str, question: str) -> None:
    [prompt] = build(folder, name, "navigate")
    assert (prompt.shared, prompt.question, prompt.target) == (shared, question, "No")
    assert prompt.choices == (("Yes", "No") if name == "leaderboard" else ())
    assert prompt.max_new_tokens == {"leaderboard": 0, "cot-fewshot": 1024}.get(name, 256)


def digest(prompts: list[Prompt]) -> dict[str, str]:
    """Task -> sha256 over all that a model gets: prompt, what may follow, where a reply ends."""
    whole: dict[str, Any] = {}
    for prompt in prompts:
        follows = [f" {choice}" for choice in prompt.choices]
        ends = [] if follows else [prompt.max_new_tokens, *prompt.stops]
        line = json.dumps([prompt.text, follows, ends]).encode() + b"\n"
        whole.setdefault(prompt.task, hashlib.sha256()).update(line)
    return {task: each.hexdigest() for task, each in whole.items()}


@pytest.mark.parametrize("name", LM_EVAL_PROTOCOLS)
def test_every_prompt_is_lm_evals_byte_for_byte(shared_data: Path, name: str) -> None:
    """All 31,805 of them, against digests that lm-eval gave; the long test asks it again."""
    expected = json.loads((GOLDEN / "bbh_prompts.json").read_text())[name]
    prompts = build(shared_data / "data/bbh", name, reading="lm-eval")
    assert digest(prompts) == expected
    assert len(prompts) == (5761 if name == "leaderboard" else 6511)


def test_what_questions_share_comes_first(shared_data: Path, bundled_tokenizer: Any) -> None:
    questions = load_questions(str(shared_data / "data/bbh"), limit=3)
    for name, protocol in PROTOCOLS.items():
        asked = load_questions(str(shared_data / "data/bbh"), limit=3, among=protocol.tasks)
        prompts = build_prompts(asked, protocol, bundled_tokenizer)
        assert len({(prompt.task, prompt.shared) for prompt in prompts}) == len(protocol.tasks), name
        texts = {(question.task, question.index): question.text for question in questions.questions}
        assert all(texts[prompt.task, prompt.index] in prompt.question for prompt in prompts), name
        assert all(prompt.templated is (name == "chat") for prompt in prompts)


def case(row: dict[str, Any]) -> tuple[Question, str, Any]:
    return Question(row["task"], 0, row["question"], row["target"]), row["reply"], PROTOCOLS[row["protocol"]]


@pytest.mark.parametrize("row", REPLIES, ids=lambda row: f"{row['protocol']}: {row['reply']!r}")
def test_replies_are_read_as_lm_eval_reads_them_or_without_its_faults(row: dict[str, Any]) -> None:
    question, reply, protocol = case(row)
    found = answers(protocol.name, question, cut(reply, protocol.stops["lm-eval"]))
    if row["lm-eval"]:
        assert {kind: list(answer) for kind, answer in found.items()} == row["lm-eval"]
    else:
        assert found["flexible-extract"] == (INVALID, False)  # lm-eval crashes: "a million thousand" is no number
    first, right = next(iter(found.values()))
    assert read_reply(protocol, "lm-eval", question, reply) == (None if first == INVALID else first, right)
    assert read_reply(protocol, "fixed", question, reply) == (row["fixed"], row["fixed"] == question.target)


def test_the_golden_replies_hold_each_fault() -> None:
    """lm-eval finds the wrong thing in so many of them, and the fixed reading in none of those."""
    faulty = [
        row for row in REPLIES if row["fixed"] == row["target"] and not any(r for _, r in row["lm-eval"].values())
    ]
    assert {row["protocol"] for row in faulty} == set(REPLYING)
    assert len(faulty) >= 20


@pytest.mark.parametrize("name", REPLYING)
def test_every_target_of_the_real_data_can_be_given(shared_data: Path, name: str) -> None:
    protocol = PROTOCOLS[name]
    for question in load_questions(str(shared_data / "data/bbh")).questions:
        for reply in (f"So the answer is {question.target}.", f"the answer is {question.target}"):
            assert read_reply(protocol, "fixed", question, reply) == (question.target, True), question
        if name != "cot-fewshot":
            reply = f" {question.target}"
            assert read_reply(protocol, "fixed", question, reply) == (question.target, True), question


@pytest.mark.parametrize(
    ("text", "value"),
    [("eight", 8), ("two hundred and five", 205), ("twenty one", 21), ("three thousand", 3000), ("million", 10**6)],
)
def test_numbers_in_words(text: str, value: int) -> None:
    assert number_in_words(text) == value


def test_choices_are_ordered_by_characters_and_as_they_came_where_equal() -> None:
    assert by_likelihood(["no", "yes"], [-2.0, -3.0]) == [0, 1]
    assert by_likelihood(["no", "yes"], [-2.0, -2.9]) == [1, 0]
    assert by_likelihood(["no", "not plausible", "yes"], [-1.0, -6.0, -6.0]) == [1, 0, 2]


def test_averages_are_those_over_questions() -> None:
    """Against numpy, and the normalised score against one worked by hand: (0.75 - 0.5) / 0.5 and 0.2 below 0.25."""
    scores = {"navigate": [1.0, 0.0, 1.0, 1.0], "snarks": [0.0, 1.0], "temporal_sequences": [0.0, 0.0, 1.0]}
    mean, error = mean_and_error(scores)
    everything = np.concatenate(list(scores.values()))
    within = sum(((np.array(values) - np.mean(values)) ** 2).sum() for values in scores.values())
    weighted = sum(len(v) * ((np.array(v) - np.mean(v)) ** 2).sum() / len(v) for v in scores.values())
    assert within == pytest.approx(weighted)
    assert mean == pytest.approx(everything.mean())
    assert error == pytest.approx(np.sqrt(within / (9 - 3) / 9))
    assert mean_and_error({"navigate": [1.0], "snarks": [0.0, 1.0]}) == (pytest.approx(2 / 3), None)
    accuracies, choices = {"navigate": 0.75, "temporal_sequences": 0.2}, {"navigate": 2, "temporal_sequences": 4}
    assert leaderboard_score(accuracies, choices) == pytest.approx(25.0)


def test_guessing_on_the_leaderboard_is_what_was_measured_independently(shared_data: Path) -> None:
    """Macro means over its 24 tasks: uniform 29.17 %, majority 33.72 %. All right is 100, and 5,758 can be."""
    protocol = PROTOCOLS["leaderboard"]
    questions = load_questions(str(shared_data / "data/bbh"), among=protocol.tasks)
    samples = [
        dict.fromkeys(SAMPLE_FIELDS)
        | {
            "task": q.task,
            "index": q.index,
            "correct": q.target in protocol.choices(q, "lm-eval"),
            "left_out_tokens": 0,
            "forwarded_tokens": 0,
        }
        for q in questions.questions
    ]
    guessing = score(samples, questions, lambda question: protocol.guessable(question, "lm-eval"))
    found = [*guessing, *score_as_lm_eval(samples, leaderboard=True)]
    figures = {metric.name: metric.value or 0.0 for metric in found}
    assert 100 * figures["guessing_accuracy"] == pytest.approx(29.17, abs=0.01)
    assert 100 * figures["majority_accuracy"] == pytest.approx(33.72, abs=0.01)
    assert figures["question_accuracy"] == pytest.approx(5758 / 5761)
    assert 99.5 < figures["leaderboard_score"] < 100


def test_the_fixed_leaderboard_compares_what_a_question_lists(shared_data: Path) -> None:
    protocol = PROTOCOLS["leaderboard"]
    questions = load_questions(str(shared_data / "data/bbh"), among=protocol.tasks).questions
    left_out = [(q.task, q.index) for q in questions if not protocol.can_answer(q, "fixed")]
    assert left_out == [("movie_recommendation", 163), ("ruin_names", 99), ("ruin_names", 144), ("snarks", 88)]
    assert all(protocol.can_answer(question, "lm-eval") for question in questions)
    penguin = Question("penguins_in_a_table", 0, "Who?\nOptions:\n(A) Louis\n(B) Bernard", "(B)")
    assert protocol.choices(penguin, "fixed") == ("(A)", "(B)")
    assert protocol.choices(penguin, "lm-eval") == ("(A)", "(B)", "(C)", "(D)", "(E)")
    assert len(protocol.choices(Question("object_counting", 0, "How many?", "3"), "fixed")) == 19


def replies_in(model: Any, tokenizer: Any, questions: QuestionSet, reading: str, partial: Path) -> list[dict[str, Any]]:
    protocol = PROTOCOLS["cot-zeroshot"]
    prompts = build_prompts(questions, protocol, None, reading, 8)
    return ask(model, tokenizer, Exam(protocol, reading, questions, tuple(prompts), 8), Unfinished(partial))


def test_stored_replies_are_read_anew_without_a_model(tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path) -> None:
    questions = load_questions("procedural", tasks=["navigate", "object_counting"], limit=3)
    model, protocol = tiny_llama(), PROTOCOLS["cot-zeroshot"]
    kept = {
        reading: replies_in(model, bundled_tokenizer, questions, reading, tmp_path / reading)
        for reading in ("fixed", "lm-eval")
    }
    assert [sample["prompt_sha256"] for sample in kept["fixed"]] == [
        prompt.sha256[:16] for prompt in build_prompts(questions, protocol)
    ]
    assert reread(kept["fixed"], questions, protocol, "lm-eval", "fixed") == kept["lm-eval"]
    told = [sample | {"completion": f" the answer is {sample['target']}"} for sample in kept["lm-eval"]]
    assert [sample["correct"] for sample in reread(told, questions, protocol, "fixed", "lm-eval")] == [True] * 6
    with pytest.raises(BBHError, match="ask again with --reading fixed"):
        reread(told, questions, PROTOCOLS["cot-fewshot"], "fixed", "lm-eval")
    fewer = load_questions("procedural", tasks=["navigate", "object_counting"], limit=2)
    with pytest.raises(BBHError, match="no question 2 of task 'navigate'"):
        reread(told, fewer, protocol, "fixed", "fixed")


def test_what_is_asked_has_a_fingerprint(folder: Path) -> None:
    before = {name: fingerprint(build(folder, name, "navigate")) for name in LM_EVAL_PROTOCOLS}
    assert len(set(before.values())) == 5
    assert fingerprint(build(folder, "fewshot", "navigate", reading="lm-eval")) != before["fewshot"]
    examples = folder / "cot-prompts/navigate.txt"
    examples.write_text(examples.read_text().replace("Take 2 steps", "Take 3 steps"))
    changed = {name for name in before if fingerprint(build(folder, name, "navigate")) != before[name]}
    assert changed == {"leaderboard", "fewshot", "cot-fewshot"}


def test_what_cannot_be_asked_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KALLM_BBH_DIR", raising=False)
    with pytest.raises(BBHError, match="Did you mean 'cot-fewshot'"):
        find_protocol("cot_fewshot")
    with pytest.raises(BBHError, match="Did you mean 'lm-eval'"):
        PROTOCOLS["zeroshot"].find_reading("lm_eval")
    with pytest.raises(BBHError, match="'chat' is not lm-eval's"):
        PROTOCOLS["chat"].find_reading("fixed")
    with pytest.raises(BBHError, match="task 'word_sorting' has no fixed answers to compare"):
        load_questions("procedural", ["word_sorting"], among=PROTOCOLS["leaderboard"].tasks)
    questions = load_questions("procedural", ["navigate"], limit=1)
    with pytest.raises(BBHError, match="which procedural does not carry; run `kallm fetch bbh`"):
        build_prompts(questions, PROTOCOLS["fewshot"])
    for tokenizer in (None, dataclasses.make_dataclass("Plain", ["chat_template"])(None)):
        with pytest.raises(BBHError, match="--protocol zeroshot asks the same questions in plain text"):
            build_prompts(questions, PROTOCOLS["chat"], tokenizer)


def test_worked_examples_may_lie_beside_other_questions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALLM_BBH_DIR", str(folder))
    [prompt] = build_prompts(load_questions("procedural", ["navigate"], limit=1), PROTOCOLS["fewshot"])
    assert prompt.shared == f"{NAVIGATE}\n\n{SHORT}"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (None, r"no cot-prompts/navigate\.txt"),
        (lambda text: text.replace("-----", "==="), "no line of dashes"),
        (lambda text: text.partition("\n\nQ: Take 2")[0], "2 worked questions"),
        (lambda text: text.replace("0 steps.\nA: Let's", "0 steps.\nA: Let us"), "question 2 is not followed by"),
        (lambda text: text.replace("answer is Yes", "answer was Yes"), "the reasoning of question 2 has no"),
        (lambda text: b"\xff", "cannot be read"),
    ],
)
def test_worked_examples_that_are_none_are_named(folder: Path, change: Any, complaint: str) -> None:
    path = folder / "cot-prompts/navigate.txt"
    told = change(path.read_text()) if change else None
    path.unlink()
    if told is not None:
        path.write_bytes(told if isinstance(told, bytes) else told.encode())
    with pytest.raises(BBHError, match=complaint) as refused:
        build(folder, "fewshot", "navigate")
    assert "navigate.txt" in str(refused.value)
    assert build(folder, "zeroshot", "navigate")  # needs none of it


def test_the_command_writes_prompts_and_asks_nothing(folder: Path, tmp_path: Path, kallm: Run) -> None:
    words = ("eval-bbh", "--source", str(folder), "--tasks", "navigate", "--prompts-only")
    code, out, err = kallm(*words, "--out", str(tmp_path / "all.jsonl"))
    assert (code, err) == (0, "")
    assert "5 prompts in" in out
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines] == list(LM_EVAL_PROTOCOLS)
    expected = ["protocol", "task", "index", "prompt", "choices", "target", "prompt_sha256"]
    for line in lines:
        assert list(line) == expected
        assert line["prompt_sha256"] == hashlib.sha256(line["prompt"].encode()).hexdigest()
    assert [line["choices"] for line in lines] == [["Yes", "No"], [], [], [], []]

    one = tmp_path / "one.jsonl"
    code, out, _ = kallm(*words, "--protocol", "zeroshot", "--json", "--out", str(one))
    assert json.loads(out) == {"out": str(one), "prompts": {"zeroshot": 1}}
    assert one.read_text() == (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)[1]
    assert kallm(*words)[0] == 2
    assert kallm("eval-bbh", "--out", str(one))[0] == 2
    code, _, err = kallm(*words, "--protocol", "chat", "--reading", "lm-eval", "--out", str(tmp_path / "no.jsonl"))
    assert (code, (tmp_path / "no.jsonl").exists()) == (1, False)
    assert "has only its own reading" in err


def test_a_record_says_how_replies_were_read(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, kallm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "base", tiny_llama(), bundled_tokenizer)
    words = ("eval-bbh", "base", "--source", "procedural", "--tasks", "navigate", "--limit", "2")
    found = {}
    for protocol, *reading in (["chat"], ["zeroshot"], ["zeroshot", "--reading", "lm-eval"]):
        code, out, err = kallm(*words, "--max-new-tokens", "2", "--json", "--protocol", protocol, *reading)
        assert code == 0, err
        [found[protocol, *reading[1:]]] = json.loads(out)
    settings = {name: record["settings"] for name, record in found.items()}
    assert [each["reading"] for each in settings.values()] == ["chat", "fixed", "lm-eval"]
    assert len({record["key"] for record in found.values()}) == 3
    measured = {name: {metric["name"] for metric in record["metrics"]} for name, record in found.items()}
    assert measured["zeroshot",] - measured["chat",] == {"question_accuracy", "question_accuracy_error"}


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Asks lm-eval, in a process of its own: what, with what -> its answer."""
    home = str(tmp_path_factory.mktemp("lm-eval"))

    def ask_it(what: str, given: Any) -> Any:
        done = subprocess.run(
            [sys.executable, lm_eval_bbh.__file__, what],
            input=json.dumps(given),
            env=os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return ask_it


@pytest.mark.long
@oracle
def test_lm_eval_gives_the_golden_prompts(lm_eval: Any, shared_data: Path) -> None:
    golden = json.loads((GOLDEN / "bbh_prompts.json").read_text())
    assert lm_eval("prompts", str(shared_data / "data/bbh")) == golden


PIECES = [
    "the answer is", "The answer is", "The answer:", "The final answer:", " ", "\n", "\n\n", ".", ",", ":", '"', "\\",
    "(A)", "(B)", "(C)", "(Z)", "B", "A", "Yes", "No", "yes", "no", "True", "False", "not", "valid", "invalid", "[",
    "] )", "{ }", "<", "> >", "plausible", "not plausible", "tells the truth", "does not tell the truth", "Q", "Q:",
    "8", "-8", "- 8", "1,024", "12.5", "eight", "none", "twenty", "one hundred and", "thousand", "million", "seventeen",
    "oven", "costume", "Counterpart", "counterpart", "Louis", "bernard", "Vincent.", "</s>", "<|im_end|>", "ß", "İ",
]  # fmt: skip


@pytest.mark.long
@oracle
def test_lm_eval_reads_replies_alike(lm_eval: Any, shared_data: Path) -> None:
    """The golden replies, and 6,000 put together at random for real questions: not one is read otherwise."""
    rows = [[row[key] for key in ("protocol", "task", "question", "target", "reply")] for row in REPLIES]
    assert lm_eval("read", rows) == [row["lm-eval"] for row in REPLIES]
    dice = random.Random(0)
    questions = load_questions(str(shared_data / "data/bbh")).questions
    for _ in range(6000):
        question = dice.choice(questions)
        known = [*PIECES, *question.options.values(), question.target]
        reply = "".join(f"{dice.choice(known)}{dice.choice(['', ' ', ' '])}" for _ in range(dice.randint(1, 8)))
        rows.append([dice.choice(REPLYING), question.task, question.text, question.target, reply])
    for (name, task, text, target, reply), theirs in zip(rows, lm_eval("read", rows), strict=True):
        question = Question(task, 0, text, target)
        ours = answers(name, question, cut(reply, PROTOCOLS[name].stops["lm-eval"]))
        if theirs:
            assert {kind: list(found) for kind, found in ours.items()} == theirs, (name, task, reply)
        else:
            assert ours["flexible-extract"] == (INVALID, False), (name, task, reply)


@pytest.mark.long
@oracle
def test_numbers_and_averages_are_lm_evals(lm_eval: Any) -> None:
    dice = random.Random(0)
    words = ("one", "two", "five", "eleven", "twenty", "ninety", "hundred", "thousand", "million", "billion", "and")
    texts = [" ".join(dice.choices(words, k=dice.randint(1, 7))) for _ in range(3000)]
    for text, theirs in zip(texts, lm_eval("numbers", texts), strict=True):
        try:
            ours = number_in_words(text)
        except (ValueError, IndexError):
            ours = None
        assert ours == theirs, text
    scores = {task: [float(dice.random() < 0.3) for _ in range(dice.randint(2, 250))] for task in TASKS}
    assert mean_and_error(scores) == pytest.approx(lm_eval("aggregate", scores), rel=1e-12)


def test_what_follows_a_fallback_is_still_read() -> None:
    """A phrase without an answer in it does not hide one elsewhere, but for a chain that had examples."""
    question = Question("navigate", 0, "", "No")
    assert read_fixed("cot-zeroshot", question, "No. So the answer is clear.") == "No"
    assert read_fixed("cot-fewshot", question, "No. So the answer is clear.") is None
