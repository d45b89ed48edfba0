"""A conversation as the model's own chat template writes it, and where in that text the assistant speaks."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import jinja2

from kallm_bench.errors import DataError

Messages = list[dict[str, Any]]
Spans = list[tuple[int, int]]

FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format.replace('%d', '26').replace('%B', 'July').replace('%b', 'Jul')"
    ".replace('%m', '07').replace('%Y', '2024').replace('%y', '24') }}{%- endmacro -%}"
)
"""Some templates write today's date. The same data must be the same tokens tomorrow, so they are told one fixed day."""

PLAIN = {"role", "content"}

SHAPES = 10_000
"""Sequences of roles whose template is remembered at one time."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over everything that decides how a conversation is cut.

    Raises:
        DataError: there is no tokenizer, or it is none of the tokenizers library.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer beside it; save one into its folder")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"the model's tokenizer, a {type(tokenizer).__name__}, has no tokenizer.json; convert it first")
    template = tokenizer.chat_template or ""
    if not isinstance(template, str):
        template = json.dumps(template, sort_keys=True)
    parts = [tokenizer.backend_tokenizer.to_str(), template]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Template:
    """A tokenizer's chat template, and where in a rendered conversation the assistant speaks.

    What a template writes between the messages depends on their roles alone, so it is found once for each sequence of
    roles, by rendering marks in place of the messages; and checked against the real rendering every time: a template
    may look into what is said, and no sample of conversations would show it. Where it does, or where tools are called,
    the assistant's turns are found by rendering the conversation up to each of them and beyond it.

    Raises:
        DataError: no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise DataError("the model's tokenizer has no chat template; take an instruction-tuned model")
        self._tokenizer = tokenizer
        self._changed: dict[str, str] = {}
        self._between: dict[tuple[str, ...], list[str]] = {}
        text = tokenizer.chat_template
        if isinstance(text, str) and "strftime_now" in text:
            self._changed = {"chat_template": FIXED_DAY + text}
        self._ending = self._pieces(("user", "assistant"))[-1].rstrip("\n")

    def spans(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> tuple[str, Spans]:
        """The conversation as text, and (start, end) in characters of each assistant's turn, its end mark included.

        Raises:
            DataError: the template refuses the conversation, leaves a message out, or writes a turn otherwise once
                another one follows.
        """
        text = self._render(messages, tools)
        spans = None
        if tools is None and all(message.keys() == PLAIN for message in messages):
            spans = self._by_roles(messages, text)
            if spans is None:  # many templates trim; then that is what the model sees
                spans = self._by_roles([{**each, "content": each["content"].strip()} for each in messages], text)
        return text, self._by_turns(messages, tools, text) if spans is None else spans

    def _render(self, messages: Messages, tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self._changed
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"the model's chat template cannot render this conversation: {reason}") from error
        return text

    def _by_roles(self, messages: Messages, text: str) -> Spans | None:
        """The assistant's turns by what stands between messages of such roles; None where that is not `text`."""
        pieces = self._pieces(tuple(message["role"] for message in messages))
        if len(pieces) != len(messages) + 1:
            return None
        parts, spans, end = [pieces[0]], [], len(pieces[0])
        for message, after in zip(messages, pieces[1:], strict=True):
            parts += message["content"], after
            start, end = end, end + len(message["content"]) + len(after)
            if message["role"] == "assistant":
                if not after.startswith(self._ending):
                    return None
                spans.append((start, end - len(after) + len(self._ending)))
        return spans if "".join(parts) == text else None

    def _pieces(self, roles: tuple[str, ...]) -> list[str]:
        if roles not in self._between:
            if len(self._between) >= SHAPES:
                self._between.clear()
            marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
            text = self._render([{"role": r, "content": mark} for r, mark in zip(roles, marks, strict=True)])
            self._between[roles] = re.split("\ue000\\d+\ue001", text)
        return self._between[roles]

    def _by_turns(self, messages: Messages, tools: list[dict[str, Any]] | None, text: str) -> Spans:
        """The assistant's turns, each from where the model would be asked to speak to where it has spoken."""
        self._check_shown(messages, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise DataError("the assistant speaks first, and the chat template does not show where")
            asked = self._render(messages[:number], tools, prompt=True)
            spoken = self._render(messages[: number + 1], tools).rstrip("\n")
            if not spoken.startswith(asked) or not text.startswith(spoken):
                raise DataError(
                    f"the chat template writes message {number + 1} otherwise where it is asked for, or where others "
                    "follow it, so that it cannot be said which tokens are the assistant's"
                )
            spans.append((len(asked), len(spoken)))
        return spans

    def _check_shown(self, messages: Messages, tools: list[dict[str, Any]] | None) -> None:
        """DataError where a message that is not the assistant's, or a call of a tool, is missing in the rendering."""
        marks = {n: f"\ue000{n}\ue001" for n, message in enumerate(messages) if message["role"] != "assistant"}
        marked = [{**message, "content": message["content"] + marks.get(n, "")} for n, message in enumerate(messages)]
        text = self._render(marked, tools)
        for number, message in enumerate(messages):
            missing = f"message {number + 1}, of role '{message['role']}'" if marks.get(number, "") not in text else ""
            for call in message.get("tool_calls", ()):
                name = call.get("function", call)["name"]
                if name not in text:
                    missing = f"the call of the tool '{name}' in message {number + 1}"
            if missing:
                raise DataError(
                    f"the model's chat template leaves out {missing}; take a model that was trained with it"
                )
