"""Asking: every protocol through its engine, the samples that are kept, and runs that were stopped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kallm_bench.bbh.evaluate import EvalSettings, Exam, ask, figures, prepare, reread
from kallm_bench.bbh.plain import replies
from kallm_bench.bbh.readings import read_reply
from kallm_bench.bbh.samples import SAMPLE_FIELDS, Unfinished, has_reply, key_of
from kallm_bench.bbh.stops import Ending
from kallm_bench.errors import BBHError
from kallm_bench.training.processes import Processes

TASKS = ("navigate", "object_counting", "tracking_shuffled_objects_three_objects")


@pytest.fixture(scope="module")
def lively(tiny_llama: Any) -> Any:
    """Two blocks, and weights so large that replies differ and tokens far away matter."""
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=2048)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)
    return model


def exam_of(protocol: str, tokenizer: Any, source: str = "procedural", **settings: Any) -> Exam:
    return prepare(EvalSettings(protocol, source, **({"tasks": TASKS, "limit": 3} | settings)), tokenizer)


@pytest.fixture
def leaderboard(shared_data: Path) -> Exam:
    return exam_of("leaderboard", None, str(shared_data / "data/bbh"))


def test_replies_are_those_of_generate_read_by_the_protocol(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """Asked one at a time by transformers' own generate, beside the same questions asked together."""
    exam = exam_of("cot-zeroshot", None, max_new_tokens=8)
    samples = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "kept.jsonl"), batch_size=4)
    for sample, prompt, question in zip(samples, exam.prompts, exam.questions.questions, strict=True):
        ids = bundled_tokenizer(prompt.text)["input_ids"]
        ending = Ending(frozenset([lively.generation_config.eos_token_id]), prompt.stops, 8)
        [(tokens, _)] = replies(lively, bundled_tokenizer, [ids], [ending])
        reply = ending.cut(bundled_tokenizer.decode(tokens, skip_special_tokens=True))
        assert tuple(sample) == SAMPLE_FIELDS
        assert sample["completion"] == reply
        assert (sample["extracted"], sample["correct"]) == read_reply(exam.protocol, "fixed", question, reply)
        assert sample["prompt_sha256"] == prompt.sha256[:16]
        assert sample["loglikelihoods"] == []
    assert len({sample["completion"] for sample in samples}) > 1


@torch.no_grad()
def test_likelihoods_are_those_of_the_plain_way_and_the_likeliest_a_character_is_the_answer(
    lively: Any, bundled_tokenizer: Any, leaderboard: Exam, tmp_path: Path
) -> None:
    samples = ask(lively, bundled_tokenizer, leaderboard, Unfinished(tmp_path / "kept.jsonl"))
    ranks = set()
    for sample, prompt in zip(samples, leaderboard.prompts, strict=True):
        before = len(bundled_tokenizer(prompt.text)["input_ids"])
        values = []
        for choice in prompt.choices:
            ids = torch.tensor([bundled_tokenizer(f"{prompt.text} {choice}")["input_ids"]])
            predicted = lively(ids).logits[0, before - 1 : -1].log_softmax(-1)
            values.append(predicted.gather(1, ids[0, before:, None]).sum().item())
        assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-4)
        a_character = [value / len(choice) for value, choice in zip(values, prompt.choices, strict=True)]
        assert sample["extracted"] == prompt.choices[a_character.index(max(a_character))]
        assert sample["correct"] is (sample["extracted"] == prompt.target)
        gold = prompt.choices.index(prompt.target)
        assert sample["target_loglikelihood"] == sample["loglikelihoods"][gold]
        assert sample["target_rank"] == 1 + sum(value > a_character[gold] for value in a_character)
        assert sample["completion"] is None
        ranks.add(sample["target_rank"])
    assert len(ranks) > 2
    found = {metric.name: metric for metric in figures(samples, leaderboard.questions, leaderboard.protocol, "lm-eval")}
    for task in TASKS:
        of_task = [sample["target_loglikelihood"] for sample in samples if sample["task"] == task]
        assert found[f"target_loglikelihood/{task}"].value == pytest.approx(sum(of_task) / len(of_task))
        low, high = found[f"accuracy_low/{task}"].value, found[f"accuracy_high/{task}"].value
        assert 0 <= low < found[f"accuracy/{task}"].value + 1e-9
        assert found[f"accuracy/{task}"].value - 1e-9 < high <= 1
    assert "leaderboard_score" in found


