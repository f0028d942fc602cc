"""Conversations: the messages of a record, as a chat template takes them, and as a reader sees them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.raw.sources import Malformed, field_of, text_of
from prefopt.store.files import canonical_json

ROLES = ("system", "user", "assistant", "tool")
# What a chat template would show, and nothing here reads.
_CALLS = ("tool_calls", "function_call")

Message = dict[str, str]  # role and content


def parse_messages(value: Any, name: str = "messages") -> list[Message]:
    """The messages of a conversation, role and content alone.

    Args:
        value: a list of objects with `role`, one of `ROLES`, and `content`, a text or a list of parts of type text.
        name: the field that holds it.

    Raises:
        Malformed: it is no such list, or is empty; names the message, from 1, and what was found.
    """
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name!r} is {reprlib.repr(value)}, which is not a list of messages")
    return [_message(message, f"message {number} of {name!r}") for number, message in enumerate(value, start=1)]


def readable(messages: Sequence[Message]) -> str:
    """The turns as one text: the content alone where one user speaks, else each with its role."""
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"].strip()
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in messages)


def dumps(messages: Sequence[Message]) -> str:
    """The turns as JSON: equal ones give equal text."""
    return canonical_json(list(messages))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise Malformed(f"{where} is {reprlib.repr(message)}, which is not an object with role and content")
    try:
        role = field_of(message, "role")
        if role not in ROLES:
            raise Malformed(f"'role' is {reprlib.repr(role)}, which is none of {', '.join(ROLES)}")
        if calls := [name for name in _CALLS if message.get(name)]:
            raise Malformed(f"{calls[0]!r} holds a call, which is not read")
        return {"role": role, "content": _content(message)}
    except Malformed as problem:
        raise Malformed(f"{where}: {problem}") from problem


def _content(message: Mapping[str, Any]) -> str:
    parts = message.get("content")
    if not isinstance(parts, list):
        return text_of(message, "content")
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise Malformed(f"'content' holds {reprlib.repr(part)}, which is not a part of type text")
    return "".join(text_of(part, "text") for part in parts)
