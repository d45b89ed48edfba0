r"""Reading replies as lm-evaluation-harness 0.4.13 does, to the letter: what it gets wrong is wrong here too.

Each protocol has one or two filters, which turn a reply into an answer, and a comparison with the target. The first of
them is the one that lm-eval averages over its group. Its faults, kept here and mended in fixed_reading.py: a letter
lost at the end of "the answer is False", "The answer is" not seen for its capital, a reply of " False" that is not
"False", `1,024` read as 1, `none` as one, `- 8` as "-", no number called eight, and spaces for a bracket answer.

Source: lm_eval/tasks/bbh/*/utils.py, filters/extraction.py, api/metrics.py and the tasks' YAML files (MIT).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial

from kallm_bench.bbh.tasks import TASKS, Question

INVALID = "[invalid]"
"""What lm-eval puts where it finds no answer."""

Filter = Callable[[Question, str], str]

_WORDS = {
    "boolean_expressions": r"\b(True|False)\b",
    "causal_judgement": r"\b(Yes|No|yes|no)\b",
    "navigate": r"\b(Yes|No|yes|no)\b",
    "formal_fallacies": r"\b(valid|invalid)\b",
    "dyck_languages": r"(?<= )([\" \[\(<{}>\)\]]+)|([\" \[\(<{}>\)\]]+)",
}
_MAPPED = {
    "sports_understanding": {r"\b(no|not plausible)\b": "no", r"\b(yes|plausible)\b": "yes"},
    "web_of_lies": {
        r"\b(no|does not tell the truth|is not telling the truth)\b": "no",
        r"\b(yes|tells the truth|is telling the truth)\b": "yes",
    },
}
_NUMBER = r"([-0-9]+)"
_TEENS = "(?:twen|thir|for|fif|six|seven|nine)(?:teen|ty)"
_ROUND = "ten|eleven|twelve|fourteen|hundred|thousand|(?:m|b|tr)illion"
_FIRST = f"zero|one|two|three|four|five|{_TEENS}|eight(?:|een|y)|{_ROUND}"
_LATER = f"zero|one|two|three|four|five|(?:twen|thir|for|fif|six|seven|nine)(?:|teen|ty)|eight(?:een|y)|{_ROUND}"
_LAST = f"zero|one|two|three|four|five|{_TEENS}|eight(?:een|y)|{_ROUND}"
_BETWEEN = r"[^\S\r\n\x1c-\x1f]|,|and|&"
_NUMBER_IN_WORDS = f"((?:(?:{_FIRST})(?:{_LATER}|{_BETWEEN})+)?(?:{_LAST}))"
_THE_ANSWER_IS = r"(?<=the answer is )(.*)(?=.)"
_FOUR_PHRASES = (
    r"((?<=The answer is )(.*)(?=.)|(?<=the answer is )(.*)(?=.)|"
    r"(?<=The answer: )(.*)(?=.)|(?<=The final answer: )(.*)(?=.))"
)


def cut(reply: str, stops: tuple[str, ...]) -> str:
    """The reply up to the first of the texts that end it."""
    return reply[: min((found for stop in stops if (found := reply.find(stop)) >= 0), default=None)]


def answers(protocol: str, question: Question, reply: str) -> dict[str, tuple[str, bool]]:
    """What lm-eval's filters make of a reply that is already cut, and whether each is right.

    Args:
        protocol: zeroshot, fewshot, cot-fewshot or cot-zeroshot.

    Returns:
        Name of the filter -> (answer, whether it is the target); INVALID where the filter finds none. lm-eval itself
        crashes on a reply like "a thousand million", whose number has no value: INVALID too.
    """
    normal = _normalised if protocol in ("zeroshot", "cot-zeroshot") else str
    found = {name: read(question, reply) for name, read in FILTERS[protocol].items()}
    return {name: (answer, normal(answer) == normal(question.target)) for name, answer in found.items()}


def _normalised(text: str) -> str:
    for ignored in (r"\.$", ",", "\n", r"\\", '"'):
        text = re.sub(ignored, "", text)
    return text.lower()


def _raw(_question: Question, reply: str) -> str:
    return reply


def _match(pattern: str, which: int, _question: Question, reply: str) -> str:
    return _found(pattern, which, reply, INVALID)


def _flexible(which: int, question: Question, reply: str) -> str:
    """The first (`which` 0) or last (-1) thing in a reply that looks like an answer to this kind of question."""
    task = question.task
    if task in _WORDS:
        return _found(_WORDS[task], which, reply, INVALID)
    if task in _MAPPED:
        return _mapped(_MAPPED[task], which, reply)
    if task == "word_sorting":
        return _sorted_words(question.text, reply)
    if TASKS[task].options:
        return _option(which, question.text, reply) or INVALID
    return _found(_NUMBER, which, reply) or _number_in_words(which, reply.lower()) or INVALID


def _found(pattern: str, which: int, text: str, otherwise: str = "") -> str:
    """One of a pattern's matches, stripped; of groups the first that matched something."""
    matches = re.findall(pattern, text)
    if not matches:
        return otherwise
    match = matches[which]
    if isinstance(match, tuple):
        match = next((group for group in match if group), otherwise)
    return str(match).strip()