@torch.no_grad()
@pytest.mark.parametrize("protocol", ["chat", "zeroshot", "fewshot"])
def test_beside_a_reply_stands_how_likely_the_right_answer_is_in_its_place(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path, protocol: str
) -> None:
    """After the very tokens that a reply is asked with; a reply's own text has no space before it in a template."""
    exam = exam_of(protocol, bundled_tokenizer, str(shared_data / "data/bbh"), max_new_tokens=4)
    samples = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "kept.jsonl"))
    space = "" if protocol == "chat" else " "
    for sample, prompt, question in zip(samples, exam.prompts, exam.questions.questions, strict=True):
        before = bundled_tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        values = []
        for answer in question.choices or [question.target]:
            ids = torch.tensor([before + bundled_tokenizer(space + answer, add_special_tokens=False)["input_ids"]])
            predicted = lively(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
            values.append(predicted.gather(1, ids[0, len(before) :, None]).sum().item())
        assert tuple(sample) == SAMPLE_FIELDS
        assert sample["completion"] is not None
        assert sample["choices"] == list(question.choices)
        if question.choices:
            a_character = [value / len(choice) for value, choice in zip(values, question.choices, strict=True)]
            gold = question.choices.index(question.target)
            assert sample["loglikelihoods"] == pytest.approx(values, abs=1e-4)
            assert sample["target_loglikelihood"] == sample["loglikelihoods"][gold]
            assert sample["target_rank"] == 1 + sum(value > a_character[gold] for value in a_character)
        else:
            assert sample["target_loglikelihood"] == pytest.approx(values[0], abs=1e-4)
            assert (sample["loglikelihoods"], sample["target_rank"]) == ([], None)
    assert len({sample["target_rank"] for sample in samples}) > 2


def test_likelihoods_change_no_reply_and_their_tokens_are_counted(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """And without them samples are what they were before there were any."""
    exam = exam_of("chat", bundled_tokenizer, max_new_tokens=6)
    alone = dataclasses.replace(exam, likelihoods=False)
    both = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "both.jsonl"))
    replies = ask(lively, bundled_tokenizer, alone, Unfinished(tmp_path / "replies.jsonl"))
    lengths = [len(bundled_tokenizer(prompt.text)["input_ids"]) for prompt in exam.prompts]
    nothing = {"loglikelihoods": [], "target_loglikelihood": None, "target_rank": None}
    for one, other in zip(both, replies, strict=True):
        assert one | nothing | {"forwarded_tokens": other["forwarded_tokens"]} == other
        assert one["target_loglikelihood"] is not None
    more = sum(one["forwarded_tokens"] - other["forwarded_tokens"] for one, other in zip(both, replies, strict=True))
    assert 0 < more < sum(lengths) + 2 * max(lengths)


