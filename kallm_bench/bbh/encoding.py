r"""Prompts and their choices as tokens, exactly as lm-eval cuts them, without cutting the same text again and again.

lm-eval encodes the prompt, and for each choice the prompt with the choice behind it; what is longer in the second are
the choice's tokens. A prompt of three shots and twenty choices is so encoded twenty-one times.

A letter that begins a line is a safe place to cut, where the tokenizer merges pairs (BPE) and no token of its
vocabulary holds a newline followed by a letter: then no merge reaches across, and each side comes out as it does in the
whole. So what all questions of a task begin with is encoded once, and so are its choices behind their last line ("A:").
Both are held against the whole for some questions of each task, and where one differs, or the tokenizer is of another
kind, wholes are encoded.

Source: lm-eval 0.4.13, `TemplateLM._encode_pair` and `HFLM.tok_encode`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kallm_bench.bbh.prompts import Prompt

Tokens = tuple[int, ...]

DELIMITER = " "
"""Between a prompt and a choice."""


@dataclass(frozen=True)
class Encoded:
    """A prompt in tokens: its `context`, and what each choice puts behind it, one token or more."""

    prompt: Prompt
    context: Tokens
    continuations: tuple[Tokens, ...]


class Encoder:
    """Encodes prompts with choices.

    Args:
        tokenizer: of the model; its own choice whether to begin with a special token, unless the text does already.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._beginning = None if first is None else tokenizer.decode(first)
        self.cuts_at_lines = _cuts_at_lines(tokenizer)
        self._known: dict[tuple[str, ...], tuple[Tokens, ...]] = {}

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """The prompts of one task in tokens, in their order. No prompt is empty, and each has choices."""
        contexts = [(prompt.shared + prompt.question).rstrip() for prompt in prompts]
        cut = self._contexts([prompt.shared for prompt in prompts], contexts)
        return [
            Encoded(prompt, context, self._continuations(prompt, text, context))
            for prompt, text, context in zip(prompts, contexts, cut, strict=True)
        ]

    def _contexts(self, shared: Sequence[str], contexts: Sequence[str]) -> list[Tokens]:
        at = len(shared[0])
        if len(set(shared)) == 1 and all(self._may_cut(text, at) for text in contexts):
            rests = self._cut([text[at:] for text in contexts], special=False)
            longest = max(range(len(rests)), key=lambda number: len(rests[number]))
            whole, another = self._cut([contexts[0], contexts[longest]])
            beginning = whole[: len(whole) - len(rests[0])]
            if beginning + rests[0] == whole and beginning + rests[longest] == another:
                return [beginning + rest for rest in rests]
        return self._cut(contexts)

    def _continuations(self, prompt: Prompt, text: str, context: Tokens) -> tuple[Tokens, ...]:
        spaces = (prompt.shared + prompt.question)[len(text) :]
        last_line = text.rfind("\n") + 1
        key = (text[last_line:] if self._may_cut(text, last_line) else text, spaces, *prompt.choices)
        if key not in self._known:
            wholes = self._cut([text + spaces + DELIMITER + choice for choice in prompt.choices])
            self._known[key] = tuple(whole[len(context) :] for whole in wholes)
        return self._known[key]

    def _may_cut(self, text: str, at: int) -> bool:
        here = text[max(0, at - 1) : at + 1]
        return self.cuts_at_lines and re.fullmatch(r"\n[A-Za-z]", here) is not None

    def _cut(self, texts: Sequence[str], special: bool | None = None) -> list[Tokens]:
        found: dict[int, Tokens] = {}
        for wanted in (True, False):
            numbers = [i for i, text in enumerate(texts) if self._special(text, special) is wanted]
            if numbers:
                rows = self._tokenizer([texts[i] for i in numbers], add_special_tokens=wanted, verbose=False)
                found |= {i: tuple(row) for i, row in zip(numbers, rows["input_ids"], strict=True)}
        return [found[i] for i in range(len(texts))]

    def _special(self, text: str, special: bool | None) -> bool:
        if special is not None:
            return special
        return self._beginning is None or not text.startswith(self._beginning)


def _cuts_at_lines(tokenizer: Any) -> bool:
    """Whether the tokenizer merges pairs, and never a newline with a letter behind it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return False
    across = re.compile(r"[\nĊ][A-Za-z]")  # Ċ is how byte-level vocabularies write a newline
    return not any(across.search(token) for token in tokenizer.get_vocab())
