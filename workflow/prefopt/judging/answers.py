"""What an endpoint's answer holds: the reply of a completion, and the models of a list."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.judging.replies import is_complete
from prefopt.judging.server_text import one_line
from prefopt.judging.verdict_store import MOST_TOKENS, Reply

# Of text in UTF-8, fewer than in most texts of any language: a token of English has about four.
_BYTES_PER_TOKEN = 3


def read_completion(text: str, messages: Sequence[Mapping[str, str]], max_tokens: int) -> tuple[Reply, str] | None:
    """The reply of an answer to a chat completion.

    Args:
        text: the answer's body.
        messages: what was asked.
        max_tokens: the longest reply that was asked for.

    Returns:
        The reply, empty where the answer holds no text, and which of its token counts cannot be used and are
        estimated, "" where all can. None where the answer is none of the chat protocol.
    """
    answer = _json(text)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        return None
    choice = answer["choices"][0] if answer["choices"] else None
    choice = choice if isinstance(choice, dict) else {}
    said = _said(choice.get("message"))
    finish_reason = one_line(_text(choice.get("finish_reason")), 80)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    asked = sum(len(message["content"].encode()) for message in messages)
    # What a model thought unseen, or was cut at, is billed: at most all that it was allowed.
    written = len(said.encode())
    whole = bool(said.strip()) and is_complete(finish_reason)
    estimates = {
        "prompt_tokens": estimated_tokens(asked),
        "completion_tokens": estimated_tokens(written) if whole else max(max_tokens, estimated_tokens(written)),
    }
    odd = [name for name in estimates if not _usable(usage.get(name), name == "prompt_tokens" or bool(said))]
    counts = {name: estimate if name in odd else usage[name] for name, estimate in estimates.items()}
    found = ", ".join(f"{name} {one_line(_text(usage.get(name, 'missing')), 40)}" for name in odd)
    return Reply(said, finish_reason, one_line(_text(answer.get("model")), 200), **counts), found


def listed_models(text: str) -> dict[str, str]:
    """The models that an answer lists, each with the day on which it ends, "" where none is told.

    Servers list them as objects or names, in `data` or bare; what is neither is left out.
    """
    answer = _json(text)
    models = answer.get("data") if isinstance(answer, dict) else answer
    found: dict[str, str] = {}
    for model in models if isinstance(models, list) else []:
        if isinstance(model, dict) and isinstance(model.get("id"), str):
            found[model["id"]] = one_line(_text(model.get("shutdown_date")), 40)
        elif isinstance(model, str):
            found[model] = ""
    return found


def error_words(body: object) -> str:
    """What an error's body says, on one line: its message, or else all of it."""
    while isinstance(body, dict):
        inner = next((body[name] for name in ("message", "error", "detail") if body.get(name)), None)
        if inner is None:
            break
        body = inner
    return one_line(_text(body))


def estimated_tokens(size: int) -> int:
    """Tokens of a text of so many bytes, rather too many."""
    return math.ceil(size / _BYTES_PER_TOKEN)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _said(message: Any) -> str:
    """A message's text: its content, the text parts of its content (not those of thinking), or its refusal."""
    if not isinstance(message, dict):
        return ""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = [_part(part) for part in parts]
    return "".join(texts) or _part(message.get("refusal"))


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"):
        part = part.get("text")
    return part if isinstance(part, str) else ""


def _text(value: Any) -> str:
    """A value that should be a string."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _usable(count: Any, wanted: bool) -> bool:
    """Whether a count of tokens can be one; of a text that is there it is not 0."""
    return type(count) is int and int(wanted) <= count <= MOST_TOKENS
