"""Thumbs and winners: what is read, paired, counted and refused."""

from __future__ import annotations

from typing import Any

import pytest

from prefopt.data.formats.labelled import paired, parse_thumb, parse_winner
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed

THUMB = {"prompt": "Hi?", "completion": "Hello", "label": True}
WINNER = {"prompt": "Hi?", "response_a": "Hello", "response_b": "What", "winner": "a"}
CONVERSATIONS = {
    f"conversation_{side}": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": text}]
    for side, text in (("a", "Hello"), ("b", "What"))
}


@pytest.mark.parametrize(
    ("label", "up"),
    [
        (True, True),
        (1, True),
        ("True", True),
        (" 1", True),
        (1.0, True),
        (0.0, False),
        (False, False),
        (0, False),
        ("false", False),
        ("0", False),
    ],
)
def test_a_label_is_a_truth_value_as_json_parquet_and_csv_spell_it(label: Any, up: bool) -> None:
    found = parse_thumb({**THUMB, "label": label})
    assert (found.post.prompt, found.response, found.up) == ("Hi?", " Hello", up)


def test_a_conversations_answer_gets_a_thumb() -> None:
    row = {"prompt": [{"role": "user", "content": "Hi?"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    assert parse_thumb({**row, "label": False}).response == " Hello"


@pytest.mark.parametrize("label", [None, "yes", 2, -1, 0.5, [], {}, float("nan"), 10**4000])
def test_what_is_no_label(label: Any) -> None:
    with pytest.raises(Malformed, match=r"^'label' is .*, which is neither true nor false$"):
        parse_thumb({**THUMB, "label": label})


@pytest.mark.parametrize("name", THUMB)
def test_a_thumb_lacks_nothing(name: str) -> None:
    with pytest.raises(Malformed, match=f"^the field '{name}' is missing$"):
        parse_thumb({key: value for key, value in THUMB.items() if key != name})


def test_the_first_that_pleased_stands_against_the_first_that_did_not() -> None:
    rows = [
        ("p", "a", 1),
        ("p", "b", 0),
        ("q", "c", 1),
        (" P ", "d", 0),
        ("\u200bp", "e", 1),
        ("p", "f", 0),
        ("p", "g", 0),
        ("r", "h", 0),
        ("p", "i", 1),
    ]
    thumbs = [parse_thumb({"prompt": prompt, "completion": text, "label": label}) for prompt, text, label in rows]
    pairs, left = paired(thumbs)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(" a", " b"), (" e", " f"), (" i", " g")]
    assert [(thumb.response, thumb.up) for thumb in left] == [(" c", True), (" d", False), (" h", False)]
    assert paired([]) == ([], [])
    # One text with both labels prefers nothing.
    both = [parse_thumb(THUMB), parse_thumb({**THUMB, "label": 0})]
    assert paired(both) == ([], both)


@pytest.mark.parametrize("row", [WINNER, {**CONVERSATIONS, "winner": "model_a"}])
def test_the_winner_is_chosen(row: dict[str, Any]) -> None:
    (pair,) = parse_winner(row, "drop")
    assert (pair.post.prompt, pair.chosen, pair.rejected) == ("Hi?", " Hello", " What")
    (pair,) = parse_winner({**row, "winner": "B"}, "drop")
    assert (pair.chosen, pair.rejected) == (" What", " Hello")


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad", " Tie "])
def test_a_tie_is_counted_or_stands_in_both_orders(winner: str) -> None:
    with pytest.raises(Unusable, match=r"^tie$"):
        parse_winner({**WINNER, "winner": winner}, "drop")
    pairs = parse_winner({**WINNER, "winner": winner}, "both")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(" Hello", " What"), (" What", " Hello")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {**WINNER, "winner": "c"},
            "'winner' is 'c', which is none of a, b, model_a, model_b, tie, tie (bothbad), both_bad",
        ),
        ({**WINNER, "winner": 0}, "'winner' is 0, which is none of a"),
        ({**WINNER, "winner": ["a"]}, "'winner' is ['a'], which is none of a"),
        ({key: WINNER[key] for key in WINNER if key != "winner"}, "the field 'winner' is missing"),
        ({key: WINNER[key] for key in WINNER if key != "response_b"}, "the field 'response_b' is missing"),
        (
            {**CONVERSATIONS, "conversation_b": "Hi?", "winner": "a"},
            "'conversation_b' is 'Hi?', which is not a list of",
        ),
    ],
)
def test_malformed_winners(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(Malformed) as error:
        parse_winner(row, "drop")
    assert str(error.value).startswith(problem)


def test_unusable_winners() -> None:
    with pytest.raises(Unusable, match=r"^equal_texts$"):
        parse_winner({**WINNER, "response_b": "Hello "}, "both")
    other = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "What"}]
    with pytest.raises(Unusable, match=r"^differ_before_last_turn$"):
        parse_winner({**CONVERSATIONS, "conversation_b": other, "winner": "a"}, "drop")
