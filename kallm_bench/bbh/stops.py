"""Where a reply ends: at a token of the model's own, at a text, or when it is long enough.

Texts are looked for in what the tokens say, special ones included, as lm-eval does: "<|im_end|>" is a stop of some
protocols and a token of some models. The text of a reply is then decoded without special tokens and cut at the first
stop that is left in it.

Decoding costs more than a step where replies are many. But few tokens can complete a stop, and which ones is found out
once for each: replies without them need no look.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


class Suspects:
    """Which tokens may end a reply, of those that are asked about so far.

    A text is complete with the token that says its last character. That is seen in the token alone, unless it is part
    of a character (decoded to U+FFFD) or the character is a space (which some tokenizers leave out at a beginning).

    Args:
        endings: of all replies.
        vocabulary: more than any token's id.
    """

    def __init__(self, tokenizer: Any, endings: Iterable[Ending], vocabulary: int) -> None:
        different = set(endings)
        self._tokenizer = tokenizer
        self._lasts = {text[-1] for ending in different for text in ending.texts}
        self._known = np.zeros(vocabulary, dtype=bool)
        self._suspect = np.zeros(vocabulary, dtype=bool)
        ends = [token for ending in different for token in ending.tokens if token < vocabulary]
        self._known[ends] = self._suspect[ends] = True

    def among(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each may end a reply."""
        for token in np.unique(tokens[~self._known[tokens]]).tolist():
            self._known[token] = True
            self._suspect[token] = self._may_end(token)
        found: NDArray[np.bool_] = self._suspect[tokens]
        return found

    def _may_end(self, token: int) -> bool:
        if not self._lasts:
            return False
        said = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return " " in self._lasts or "\ufffd" in said or any(last in said for last in self._lasts)
