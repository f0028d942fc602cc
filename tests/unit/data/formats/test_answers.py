"""Prompts and answers in every form, what is malformed of each, and what is of no use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data.formats.answers import parse_conversation, parse_demonstration, parse_pair, parse_prompt
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
TEXTS = {"prompt": "Hi?", "chosen": "Hello", "rejected": "What"}
LISTS = {"prompt": "Hi?", "chosen": [says("Hello")], "rejected": [says("What")]}
WHOLE = {"chosen": [user("Hi?"), says("Hello")], "rejected": [user("Hi?"), says("What")]}


@pytest.mark.parametrize(
    "row",
    [
        LISTS,
        {**LISTS, "prompt": [user("Hi?")]},
        WHOLE,
        {"prompt": "Hi?", **WHOLE},
        {"prompt": " Hi?\n", **WHOLE},
        {"prompt": [user("Hi?")], **WHOLE},
        {"prompt": [user("Hi?")], "chosen": WHOLE["chosen"], "rejected": LISTS["rejected"]},
    ],
)
def test_one_turn_is_the_same_pair_in_every_form(row: dict[str, Any]) -> None:
    pair = parse_pair(row)
    assert (pair.post.prompt, pair.chosen, pair.rejected) == ("Hi?", " Hello", " What")
    assert json.loads(pair.post.messages) == [user("Hi?")]
    assert pair.post.known_by == parse_pair(TEXTS).post.known_by and parse_pair(TEXTS).post.messages == ""


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, user("a"), says("b"), user("c")], "chosen": [says("d")], "rejected": [says("e")]},
        {
            "chosen": [SYSTEM, user("a"), says("b"), user("c"), says("d")],
            "rejected": [SYSTEM, user("a"), says("b"), user("c"), says("e")],
        },
        {
            "prompt": "c",
            "chosen": [SYSTEM, user("a"), says("b"), user("c"), says("d")],
            "rejected": [SYSTEM, user("a"), says("b"), user("c"), says("e")],
        },
    ],
)
def test_more_turns_are_the_start_of_a_conversation(row: dict[str, Any]) -> None:
    pair = parse_pair(row)
    assert pair.post.prompt == "System: Be brief.\n\nUser: a\n\nAssistant: b\n\nUser: c"
    assert json.loads(pair.post.messages) == [SYSTEM, user("a"), says("b"), user("c")]
    assert (pair.chosen, pair.rejected) == (" d", " e")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "the field 'chosen' is missing"),
        ({"prompt": "Hi?", "chosen": "a"}, "the field 'rejected' is missing"),
        ({"chosen": "a", "rejected": "b"}, "the field 'prompt' is missing"),
        ({**TEXTS, "prompt": None}, "'prompt' is None, which is not text"),
        ({**TEXTS, "chosen": 3}, "'chosen' is 3, which is not text"),
        ({**TEXTS, "rejected": [says("b")]}, "'chosen' is 'Hello', which is not a list of messages"),
        ({**LISTS, "chosen": []}, "'chosen' is [], which is not a list of messages"),
        ({**LISTS, "prompt": 3}, "'prompt' is 3, which is not text"),
        ({**LISTS, "prompt": ["Hi?"]}, "message 1 of 'prompt' is 'Hi?', which is not an object with role and content"),
        ({**TEXTS, "prompt": []}, "'prompt' is [], which is not a list of messages"),
        ({**WHOLE, "prompt": "Other?"}, "the conversations have another last turn in common than 'prompt' says"),
    ],
)
def test_malformed_pairs(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(Malformed) as error:
        parse_pair(row)
    assert str(error.value) == problem


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**TEXTS, "prompt": " \u200b"}, "no_post"),
        ({**TEXTS, "chosen": " "}, "empty_text"),
        ({**TEXTS, "rejected": "Hello \n"}, "equal_texts"),
        ({**LISTS, "prompt": [user(" ")]}, "empty_text"),
        ({**LISTS, "rejected": [says("\u200b")]}, "empty_text"),
        ({**LISTS, "rejected": [says("Hello ")]}, "equal_texts"),
        ({**LISTS, "chosen": [says("a"), says("b")]}, "differ_before_last_turn"),
        ({**WHOLE, "chosen": [user("Hello?"), says("Hello")]}, "differ_before_last_turn"),
        ({**LISTS, "chosen": [user("a")]}, "ends_without_answer"),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "no_user_turn"),
        ({"chosen": [SYSTEM, says("a")], "rejected": [SYSTEM, says("b")]}, "no_user_turn"),
    ],
)
def test_unusable_pairs(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as error:
        parse_pair(row)
    assert str(error.value) == reason


def test_demonstrations() -> None:
    for row in (
        {"prompt": "Hi?", "response": " Hello "},
        {"prompt": "Hi?", "completion": "Hello"},
        {"prompt": "Hi?", "response": None, "completion": [says("Hello")]},
        {"prompt": [user("Hi?")], "response": [says("Hello")]},
    ):
        found = parse_demonstration(row)
        assert (found.post.prompt, found.response) == ("Hi?", " Hello")
    with pytest.raises(Malformed, match=r"^the field 'completion' is missing$"):
        parse_demonstration({"prompt": "Hi?"})
    with pytest.raises(Unusable, match=r"^empty_text$"):
        parse_demonstration({"prompt": "Hi?", "response": " "})


def test_a_conversations_last_answer_is_the_response() -> None:
    found = parse_conversation({"messages": [user("a"), says("b"), user("c"), says("d")]})
    assert (found.post.prompt, found.response) == ("User: a\n\nAssistant: b\n\nUser: c", " d")
    tool = {"role": "tool", "content": "4"}
    found = parse_conversation({"messages": [user("2+2?"), says("calc"), tool, says("4")]})
    assert found.post.prompt == "User: 2+2?\n\nAssistant: calc\n\nTool: 4"
    for messages, reason in (
        ([user("a")], "ends_without_answer"),
        ([says("a")], "no_user_turn"),
        ([user("a"), says(" ")], "empty_text"),
        ([user(" "), says("b")], "empty_text"),
    ):
        with pytest.raises(Unusable, match=f"^{reason}$"):
            parse_conversation({"messages": messages})
    with pytest.raises(Malformed, match="message 1 of 'messages': 'role' is 'human'"):
        parse_conversation({"messages": [{"role": "human", "content": "a"}, says("b")]})
    with pytest.raises(Malformed, match="the field 'messages' is missing"):
        parse_conversation({})


def test_prompts_alone() -> None:
    assert parse_prompt({"prompt": " Hi? "}).post.prompt == "Hi?" and parse_prompt({"prompt": "Hi?"}).response == ""
    assert parse_prompt({"prompt": [SYSTEM, user("a")]}).post.prompt == "System: Be brief.\n\nUser: a"
    for prompt, reason in ((" ", "no_post"), ([user(" ")], "empty_text"), ([user("a"), says("b")], "ends_with_answer")):
        with pytest.raises(Unusable, match=f"^{reason}$"):
            parse_prompt({"prompt": prompt})
    with pytest.raises(Malformed, match="'prompt' is 7, which is not text"):
        parse_prompt({"prompt": 7})
