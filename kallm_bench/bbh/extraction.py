r"""Reading an answer out of a reply, by the rules of the `chat` protocol.

Option tasks: the first "(X)"; else a lone X, "X." or "X)"; else the exact text of one option, the longest that the
reply contains; else there is no answer. Word tasks (Yes/No, True/False, valid/invalid, yes/no): the first of them that
stands whole, in any case. Other tasks: the whole reply, normalised as SQuAD does (lower case, punctuation and
articles off, spaces folded), against the target in the same form.

Two targets would lose their meaning in that normalisation, so they keep it: a minus sign before a digit stays (else -8
were 8), and a target of nothing but punctuation, as Dyck words are, is compared with its spaces folded and nothing else
(else any reply without letters were right).
"""

from __future__ import annotations

import re
import string

from kallm_bench.bbh.tasks import TASKS, Question

_PUNCTUATION = re.escape(string.punctuation)
_LONE_LETTER = re.compile(r"(?<![^\s\"'*])([A-Z])(?=[\s.,)]|[\"'*](?![A-Za-z])|$)")
_ARTICLE_OR_PRONOUN = re.compile(r"[AI]\s+(?!(?:is|and|or|because|since|as)\b)[a-z']")
"""'A dog', 'I think': an A or I that begins a phrase is a word, not an option; 'A is right', 'A or B' are options."""


def read_answer(question: Question, reply: str) -> str | None:
    """The answer a reply gives: an option such as "(B)", one of the task's words, or normalised text; else None."""
    task = TASKS[question.task]
    if task.options:
        return read_option(question.options, reply)
    if task.words:
        return _read_word(task.words, reply)
    return normalised(reply, question.target) or None


def is_right(question: Question, answer: str | None) -> bool:
    """Whether an answer that `read_answer` gave is the target."""
    if TASKS[question.task].options or TASKS[question.task].words:
        return answer == question.target
    return answer is not None and answer == normalised(question.target, question.target)


def read_option(options: dict[str, str], reply: str) -> str | None:
    """The option that a reply gives, such as "(B)"; it need not be one of `options`. None where it gives none."""
    if in_parentheses := re.search(r"\(([A-Z])\)", reply):
        return in_parentheses.group(0)
    for lone in _LONE_LETTER.finditer(reply):
        if f"({lone.group(1)})" in options and not _ARTICLE_OR_PRONOUN.match(reply, lone.start()):
            return f"({lone.group(1)})"
    contained = [letter for letter, text in options.items() if text and stands_whole(text, reply)]
    return max(contained, key=lambda letter: len(options[letter]), default=None)


def _read_word(words: tuple[str, ...], reply: str) -> str | None:
    found = re.search(rf"\b({'|'.join(words)})\b", reply, flags=re.IGNORECASE)
    return next(word for word in words if word.lower() == found.group(1).lower()) if found else None


def stands_whole(text: str, reply: str) -> bool:
    """Whether the reply contains the text, and not as a part of longer words."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", reply) is not None


def normalised(text: str, target: str) -> str:
    """A free-form answer as it is compared; `target` decides whether punctuation has meaning in this question."""
    if re.fullmatch(rf"[{_PUNCTUATION}\s]+", target):
        return " ".join(text.split())
    text = re.sub(rf"(?!-\d)[{_PUNCTUATION}]", "", text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
