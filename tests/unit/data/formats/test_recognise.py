"""A row's format is found by its fields; a source has one."""

from __future__ import annotations

from typing import Any

import pytest

from prefopt.data.formats.examples import Demonstration, Pair
from prefopt.data.formats.labelled import Thumb
from prefopt.data.formats.recognise import FORMATS, Choices, Reader, fields_read, recognised
from prefopt.data.raw.record import Malformed

CHOICES = Choices(rule="all", margin=0.0, ties="drop", seed=0)
TURNS = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
OTHER = [TURNS[0], {"role": "assistant", "content": "s"}]
# A row of each format, with fields of others beside it that ask for less, or of none.
ROWS: dict[str, dict[str, Any]] = {
    "tldr_comparisons": {"info": {}, "summaries": [], "choice": 0, "worker": "w", "prompt": "p"},
    "tldr_posts": {"subreddit": "s", "title": "t", "post": "p", "summary": "u", "id": "1", "response": "r"},
    "cnn_dailymail": {"article": "a", "highlights": "h", "id": "1"},
    "winner": {"conversation_a": TURNS, "conversation_b": OTHER, "winner": "a", "turn": 1, "language": "English"},
    "scored": {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2], "messages": TURNS},
    "thumbs": {"prompt": "p", "completion": "c", "label": True, "response": "r"},
    "hh": {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b", "prompt": None},
    "pairs": {
        "prompt": "p",
        "chosen": TURNS,
        "rejected": OTHER,
        "messages": TURNS,
        "score_chosen": 3.0,
        "prompt_id": "1",
    },
    "prompt_response": {"prompt": "p", "response": "r", "messages": TURNS, "label": None},
    "messages": {"prompt": "p", "prompt_id": "1", "messages": TURNS},
    "prompts": {"prompt": "p", "answer": 4, "response": None, "id": 3},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_of_the_first_format_that_its_fields_fit(name: str) -> None:
    assert recognised(ROWS[name]) == name


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"}, "winner"),
        ({"chosen": TURNS, "rejected": OTHER}, "pairs"),
        ({"prompt": "p", "completion": "c"}, "prompt_response"),
        ({}, None),
        ({"text": "a film", "label": 1}, None),
        ({"question": "p", "answer": "r"}, None),
        # Half a format is none, and no prompt alone.
        ({"prompt": "p", "chosen": "a"}, None),
        ({"prompt": "p", "chosen": "a", "reject": "b"}, None),
        ({"prompt": "p", "scores": [1, 2]}, None),
        ({"prompt": "p", "label": True}, None),
        ({"prompt": "p", "response_a": "a", "winner": "a"}, None),
        ({"chosen": TURNS}, None),
    ],
)
def test_other_rows(row: dict[str, Any], name: str | None) -> None:
    assert recognised(row) == name


def test_a_row_of_another_format_or_of_none_says_what_was_found() -> None:
    reader = Reader(CHOICES)
    with pytest.raises(Malformed) as error:
        reader({"prompt": "p", "chosen": "a", "rejected": None})
    assert (
        str(error.value) == "the row has the fields 'chosen', 'prompt', which fit no format of docs/record_formats.md"
    )
    with pytest.raises(Malformed, match=r"^the row has no field, which fit no format"):
        reader({})
    assert reader.name is None
    assert isinstance(reader({"prompt": "p", "chosen": "a", "rejected": "b"}), Pair) and reader.name == "pairs"
    with pytest.raises(Malformed) as error:
        reader({"prompt": "p", "response": "r"})
    assert str(error.value) == (
        "the row has the fields 'prompt', 'response', of the format 'prompt_response', and the first row is of the format "
        "'pairs'"
    )
    assert isinstance(reader({"prompt": "q", "chosen": "a", "rejected": "b"}), Pair)


def test_a_named_format_is_not_guessed() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "completion": "c", "label": 0}
    assert isinstance(Reader(CHOICES, "pairs")(row), Pair) and isinstance(Reader(CHOICES)(row), Thumb)
    assert isinstance(Reader(CHOICES, "prompts")(row), Demonstration)
    with pytest.raises(Malformed, match=r"^the field 'messages' is missing$"):
        Reader(CHOICES, "messages")(row)
    with pytest.raises(Malformed, match=r"^the field 'prompt' is missing$"):
        Reader(CHOICES, "pairs")({"chosen": "a", "rejected": "b"})


def test_a_cell_of_csv_may_hold_a_list() -> None:
    reader = Reader(CHOICES, cells=True)
    text = '[{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]'
    found = reader({"messages": text})
    assert isinstance(found, Demonstration) and (found.post.prompt, found.response) == ("p", " r")
    found = Reader(CHOICES, cells=True)({"prompt": "[1, 2]", "responses": '["[3]", "[4]"]', "scores": " [1, 2]"})
    assert isinstance(found, list) and [(pair.post.prompt, pair.chosen) for pair in found] == [("[1, 2]", " [4]")]
    # Other texts that look like lists are texts.
    for prompt in ("[1, 2]", "[]", '["a"]', '[{"a": 1}]', "[" * 100_000, "[" + "9" * 5000 + "]"):
        found = Reader(CHOICES, cells=True)({"prompt": prompt, "response": "[]"})
        assert isinstance(found, Demonstration) and (found.post.prompt, found.response) == (prompt, " []")
    # An empty cell is none, and a number no list.
    found = Reader(CHOICES, cells=True)({"prompt": "p", "response": "r", "scores": None})
    assert isinstance(found, Demonstration)
    with pytest.raises(Malformed, match="'scores' is '3', which is not a list of 2"):
        Reader(CHOICES, cells=True)({"prompt": "p", "responses": '["a", "b"]', "scores": "3"})
    with pytest.raises(Malformed, match="'messages' is '"):
        Reader(CHOICES)({"messages": text})


def test_of_columns_those_are_read_that_some_format_reads() -> None:
    assert fields_read(["image", "prompt", "chosen", "rejected", "date"]) == ["prompt", "chosen", "rejected"]
    assert fields_read(["id", "subreddit", "title", "post", "summary", "x"]) == [
        "id",
        "subreddit",
        "title",
        "post",
        "summary",
    ]
    # None fits: all are read, so that an error can name them.
    assert fields_read(["question", "answer", "label"]) == ["question", "answer", "label"]
