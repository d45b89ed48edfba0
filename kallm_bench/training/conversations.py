"""Where conversations come from: the bundled ones, files and the hub, read one at a time and checked on the way in."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kallm_bench.errors import DataError, unknown
from kallm_bench.files import sha256
from kallm_bench.training.tables import Columns, damage_told, find_table, listed, parsed

ROLES = ("system", "developer", "user", "assistant", "tool")

BESIDE = {"assistant": ("tool_calls", "reasoning_content"), "tool": ("name", "tool_call_id")}
"""What a template may read of a message beside its role and content, by role. All else that stands there is dropped."""

COLUMNS = Columns(("messages",), ("tools",), 'Rename the one that holds lists of {"role": ..., "content": ...}')


class Conversation(NamedTuple):
    """Messages, each with role, content and perhaps more; the tools on offer, if any; and where it stands, for errors.

    `where` names the source and the line, row or entry, counted from 1.
    """

    where: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class DataSource:
    """Conversations at hand.

    Args:
        label: their name in tables.
        fingerprint: of their content: a sha256 of the file, or the hub's own.
        read: gives one after the other; raises DataError at the first that is malformed.
        count: how many there are at most, found without parsing them.
    """

    label: str
    fingerprint: str
    read: Callable[[], Iterator[Conversation]]
    count: Callable[[], int]


def find_data(source: str) -> DataSource:
    """The data called `source`: "bundled", a JSONL(.gz), JSON or parquet file, or a hub id (name[:config][:split]).

    Raises:
        DataError: there is none, or it has no column of conversations; says what to give instead.
    """
    if source == "bundled":
        path = _bundled_file()
        return DataSource(source, sha256(path), lambda: _read_chitchat(path), lambda: len(_chitchat(path)))
    table = find_table(source, COLUMNS)
    return DataSource(table.label, table.fingerprint, lambda: itertools.starmap(_checked, table.read()), table.count)


# --- bundled ----------------------------------------------------------------------------------------------------------


def _bundled_file() -> Path:
    found = importlib.util.find_spec("chitchat_dataset")
    if found is None or found.origin is None:
        raise DataError("the bundled data is not installed. Run: pip install chitchat-dataset==0.9.0")
    return Path(found.origin).parent / "dataset.json"


def _chitchat(path: Path) -> dict[str, Any]:
    with damage_told(path):
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return entries


def _read_chitchat(path: Path) -> Iterator[Conversation]:
    """BYU's Chit-Chat: two people take turns; the second speaker is the one to learn from."""
    for name, entry in _chitchat(path).items():
        turns = ["\n".join(part["text"] for part in turn).strip() for turn in entry["messages"]]
        turns = [turn for turn in turns if turn]
        if len(turns) >= 2:
            roles = itertools.cycle(("user", "assistant"))
            messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
            yield Conversation(f"bundled, entry {name}", messages)


# --- one conversation -------------------------------------------------------------------------------------------------


def _checked(row: Any, where: str) -> Conversation:
    """The row's conversation. DataError where it is none."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        found = f"it has {listed(row)}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        if isinstance(row, dict) and "messages" in row:
            found = f"'messages' is {str(messages)[:40]!r}"
        raise DataError(f'{where}: needs {{"messages": [{{"role": ..., "content": ...}}, ...]}}; {found}')
    return Conversation(where, [_message(message, where) for message in messages], _tools(row.get("tools"), where))


def _message(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    content = _text(message) if isinstance(message, dict) else None
    if not isinstance(role, str) or content is None:
        raise DataError(f"{where}: a message needs a 'role' and a 'content', both text; got {str(message)[:80]}")
    if role not in ROLES:
        raise DataError(f"{where}: {unknown('role', role, ROLES)}")
    if not content.isprintable() and not _is_unicode(content):
        raise DataError(f"{where}: half a character, as '\\ud83d' alone is, cannot be cut into tokens")
    checked: dict[str, Any] = {"role": role, "content": content}
    for name in BESIDE.get(role, ()):
        if message.get(name):
            checked[name] = _filled(message[name])
            if name == "tool_calls" and not _are_calls(checked[name]):
                raise DataError(
                    f'{where}: \'tool_calls\' must be a list of {{"function": {{"name": ..., "arguments": ...}}}}, got '
                    f"{str(message[name])[:80]}"
                )
            if not _is_unicode(json.dumps(checked[name], ensure_ascii=False, default=str)):
                raise DataError(f"{where}: half a character, as '\\ud83d' alone is, in '{name}'")
    return checked


def _are_calls(calls: Any) -> bool:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return False
    functions = [call.get("function", call) for call in calls]
    return all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions)


def _text(message: dict[str, Any]) -> str | None:
    """What the message says; None where that is no text. One that only calls tools may say nothing."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant" and message.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        parts = [part.get("text") for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The tools on offer, as JSON schemas; tables often hold them as text."""
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, f"{where}, 'tools'")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of JSON schemas, got {str(tools)[:80]}")
    return [_filled(tool) for tool in tools]


def _filled(value: Any) -> Any:
    """Without the fields that hold nothing: a table gives every row all the fields that any row has."""
    if isinstance(value, dict):
        return {name: _filled(entry) for name, entry in value.items() if entry is not None}
    return [_filled(entry) for entry in value] if isinstance(value, list) else value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
