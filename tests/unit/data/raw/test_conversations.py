"""The messages of a record: what is read, what is refused, and what a reader sees."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data.raw.conversations import dumps, parse_messages, readable
from prefopt.data.raw.record import Malformed

USER = {"role": "user", "content": "What is 1+1?"}
ASSISTANT = {"role": "assistant", "content": " 2. "}


def test_role_and_content_are_read_and_the_rest_is_left() -> None:
    given = [
        {"role": "system", "content": "Be\r\nbrief.", "name": None},
        {**USER, "id": 7, "tool_calls": []},
        ASSISTANT,
    ]
    assert parse_messages(given) == [{"role": "system", "content": "Be\nbrief."}, USER, ASSISTANT]


def test_parts_of_text_are_put_together() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]
    assert parse_messages([{"role": "user", "content": parts}]) == [USER]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "'chosen' is None, which is not a list of messages"),
        ("text", "'chosen' is 'text', which is not a list of messages"),
        ([], "'chosen' is [], which is not a list of messages"),
        (["Hi"], "message 1 of 'chosen' is 'Hi', which is not an object with role and content"),
        ([USER, {"content": "x"}], "message 2 of 'chosen': the field 'role' is missing"),
        (
            [{"role": "human", "content": "x"}],
            "message 1 of 'chosen': 'role' is 'human', which is none of system, user, assistant, tool",
        ),
        ([{"role": ["user"], "content": "x"}], "message 1 of 'chosen': 'role' is ['user'], which is none of system"),
        ([{"role": "user"}], "message 1 of 'chosen': the field 'content' is missing"),
        ([{"role": "user", "content": None}], "message 1 of 'chosen': 'content' is None, which is not text"),
        ([{"role": "user", "content": "\ud800"}], "message 1 of 'chosen': 'content' holds half a character"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "message 1 of 'chosen': 'content' holds {'type': 'image', 'url': 'x'}, which is not a part of type text",
        ),
        ([{"role": "user", "content": ["x"]}], "message 1 of 'chosen': 'content' holds 'x', which is not a part"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}],
            "message 1 of 'chosen': 'tool_calls' holds a call, which is not read",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(Malformed) as error:
        parse_messages(value, "chosen")
    assert str(error.value).startswith(problem)


def test_a_conversation_is_called_messages_where_it_has_no_other_name() -> None:
    with pytest.raises(Malformed, match=r"^'messages' is None, which is not a list of messages$"):
        parse_messages(None)
    with pytest.raises(Malformed, match=r"^message 1 of 'messages' is 'Hi', which is not"):
        parse_messages(["Hi"])


def test_one_user_is_read_bare_and_more_turns_with_their_roles() -> None:
    assert readable([{"role": "user", "content": " What? \n"}]) == "What?"
    assert readable([USER, ASSISTANT, USER]) == "User: What is 1+1?\n\nAssistant: 2.\n\nUser: What is 1+1?"
    assert readable([{"role": "system", "content": "Be brief."}, USER]) == "System: Be brief.\n\nUser: What is 1+1?"


def test_equal_conversations_are_equal_text() -> None:
    assert dumps([{"content": "é", "role": "user"}]) == dumps([{"role": "user", "content": "é"}])
    assert dumps([USER]) == '[{"content":"What is 1+1?","role":"user"}]'
    assert json.loads(dumps([USER, ASSISTANT])) == [USER, ASSISTANT]