def test_figures_tell_how_likely_right_answers_are_and_how_often_the_likeliest(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """In all, over the tasks that list choices; a free text's likelihood hangs on its length."""
    exam = exam_of("chat", bundled_tokenizer, max_new_tokens=2, limit=5)
    samples = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "kept.jsonl"))
    found = {metric.name: metric for metric in figures(samples, exam.questions, exam.protocol, exam.reading)}
    listing = [task for task in TASKS if task != "object_counting"]
    for task in TASKS:
        mine = [sample for sample in samples if sample["task"] == task]
        mean = sum(sample["target_loglikelihood"] for sample in mine) / 5
        assert found[f"target_loglikelihood/{task}"].value == pytest.approx(mean)
        if task in listing:
            share = sum(sample["target_rank"] == 1 for sample in mine) / 5
            assert found[f"likeliest_accuracy/{task}"].value == pytest.approx(share)
            assert found[f"likeliest_accuracy_low/{task}"].value < found[f"likeliest_accuracy_high/{task}"].value
    assert not any(name.startswith("likeliest") and name.endswith("object_counting") for name in found)
    for name in ("target_loglikelihood", "likeliest_accuracy"):
        of_tasks = [found[f"{name}/{task}"].value for task in listing]
        assert found[name].value == pytest.approx(sum(of_tasks) / 2)
        assert found[name].n == 10
    assert found["likeliest_guessing"].value == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["likeliest_accuracy_low"].value < found["likeliest_accuracy"].value
    assert found["likeliest_accuracy"].value < found["likeliest_accuracy_high"].value


@pytest.mark.parametrize("protocol", ["cot-fewshot", "cot-zeroshot"])
def test_where_a_reply_reasons_first_no_answer_has_a_likelihood(shared_data: Path, protocol: str) -> None:
    exam = exam_of(protocol, None, str(shared_data / "data/bbh"), likelihoods=True)
    assert not exam.likelihoods
    assert "likelihoods" not in exam.described()


def test_a_reply_without_likelihoods_is_described_as_it_was_before_there_were_any(bundled_tokenizer: Any) -> None:
    """So that older records are found; with likelihoods it is another stage, which asks for them."""
    without = exam_of("chat", bundled_tokenizer, likelihoods=False).described()
    assert exam_of("chat", bundled_tokenizer).described() == without | {"likelihoods": True}
    assert set(without) == {
        "protocol", "reading", "tasks", "max_new_tokens", "questions", "prompts", "batch_invariant"
    }  # fmt: skip


@pytest.mark.parametrize("kept", ["likelihoods", "replies"])
@pytest.mark.parametrize("protocol", ["chat", "fewshot"])
def test_half_a_sample_is_half_a_question_done(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path, protocol: str, kept: str
) -> None:
    """Some questions have one half, some both, in any order; only what they lack is asked."""
    exam = exam_of(protocol, bundled_tokenizer, str(shared_data / "data/bbh"), max_new_tokens=4)
    whole = Unfinished(tmp_path / "whole.jsonl")
    samples = ask(lively, bundled_tokenizer, exam, whole, batch_size=2)
    lines = whole.path.read_text().splitlines(keepends=True)
    likelihoods, replies = lines[:9], lines[9:]
    assert all('"completion": null' in line for line in likelihoods)
    assert not any('"completion": null' in line for line in replies)

    stopped = Unfinished(tmp_path / "stopped.jsonl")
    stopped.path.write_text("".join(likelihoods[:7] + replies[:2] if kept == "likelihoods" else replies[:7]))
    before = {"likelihoods": 7 if kept == "likelihoods" else 0, "questions": 2 if kept == "likelihoods" else 7}
    told: dict[str, list[int]] = {"likelihoods": [], "questions": []}
    watch = lambda work, done, total, note="": told[work].append(done)  # noqa: E731
    assert ask(lively, bundled_tokenizer, exam, stopped, watch=watch) == samples
    for work, done in before.items():
        assert list(dict.fromkeys(told[work])) == list(range(done, 10))
    assert len(stopped.path.read_text().splitlines()) == 18


