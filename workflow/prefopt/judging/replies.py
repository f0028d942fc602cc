"""What a chat judge said: the choice in its reply."""

from __future__ import annotations

import json
import re
from typing import Any

from prefopt.judging.judge import Winner
from prefopt.judging.templates import Template, verdict_of_line

_WINNERS: dict[str, Winner] = {"A": "first", "B": "second", "tie": "tie"}
# How servers say that a reply has come to its end: OpenAI, TGI, Anthropic, Gemini, Cohere, AI21 ...; "" says nothing.
_COMPLETE = {
    *("", "stop", "eos", "eostoken", "endturn", "endofturn", "endoftext", "stopsequence", "stopstring"),
    *("complete", "completed", "finished", "done", "finishreasonstop"),
}
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def parse_reply(template: Template, reply: str, finish_reason: str, structured: bool) -> Winner:
    """The winner that a reply names: by its last line that is a verdict, or by its JSON where that was asked for.

    Args:
        template: the prompt that was asked.
        reply: what the model said.
        finish_reason: why it stopped; a reply that was cut names no winner, since what a judge quotes before it
            decides is not its verdict.
        structured: whether the reply must be an object as `reply_schema` describes it.

    Returns:
        `invalid` where no winner is named; nothing is guessed.
    """
    if not is_complete(finish_reason):
        return "invalid"
    if structured:
        return _WINNERS.get(_chosen(reply), "invalid")
    choices = [choice for line in reply.splitlines() if (choice := verdict_of_line(template, line))]
    return _WINNERS[choices[-1]] if choices else "invalid"


def is_complete(finish_reason: str) -> bool:
    """Whether a reply came to its own end; of a reason that is not known it cannot be said."""
    return re.sub(r"[^a-z]", "", finish_reason.casefold()) in _COMPLETE


def reply_schema(template: Template) -> dict[str, Any]:
    """The JSON schema of a structured reply, as `response_format` takes it."""
    return {
        "type": "json_schema",
        "json_schema": {
            "name": "verdict",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {
                    "comparison": {"type": "string"},
                    "preferred": {"type": "string", "enum": list(template.choices)},
                },
                "required": ["comparison", "preferred"],
                "additionalProperties": False,
            },
        },
    }


def _chosen(reply: str) -> str:
    fenced = _FENCE.fullmatch(reply.strip())
    try:
        value = json.loads(fenced[1] if fenced else reply)
    except (ValueError, RecursionError):
        return ""
    chosen = value.get("preferred") if isinstance(value, dict) else None
    return chosen if isinstance(chosen, str) else ""
