"""Rows of a prompt and what answers it, each a text or a list of messages: pairs, demonstrations, prompts alone.

A prompt is a text, a list of messages, or what whole conversations have in common before their last turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.formats.examples import Demonstration, Pair, Post, completion, pair
from prefopt.data.formats.tldr import own_post
from prefopt.data.raw.conversations import Message, dumps, parse_messages, readable
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed, field_of, text_of
from prefopt.data.raw.splits import identity, is_blank


def parse_pair(row: Mapping[str, Any]) -> Pair:
    """`chosen, rejected`, with `prompt` where they are no whole conversations.

    Raises:
        Malformed: a field is missing or of the wrong kind.
        Unusable: see `answered`; or "equal_texts".
    """
    post, (chosen, rejected) = answered(row, ("chosen", "rejected"))
    return pair(post, chosen, rejected)


def parse_demonstration(row: Mapping[str, Any]) -> Demonstration:
    """`prompt, response`, which may be called `completion` (raises as `parse_pair` does)."""
    name = "response" if row.get("response") is not None else "completion"
    post, (response,) = answered(row, (name,))
    return Demonstration(post, completion(response))


def parse_conversation(row: Mapping[str, Any]) -> Demonstration:
    """`messages`, whose last turn is the response (raises as `parse_pair` does)."""
    *start, last = parse_messages(field_of(row, "messages"))
    answer = _answer([last], start)
    return Demonstration(conversation(start), completion(answer))


def parse_prompt(row: Mapping[str, Any]) -> Demonstration:
    """`prompt` alone (raises as `parse_pair` does)."""
    return Demonstration(prompt_of(row), "")


def prompt_of(row: Mapping[str, Any]) -> Post:
    """`prompt`, a text or a list of messages.

    Raises:
        Malformed: it is missing or of the wrong kind.
        Unusable: "no_post", "empty_text", "no_user_turn", or "ends_with_answer".
    """
    if not isinstance(field_of(row, "prompt"), list):
        return own_post(text_of(row, "prompt"))
    messages = parse_messages(row["prompt"], "prompt")
    if messages[-1]["role"] == "assistant":
        raise Unusable("ends_with_answer")
    return conversation(messages)


def answered(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Post, list[str]]:
    """The prompt of a row, and what the fields of these names answer to it.

    Raises:
        Malformed: a field is missing or of the wrong kind, one is a text and another a list, or the conversations begin
            with another prompt than `prompt`.
        Unusable: "no_post", "no_user_turn" or "empty_text" of a prompt; of conversations "ends_without_answer", or
            "differ_before_last_turn".
    """
    values = [field_of(row, name) for name in names]
    if not any(isinstance(value, list) for value in values):
        texts = [text_of(row, name) for name in names]
        return prompt_of(row), texts
    conversations = [parse_messages(value, name) for value, name in zip(values, names, strict=True)]
    start = _start(row.get("prompt"), conversations)
    answers = [_answer(each, start) for each in conversations]
    return conversation(start), answers


def conversation(messages: Sequence[Message]) -> Post:
    """The start of a conversation, which its last answer does not belong to.

    Raises:
        Unusable: "no_user_turn"; or "empty_text" or "no_post" where its last turn shows nothing.
    """
    if not any(message["role"] == "user" for message in messages):
        raise Unusable("no_user_turn")
    if is_blank(messages[-1]["content"]):
        raise Unusable("empty_text")
    text = readable(messages)
    # Known as a plain text of the same words is, so that both are one prompt.
    known = own_post(text)
    return dataclasses.replace(known, prompt=text, messages=dumps(messages))


def _start(prompt: Any, conversations: Sequence[list[Message]]) -> list[Message]:
    if isinstance(prompt, list):
        return parse_messages(prompt, "prompt")
    start = []
    for turns in zip(*(each[:-1] for each in conversations), strict=False):
        if any(turn != turns[0] for turn in turns):
            break
        start.append(turns[0])
    if prompt is None:
        return start
    text = text_of({"prompt": prompt}, "prompt")
    if not start:
        return [{"role": "user", "content": text}]
    if identity(start[-1]["content"]) != identity(text):
        raise Malformed("the conversations have another last turn in common than 'prompt' says")
    return start


def _answer(messages: Sequence[Message], start: Sequence[Message]) -> str:
    """What the last turn says to the start, which stands before it or not."""
    if messages[-1]["role"] != "assistant":
        raise Unusable("ends_without_answer")
    if len(messages) > 1 and list(messages[:-1]) != list(start):
        raise Unusable("differ_before_last_turn")
    return messages[-1]["content"]