@pytest.mark.parametrize("protocol", ["leaderboard", "cot-zeroshot", "chat"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_stopped_evaluation_asks_only_what_is_missing_and_ends_with_the_same(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path, protocol: str, batch_size: int
) -> None:
    """Stopped while it wrote its fifth line, with another process's lines beside it; another batch size then."""
    exam = exam_of(protocol, bundled_tokenizer, str(shared_data / "data/bbh"), max_new_tokens=8)
    kept = Unfinished(tmp_path / "whole.jsonl")
    exam = dataclasses.replace(exam, likelihoods=False)
    whole = ask(lively, bundled_tokenizer, exam, kept, batch_size=3)
    lines = kept.path.read_text().splitlines(keepends=True)
    assert len(lines) == len(whole) == 9

    stopped = Unfinished(tmp_path / "stopped.jsonl")
    stopped.path.write_text("".join(lines[:4]) + lines[4][:40])
    (tmp_path / "stopped.1.jsonl").write_text(lines[7] + '{"task": "navigate"}\n')
    told: list[int] = []
    watch = lambda work, done, total, note="": told.append(done)  # noqa: E731
    again = ask(lively, bundled_tokenizer, exam, stopped, batch_size=batch_size, watch=watch)
    assert again == whole
    assert list(dict.fromkeys(told)) == [5, 6, 7, 8, 9]
    assert len(stopped.path.read_text().splitlines()) == 8
    assert len(stopped.read()) == 9
    stopped.remove()
    assert list(tmp_path.iterdir()) == [kept.path]


class Part(Processes):
    """One process of two, which hears of nobody but itself."""

    def tell(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("protocol", ["leaderboard", "fewshot"])
def test_of_two_processes_each_asks_a_part(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path, protocol: str
) -> None:
    exam = exam_of(protocol, None, str(shared_data / "data/bbh"), max_new_tokens=4, likelihoods=False)
    second = Unfinished(tmp_path / "second" / "kept.jsonl")
    assert ask(lively, bundled_tokenizer, exam, second, processes=Part(1, 2)) == []
    first = Unfinished(tmp_path / "first" / "kept.jsonl")
    with pytest.raises(KeyError):  # the other's are missing
        ask(lively, bundled_tokenizer, exam, first, processes=Part(0, 2))
    parts = [set(unfinished.read()) for unfinished in (first, second)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {(prompt.task, prompt.index) for prompt in exam.prompts}
    assert min(map(len, parts)) >= 3


def test_of_two_processes_one_may_find_the_likelihoods_and_another_the_reply(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path
) -> None:
    """Whole tasks go to one process, replies in equal parts: the first one joins them, from all files."""
    exam = exam_of("chat", bundled_tokenizer, max_new_tokens=4)
    alone = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "alone.jsonl"))
    first = Unfinished(tmp_path / "both.jsonl")
    ask(lively, bundled_tokenizer, exam, first, processes=Part(1, 2))
    halves = [json.loads(line) for line in (tmp_path / "both.1.jsonl").read_text().splitlines()]
    of_kind = [{key_of(half) for half in halves if has_reply(half) is kind} for kind in (False, True)]
    assert all(of_kind)
    assert of_kind[0] != of_kind[1]
    assert ask(lively, bundled_tokenizer, exam, first) == alone


def test_tokens_forwarded_count_what_is_shared_once(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    settings: dict[str, Any] = {"tasks": ("navigate",), "max_new_tokens": 4, "likelihoods": False}
    exam = exam_of("fewshot", None, str(shared_data / "data/bbh"), **settings)
    samples = ask(lively, bundled_tokenizer, exam, Unfinished(tmp_path / "kept.jsonl"), batch_size=4)
    lengths = [len(bundled_tokenizer(prompt.text)["input_ids"]) for prompt in exam.prompts]
    shared = len(bundled_tokenizer(exam.prompts[0].shared)["input_ids"])
    counted = [sample["forwarded_tokens"] for sample in samples]
    assert lengths[0] <= counted[0] <= lengths[0] + 3
    for count, length in zip(counted[1:], lengths[1:], strict=True):
        assert 0 <= count - (length - shared) <= 4  # a token may reach across the border


@pytest.mark.parametrize("protocol", ["leaderboard", "zeroshot"])
def test_prompts_beyond_the_context_are_cut_counted_and_said(
    tiny_llama: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path, protocol: str
) -> None:
    model = tiny_llama(num_hidden_layers=2, max_position_embeddings=100)
    exam = exam_of(protocol, None, str(shared_data / "data/bbh"), max_new_tokens=4)
    notes: list[str] = []
    watch = lambda work, done, total, note="": notes.append(note)  # noqa: E731
    samples = ask(model, bundled_tokenizer, exam, Unfinished(tmp_path / "kept.jsonl"), watch=watch)
    room = 101 if protocol == "leaderboard" else 96
    for sample, prompt in zip(samples, exam.prompts, strict=True):
        texts = [f"{prompt.text} {choice}" for choice in prompt.choices] or [prompt.text]
        longest = max(len(bundled_tokenizer(text)["input_ids"]) for text in texts)
        assert sample["left_out_tokens"] == max(0, longest - room)
    cut = sum(sample["left_out_tokens"] > 0 for sample in samples)
    assert cut > 0
    assert any(f"{cut} prompts" in note for note in notes)
    found = {metric.name: metric for metric in figures(samples, exam.questions, exam.protocol, exam.reading)}
    assert found["cut_prompts"].value == cut
    assert "longer than the model's context" in found["cut_prompts"].note


def test_likelihoods_are_read_anew_without_a_model(
    lively: Any, bundled_tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    """lm-eval compares the same choices in every question; the fixed reading those that it lists."""
    tasks = {"tasks": ("penguins_in_a_table", "movie_recommendation"), "limit": 164}
    theirs = exam_of("leaderboard", None, str(shared_data / "data/bbh"), **tasks)
    values = [[-float((7 * n + 3 * len(p.question)) % 11) for n in range(len(p.choices))] for p in theirs.prompts]
    samples = [
        {"task": p.task, "index": p.index, "choices": list(p.choices), "loglikelihoods": each}
        for p, each in zip(theirs.prompts, values, strict=True)
    ]
    found = reread(samples, theirs.questions, theirs.protocol, "fixed", "lm-eval")
    assert len(found) == len(samples) - 1  # question 163 of movie_recommendation has no right choice
    listed = {(q.task, q.index): list(q.options) for q in theirs.questions.questions}
    for sample in found:
        assert sample["choices"] == listed[sample["task"], sample["index"]]
        assert len(sample["loglikelihoods"]) == len(sample["choices"])
        best = max(sample["loglikelihoods"])
        assert sample["extracted"] == sample["choices"][sample["loglikelihoods"].index(best)]
    assert any(len(sample["choices"]) < 5 for sample in found if sample["task"] == "movie_recommendation")
    with pytest.raises(BBHError, match=r"59: \(E\) was not compared; ask again with --reading lm-eval"):
        reread(found, theirs.questions, theirs.protocol, "lm-eval", "fixed")


def test_padding_changes_no_reply(bundled: Any, tmp_path: Path) -> None:
    """Prompts of different length, alone and beside each other, on the real model."""
    model, tokenizer = bundled
    tasks = ("boolean_expressions", "navigate", "word_sorting")
    exam = exam_of("chat", tokenizer, tasks=tasks, limit=1, max_new_tokens=6, likelihoods=False)
    found = []
    for batch_size in (1, 3):
        kept = Unfinished(tmp_path / f"{batch_size}.jsonl")
        found.append([each["completion"] for each in ask(model, tokenizer, exam, kept, batch_size=batch_size)])
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_only_replies_can_depend_on_the_batch(shared_data: Path) -> None:
    replying = exam_of("zeroshot", None)
    assert replying.described()["batch_invariant"] is False
    assert dataclasses.replace(replying, batch_invariant=True).described() != replying.described()
    assert "batch_invariant" not in exam_of("leaderboard", None, str(shared_data / "data/bbh")).described()
