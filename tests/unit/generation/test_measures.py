"""Completions that are made to repeat, to copy, to say nothing and not to end."""

from __future__ import annotations

from typing import Any

import pytest

from prefopt.generation.measures import completion_measures

PROMPT = [11, 12, 13, 14, 15, 16]
EOS = 0


def measured(*ids: int, text: str = " some words", ended: bool = True) -> dict[str, Any]:
    found = completion_measures(PROMPT, ids, text, ended)
    return {name: found[name] for name in ("ended", "repeats", "copies", "empty")}


GOOD = {"ended": True, "repeats": False, "copies": False, "empty": False}


def test_four_tokens_in_a_row_twice_repeat() -> None:
    assert measured(1, 2, 3, 4, 5, 1, 2, 3, 9, EOS) == GOOD, "three alone"
    assert measured(1, 2, 3, 4, 5, 1, 2, 3, 4, EOS) == {**GOOD, "repeats": True}
    assert measured(7, 7, 7, 7, EOS) == GOOD, "one run of four"
    assert measured(7, 7, 7, 7, 7) == {**GOOD, "repeats": True}, "two that overlap"


def test_more_than_half_of_the_runs_of_four_from_the_prompt_copy_it() -> None:
    # Runs of four in the prompt: 3 of the 6, then 3 of the 5.
    assert measured(*PROMPT, 1, 2, EOS) == GOOD
    assert measured(*PROMPT, 1, EOS) == {**GOOD, "copies": True}
    assert measured(*PROMPT[::-1], EOS) == GOOD, "the same tokens in another order"
    assert measured(11, 12, 13) == GOOD, "too short to copy anything"


def test_copying_again_and_again_is_both() -> None:
    assert measured(*PROMPT * 3, ended=False) == {"ended": False, "repeats": True, "copies": True, "empty": False}


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_white_space_is_empty(text: str) -> None:
    assert measured(EOS, text=text) == {**GOOD, "empty": True}


def test_equal_texts_have_one_hash_whatever_their_tokens() -> None:
    first, same, other = (
        completion_measures(PROMPT, ids, text, True)["text_hash"]
        for ids, text in (([1], "a"), ([2, 3], "a"), ([1], "b"))
    )
    assert first == same != other
