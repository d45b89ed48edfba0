"""Where a reply ends: at a token of the model's own, at a text, or when it is long enough.

Texts are looked for in what the tokens say, special ones included, as lm-eval does: "<|im_end|>" is a stop of some
protocols and a token of some models. The text of a reply is then decoded without special tokens and cut at the first
stop that is left in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ending:
    """What ends a reply.

    Args:
        tokens: ids of which each ends a reply, and belongs to it.
        texts: each ends a reply with the token that completes it.
        most: tokens in a reply, at most.
    """

    tokens: frozenset[int]
    texts: tuple[str, ...]
    most: int

    def find(self, tokenizer: Any, reply: Sequence[int], seen: int) -> tuple[int, str] | None:
        """Where a reply ends and why: how many tokens it has, and "eos", "stop" or "length"; None if it goes on.

        Args:
            reply: token ids so far, maybe some beyond the end.
            seen: how many of them an earlier call has looked at.
        """
        count = next((at + 1 for at in range(seen, min(len(reply), self.most)) if reply[at] in self.tokens), None)
        why = "eos"
        if count is None and len(reply) >= self.most:
            count, why = self.most, "length"
        before = count - (why == "eos") if count is not None else len(reply)
        stopped = self._text_at(tokenizer, reply[:before], seen)
        if stopped is not None:
            return stopped, "stop"
        return None if count is None else (count, why)

    def cut(self, text: str) -> str:
        """A reply's text up to the first stop in it."""
        return text[: min((at for stop in self.texts if (at := text.find(stop)) >= 0), default=len(text))]

    def _text_at(self, tokenizer: Any, reply: Sequence[int], seen: int) -> int | None:
        """How many tokens there are when the first stop is complete. A token has a byte at least: so far it looks."""
        if not self.texts:
            return None
        start = max(0, seen - max(len(stop.encode()) for stop in self.texts) - 1)
        if not self._holds(tokenizer, reply[start:]):
            return None
        ends = range(max(seen, start) + 1, len(reply) + 1)
        return next((end for end in ends if self._holds(tokenizer, reply[start:end])), None)

    def _holds(self, tokenizer: Any, tokens: Sequence[int]) -> bool:
        text = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in self.texts)
