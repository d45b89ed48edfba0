r"""Prompts and what follows them as tokens, exactly as lm-eval cuts them, and how many of those a model can take.

lm-eval encodes the prompt, and for each choice the prompt with the choice behind it; what is longer in the second are
the choice's tokens. A prompt of three shots and twenty choices is so encoded twenty-one times.

A letter that begins a line is a safe place to cut, where the tokenizer merges pairs (BPE) and no token of its
vocabulary holds a newline followed by a letter: then no merge reaches across, and each side comes out as it does in the
whole. So what all questions of a task begin with is encoded once, and so are its choices behind their last line ("A:").
Both are held against the whole for some questions of each task, and where one differs, or the tokenizer is of another
kind, wholes are encoded.

Behind a chat template's prompt a choice stands as a reply would: after the very last token, without a space.

Source: lm-eval 0.4.13, `TemplateLM._encode_pair`, `HFLM.tok_encode` and `HFLM.max_length`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from kallm_bench.bbh.prompts import Prompt
from kallm_bench.errors import BBHError

Tokens = tuple[int, ...]

DEFAULT_CONTEXT = 2048
"""Tokens of context where neither model nor tokenizer says, as in lm-eval."""

DELIMITER = " "
"""Between a prompt in plain text and a choice."""


@dataclass(frozen=True)
class Encoded:
    """A prompt in tokens.

    Args:
        context: its own.
        continuations: what each choice puts behind it, one token or more.
        cut_tokens: left out of the context, from the left, so that it and the reply that is asked for fit the model's.
    """

    prompt: Prompt
    context: Tokens
    continuations: tuple[Tokens, ...]
    cut_tokens: int = 0

    def kept(self, room: int) -> Encoded:
        """The last `room` tokens of the context, at least one."""
        cut = max(0, len(self.context) - room)
        return replace(self, context=self.context[cut:], cut_tokens=self.cut_tokens + cut) if cut else self


def context_of(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens the model's context holds, found where lm-eval looks."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if (found := getattr(config, name, None)) is not None:
            return int(found)
    found = getattr(tokenizer, "model_max_length", None)
    return int(found) if found is not None and found < 10**18 else DEFAULT_CONTEXT


def room_for(prompt: Prompt, context: int) -> int:
    """How many of its tokens fit beside its reply. BBHError where the model's context holds no more than the reply."""
    room = context - prompt.max_new_tokens
    if room < 1:
        raise BBHError(
            f"{prompt.task} {prompt.index}: {prompt.max_new_tokens} new tokens; the model's context has {context}, "
            "and the prompt needs one at least; ask for fewer"
        )
    return room


def tokens_of(tokenizer: Any, texts: Sequence[str], templated: bool = False) -> list[Tokens]:
    """Texts in tokens, with what the tokenizer puts before a text.

    Args:
        templated: whether a chat template made them; then nothing is put before them, nor where it stands already.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    beginning = None if first is None else tokenizer.decode(first)
    found: dict[int, Tokens] = {}
    for special in (True, False):
        numbers = [
            number
            for number, text in enumerate(texts)
            if special is not (templated or (beginning is not None and text.startswith(beginning)))
        ]
        if numbers:
            rows = tokenizer([texts[number] for number in numbers], add_special_tokens=special, verbose=False)
            found |= {number: tuple(row) for number, row in zip(numbers, rows["input_ids"], strict=True)}
    return [found[number] for number in range(len(texts))]


class Encoder:
    """Encodes prompts with choices.

    Args:
        tokenizer: of the model; its own choice whether to begin with a special token, unless the text does already.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.cuts_at_lines = _cuts_at_lines(tokenizer)
        self._known: dict[tuple[str, ...], tuple[Tokens, ...]] = {}

    @functools.cached_property
    def _added(self) -> re.Pattern[str]:
        """Finds the first of the tokens that were added to the vocabulary; nothing where none were."""
        added = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, added)) or r"(?!)")

    def encode(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        """The prompts of one task in tokens, in their order.

        No prompt is empty, each has choices, and a chat template made all of them or none.
        """
        templated = prompts[0].templated
        contexts = [prompt.text if templated else prompt.text.rstrip() for prompt in prompts]
        shared = len(prompts[0].shared) if len({prompt.shared for prompt in prompts}) == 1 else 0
        cut = self.contexts(contexts, shared, templated)
        return [
            Encoded(prompt, context, self._continuations(prompt, text, context))
            for prompt, text, context in zip(prompts, contexts, cut, strict=True)
        ]

    def contexts(self, texts: Sequence[str], shared: int, templated: bool = False) -> list[Tokens]:
        """Texts in tokens, of which the first `shared` characters are the same in all."""
        if shared and all(self._may_cut(text, shared) for text in texts):
            rests = tokens_of(self._tokenizer, [text[shared:] for text in texts], templated=True)
            longest = max(range(len(rests)), key=lambda number: len(rests[number]))
            whole, another = tokens_of(self._tokenizer, [texts[0], texts[longest]], templated)
            beginning = whole[: len(whole) - len(rests[0])]
            if beginning + rests[0] == whole and beginning + rests[longest] == another:
                return [beginning + rest for rest in rests]
        return tokens_of(self._tokenizer, texts, templated)

    def _continuations(self, prompt: Prompt, text: str, context: Tokens) -> tuple[Tokens, ...]:
        spaces = prompt.text[len(text) :] + ("" if prompt.templated else DELIMITER)
        key = (text[self._last_cut(text, prompt.templated) :], spaces, *prompt.choices)
        if key not in self._known:
            texts = [text + spaces + choice for choice in prompt.choices]
            wholes = tokens_of(self._tokenizer, texts, prompt.templated)
            if prompt.templated and any(tokens[: len(context)] != context for tokens in wholes):
                # The prompt's last token and the choice's first have become one; a reply begins behind what is there.
                self._known[key] = tuple(tokens_of(self._tokenizer, prompt.choices, templated=True))
            else:
                self._known[key] = tuple(whole[len(context) :] for whole in wholes)
        return self._known[key]

    def _last_cut(self, text: str, templated: bool) -> int:
        """The last place that no token reaches across; 0 where none is known.

        Of a template's text an added token of its last line, around which a tokenizer cuts before all else.
        """
        if templated:
            added = self._added.search(text, text.rstrip().rfind("\n") + 1)
            return added.start() if added else 0
        line = text.rfind("\n") + 1
        return line if self._may_cut(text, line) else 0

    def _may_cut(self, text: str, at: int) -> bool:
        here = text[max(0, at - 1) : at + 1]
        return self.cuts_at_lines and re.fullmatch(r"\n[A-Za-z]", here) is not None


def _cuts_at_lines(tokenizer: Any) -> bool:
    """Whether the tokenizer merges pairs, and never a newline with a letter behind it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE":
        return False
    across = re.compile(r"[\nĊ][A-Za-z]")  # Ċ is how byte-level vocabularies write a newline
    return not any(across.search(token) for token in tokenizer.get_vocab())
