"""The chat protocol to the letter: prompts, and answers read out of awkward replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kallm_bench.bbh.extraction import is_right, read_answer
from kallm_bench.bbh.prompts import build_prompts
from kallm_bench.bbh.protocols import PROTOCOLS, find_protocol
from kallm_bench.bbh.questions import QuestionSet, load_questions
from kallm_bench.bbh.samples import SAMPLE_FIELDS
from kallm_bench.bbh.scores import score
from kallm_bench.bbh.tasks import TASKS, Question
from kallm_bench.errors import BBHError

SNARKS = "Which statement is sarcastic?\nOptions:\n(A) He's a generous person\n(B) He's a terrible person"
PENGUINS = "Which is the oldest penguin?\nOptions:\n(A) Louis\n(B) Bernard\n(C) Vincent\n(D) Gwen\n(E) James"
COLOURS = "What color is it?\nOptions:\n" + "\n".join(
    f"({letter}) {name}"
    for letter, name in zip(
        "ABCDEFGHI", ["blue", "red", "teal", "gold", "pink", "gray", "mauve", "brown", "black"], strict=True
    )
)
NESTED = "Find a movie similar to these:\nOptions:\n(A) Batman\n(B) Batman Returns\n(C) 12\n(D) 2"

GOLDEN: list[tuple[str, str, str, str | None, bool]] = [
    # (question, target, reply, what is read, right)
    (PENGUINS, "(B)", "(B)", "(B)", True),
    (PENGUINS, "(B)", "The oldest penguin is (B) Bernard, not (A) Louis.", "(B)", True),
    (PENGUINS, "(B)", "Options (A) and (B) are close, but it is (B).", "(A)", False),  # the first counts
    (PENGUINS, "(B)", "(Z)", "(Z)", False),
    (PENGUINS, "(B)", "B", "(B)", True),
    (PENGUINS, "(B)", "B.", "(B)", True),
    (PENGUINS, "(B)", "B) Bernard", "(B)", True),
    (PENGUINS, "(B)", "**B**", "(B)", True),
    (PENGUINS, "(B)", 'The answer is "B".', "(B)", True),
    (PENGUINS, "(A)", "A penguin called Gwen.", "(D)", False),  # an article is no option
    (PENGUINS, "(A)", "I think it is A", "(A)", True),
    (PENGUINS, "(A)", "Option A is correct.", "(A)", True),
    (PENGUINS, "(A)", "A and not B", "(A)", True),
    (PENGUINS, "(A)", "B, because he is eight", "(B)", False),
    (COLOURS, "(A)", "I'm not sure, but blue", "(A)", True),
    (COLOURS, "(A)", "I'd say blue.", "(A)", True),
    (COLOURS, "(B)", "Q: color? A: red", "(B)", True),
    (PENGUINS, "(C)", "It is Vincent.", "(C)", True),
    (PENGUINS, "(C)", "It is vincent.", None, False),  # exact text only
    (PENGUINS, "(C)", "Louise is older", None, False),  # not a part of a word
    (PENGUINS, "(C)", "", None, False),
    (PENGUINS, "(C)", "I don't know.", None, False),
    (NESTED, "(B)", "You may like Batman Returns!", "(B)", True),  # the longest option that is there
    (NESTED, "(C)", "12", "(C)", True),
    (SNARKS, "(A)", "He's a terrible person", "(B)", False),
]

GOLDEN_WORDS: list[tuple[str, str, str, str | None, bool]] = [
    # (task, target, reply, what is read, right)
    ("boolean_expressions", "False", "The expression is false, since not True is false.", "False", True),
    ("boolean_expressions", "True", "TRUE", "True", True),
    ("boolean_expressions", "True", "Untrue? Falsehood!", None, False),
    ("navigate", "No", "No, you do not return. Yes would be wrong.", "No", True),
    ("navigate", "No", "Nothing can be said.", None, False),
    ("sports_understanding", "yes", "Yes.", "yes", True),
    ("formal_fallacies", "invalid", "The argument is invalid.", "invalid", True),
    ("formal_fallacies", "valid", "deductively valid", "valid", True),
    ("object_counting", "8", "8.", "8", True),
    ("object_counting", "8", " The 8 ", "8", True),
    ("object_counting", "8", "You have 8 fruits.", "you have 8 fruits", False),
    ("object_counting", "8", ".", None, False),
    ("multistep_arithmetic_two", "-8", "-8", "-8", True),
    ("multistep_arithmetic_two", "-8", "8", "8", False),  # a minus sign has meaning
    ("multistep_arithmetic_two", "1024", "1,024", "1024", True),
    ("multistep_arithmetic_two", "3", "5 - 2", "5 2", False),
    ("dyck_languages", "] )", "])", "])", False),
    ("dyck_languages", "] )", " ]  )\n", "] )", True),
    ("dyck_languages", "] )", "] }", "] }", False),  # or any reply without letters were right
    ("word_sorting", "alpha beta it's", "Alpha, beta, its", "alpha beta its", True),
    ("word_sorting", "alpha beta", "beta alpha", "beta alpha", False),
]


@pytest.mark.parametrize(("text", "target", "reply", "read", "right"), GOLDEN)
def test_options_are_read(text: str, target: str, reply: str, read: str | None, right: bool) -> None:
    question = Question("penguins_in_a_table", 0, text, target)
    assert read_answer(question, reply) == read
    assert is_right(question, read) is right


@pytest.mark.parametrize(("task", "target", "reply", "read", "right"), GOLDEN_WORDS)
def test_words_and_free_text_are_read(task: str, target: str, reply: str, read: str | None, right: bool) -> None:
    question = Question(task, 0, "", target)
    assert read_answer(question, reply) == read
    assert is_right(question, read) is right


def test_every_target_of_the_real_data_is_right_when_given_as_the_reply(shared_data: Path) -> None:
    found = load_questions(str(shared_data / "data/bbh"))
    questions = found.questions
    assert found.source == "BIG-Bench Hard"
    assert len(questions) == 6511
    out_of_reach = {("movie_recommendation", 163), ("ruin_names", 99), ("ruin_names", 144)}  # gold is no option
    for question in questions:
        right = is_right(question, read_answer(question, question.target))
        assert right is ((question.task, question.index) not in out_of_reach), question


def test_descriptions_are_those_of_the_prompt_files(shared_data: Path) -> None:
    for task in TASKS.values():
        text = (shared_data / "data/bbh/cot-prompts" / f"{task.name}.txt").read_text()
        assert text.partition("-----\n")[2].partition("\n\nQ: ")[0] == task.description


def test_guessing_and_majority_are_what_was_measured_independently(shared_data: Path) -> None:
    """Macro means over all 27 tasks: uniform 26.63 %, majority 30.44 %."""
    questions = load_questions(str(shared_data / "data/bbh"))
    nothing = [
        dict.fromkeys(SAMPLE_FIELDS)
        | {"task": q.task, "index": q.index, "correct": False, "left_out_tokens": 0, "forwarded_tokens": 0}
        for q in questions.questions
    ]
    figures = {metric.name: metric.value for metric in score(nothing, questions)}
    assert 100 * (figures["guessing_accuracy"] or 0) == pytest.approx(26.63, abs=0.01)
    assert 100 * (figures["majority_accuracy"] or 0) == pytest.approx(30.44, abs=0.01)
    assert figures["accuracy"] == 0
    assert figures["invalid_rate"] == 1


def test_the_prompt_is_one_user_turn_below_the_default_system_prompt(bundled_tokenizer: Any) -> None:
    question = Question("web_of_lies", 0, "Question: Ada lies. Does Ada tell the truth?", "No")
    [prompt] = build_prompts(QuestionSet("ours", (question,), {}), PROTOCOLS["chat"], bundled_tokenizer)
    assert prompt.text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nEvaluate a random boolean function expressed as a word problem.\n\n"
        "Question: Ada lies. Does Ada tell the truth?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_cannot_be_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BBHError, match="Did you mean 'chat'"):
        find_protocol("chatt")
    with pytest.raises(BBHError, match="Did you mean 'snarks'"):
        load_questions("procedural", tasks=["snark"])
    with pytest.raises(BBHError, match=r"no bbh/boolean_expressions\.json"):
        load_questions(str(tmp_path))
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "snarks.json").write_text('{"examples": [{"input": "?"}]}')
    with pytest.raises(BBHError, match="question 0 needs"):
        load_questions(str(tmp_path), tasks=["snarks"])
    (tmp_path / "bbh" / "snarks.json").write_text("{")
    with pytest.raises(BBHError, match="does not read"):
        load_questions(str(tmp_path), tasks=["snarks"])
    (tmp_path / "bbh" / "snarks.json").write_text('{"examples": [{"input": "?", "target": "(A)"}]}')
    assert load_questions(str(tmp_path), tasks=["snarks"]).source == f"{tmp_path.name}, not as published"
    monkeypatch.setenv("KALLM_BBH_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(BBHError, match="no folder"):
        load_questions(None)  # never silently procedural


def test_a_limit_keeps_the_first_questions_and_the_majority_of_all() -> None:
    few, many = (load_questions("procedural", tasks=["navigate"], limit=limit) for limit in (3, 50))
    assert few.questions == many.questions[:3]
    assert few.majority == many.majority == {"navigate": "No"}
    assert few.fingerprint != many.fingerprint
    assert isinstance(few, QuestionSet)
    assert few.source == "procedural"