def _mapped(values: dict[str, str], which: int, reply: str) -> str:
    found = _found("|".join(values), which, reply.lower())
    return next((value for pattern, value in values.items() if found and _found(pattern, which, found)), INVALID)


def _option(which: int, text: str, reply: str) -> str:
    """A letter in parentheses; else the text of an option; else a letter after a colon."""
    if found := _found(r"(\([A-Z]\))", which, reply):
        return found
    options = [_plain(option.strip()) for option in re.findall(r"\([A-Z]\)([^\n^(]*)", text)]
    letters = [chr(ord("A") + number) for number in range(len(options))]
    longest_first = sorted(options, key=len, reverse=True)
    if found := _found("|".join(re.escape(option) for option in longest_first), which, _plain(reply)):
        return {option: f"({letter})" for option, letter in zip(options, letters, strict=True)}.get(found, found)
    found = _found(rf":[\s]*({'|'.join(letters)})", which, reply)
    return f"({found})" if found else ""


def _plain(text: str) -> str:
    return "".join(sign for sign in text.lower() if not unicodedata.category(sign).startswith("P"))


def _sorted_words(text: str, reply: str) -> str:
    """The question's words as the reply orders them, each where it stands last."""
    words = text.partition("List:")[2].split()
    found = re.findall("|".join(rf"\b{re.escape(word)}\b" for word in words), reply)
    return " ".join(reversed(dict.fromkeys(reversed(found))))


def _number_in_words(which: int, reply: str) -> str:
    if not (found := _found(_NUMBER_IN_WORDS, which, reply)):
        return ""
    try:
        return str(number_in_words(found))
    except (ValueError, IndexError):
        return INVALID


_VALUES = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90, "hundred": 100, "thousand": 1000, "million": 10**6,
    "billion": 10**9,
}  # fmt: skip
_SCALES = ("billion", "million", "thousand")


def number_in_words(text: str) -> int:
    """The number that words such as "two hundred and five" say; words that are no numbers are passed over.

    Raises:
        ValueError, IndexError: no number, a scale twice or in the wrong order, nothing before a scale.

    Source: word2number 1.1, which lm-eval reads such numbers with; it gives the same value for the same words.
    """
    words = [word for word in text.replace("-", " ").lower().split() if word in _VALUES]
    at = [words.index(scale) for scale in _SCALES if scale in words]
    if not words or at != sorted(at) or any(words.count(scale) > 1 for scale in _SCALES):
        raise ValueError(f"'{text}' is no number")
    if len(words) == 1:
        return _VALUES[words[0]]
    total = start = 0
    for end in at:
        total += _below_a_scale(words[start:end]) * _VALUES[words[end]]
        start = end + 1
    # What follows the last scale; but a scale that ends the words does not count as one here, as in word2number.
    rest = next((end + 1 for end in reversed(at) if end + 1 < len(words)), len(words) if at else 0)
    return total + (_below_a_scale(words[rest:]) if rest < len(words) else 0)


def _below_a_scale(words: list[str]) -> int:
    numbers = [_VALUES[word] for word in words]
    if len(numbers) == 4:
        return numbers[0] * numbers[1] + numbers[2] + numbers[3]
    if len(numbers) == 3:
        return numbers[0] * numbers[1] + numbers[2]
    if len(numbers) == 2:
        return numbers[0] * numbers[1] if 100 in numbers else numbers[0] + numbers[1]
    return numbers[0]


FILTERS: dict[str, dict[str, Filter]] = {
    "zeroshot": {"flexible-extract": partial(_flexible, 0), "strict-match": _raw},
    "fewshot": {"none": _raw},
    "cot-fewshot": {"get-answer": partial(_match, _THE_ANSWER_IS, 0)},
    "cot-zeroshot": {"flexible-extract": partial(_flexible, -1), "strict-match": partial(_match, _FOUR_PHRASES, 0)},
}
"""Protocol -> its filters; the first is the one that lm-eval averages over its group."""
