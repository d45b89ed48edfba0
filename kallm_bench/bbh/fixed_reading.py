r"""Reading replies under lm-eval's protocols without lm-eval's faults.

Where a reply says "the answer is", what follows on that line is read, the first such line, or the last one after a
chain of thought without examples; a chain of thought with examples must say it. Without it the whole reply is read, for
the first thing that looks like an answer to this kind of question, or the last one after a chain of thought.

An answer then has the same form whatever stands around it: an option is its letter, a number has no commas and keeps
its minus sign, a number may be a word, a word is written as the task writes it, brackets are parted by single spaces.
The three questions of BIG-Bench Hard whose gold answer is none of their options take that answer's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kallm_bench.bbh.extraction import read_option, stands_whole
from kallm_bench.bbh.lm_eval_reading import number_in_words
from kallm_bench.bbh.tasks import TASKS, Question

_PHRASE = re.compile(r"\banswer(?: is|:):?\s*(.+)", flags=re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])([-−]\s?)?(\d{1,3}(?:,\d{3})+|\d+)(?:\.0+)?(?!\w|\.\d|,\d{3}(?!\d))")
_UNITS = "one|two|three|four|five|six|seven|eight|nine"
_NAMED = (
    rf"(?:zero|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:[- ](?:{_UNITS}))?|{_UNITS}|ten|eleven|"
    "twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen)"
)
_NUMBER_WORD = re.compile(rf"\b{_NAMED}\b", flags=re.IGNORECASE)
_BRACKETS = re.compile(r"[\[\](){}<>][\[\](){}<>\s\",'`]*")
_SAYINGS = {
    "sports_understanding": {"no": "no|not plausible", "yes": "yes|plausible"},
    "web_of_lies": {
        "No": "no|does not tell the truth|is not telling the truth",
        "Yes": "yes|tells the truth|is telling the truth",
    },
}


def read_fixed(protocol: str, question: Question, reply: str) -> str | None:
    """The answer that a reply gives, in the target's own form; None where it gives none.

    Args:
        protocol: zeroshot, fewshot, cot-fewshot or cot-zeroshot.
        reply: already cut at what ends it.
    """
    last = protocol == "cot-zeroshot"
    said = [phrase.strip() for phrase in _PHRASE.findall(reply)]
    if said:
        answer = _read(question, said[-1 if last else 0].rpartition(" = ")[2], False)  # of 1 - 9 = -8 the result
        if answer is not None or protocol == "cot-fewshot":
            return answer
    return None if protocol == "cot-fewshot" else _read(question, reply, last)


def _read(question: Question, text: str, last: bool) -> str | None:
    task = TASKS[question.task]
    if task.options:
        if question.target not in question.options and stands_whole(question.target, text):
            return question.target
        in_parentheses: list[str] = re.findall(r"\([A-Z]\)", text)
        if last and in_parentheses:
            return in_parentheses[-1]
        in_any_case = {letter: option.lower() for letter, option in question.options.items()}
        return read_option(question.options, text) or read_option(in_any_case, text.lower())
    if task.words:
        return _word(_SAYINGS.get(task.name) or {word: re.escape(word) for word in task.words}, text, last)
    return _FREE[task.name](question, text, last)


def _word(sayings: dict[str, str], text: str, last: bool) -> str | None:
    pattern = "|".join(rf"(?P<{word}>\b(?:{saying})\b)" for word, saying in sayings.items())
    found = [match.lastgroup for match in re.finditer(pattern, text, flags=re.IGNORECASE)]
    return found[-1 if last else 0] if found else None


def _number(_question: Question, text: str, last: bool) -> str | None:
    if figures := list(_NUMBER.finditer(text)):
        figure = figures[-1 if last else 0]
        negative = figure[1] and not re.search(r"[\d)]\s*$", text[: figure.start()])  # 5 - 2 has no minus sign
        return str(int(figure[2].replace(",", "")) * (-1 if negative else 1))
    words = _NUMBER_WORD.findall(text)
    return str(number_in_words(words[-1 if last else 0])) if words else None


def _brackets(_question: Question, text: str, last: bool) -> str | None:
    found = _BRACKETS.findall(text)
    return " ".join(re.sub(r"[\",'`]", " ", found[-1 if last else 0]).split()) if found else None


def _words_in_order(question: Question, text: str, last: bool) -> str | None:
    """The question's words as the text orders them, each where it stands last: it may repeat the question before."""
    words = {word.lower(): word for word in question.text.partition("List:")[2].split()}
    longest_first = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?:{longest_first})(?!\w)", text.lower()) if words else []
    return " ".join(reversed([words[word] for word in dict.fromkeys(reversed(found))])) or None


_FREE: dict[str, Callable[[Question, str, bool], str | None]] = {
    "dyck_languages": _brackets,
    "multistep_arithmetic_two": _number,
    "object_counting": _number,
    "word_sorting": _words_in_order,
}
