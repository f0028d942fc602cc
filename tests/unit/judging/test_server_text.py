from __future__ import annotations

import pytest

from prefopt.judging.server_text import harmless, one_line


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("the key sk-1.2 is", "the key *** is"),
        ("SK-1.2sk-1.2", "******"),
        ("sk-1x2", "sk-1x2"),  # the key is no pattern
        ("a\ud83d\ude00\ude00", "a\U0001f600\ufffd"),
        ("line\nline", "line\nline"),
    ],
)
def test_the_key_and_half_characters_are_taken_out(text: str, kept: str) -> None:
    assert harmless(text, "sk-1.2") == kept


def test_without_a_key_or_with_a_placeholder_nothing_is_searched_for() -> None:
    assert harmless("none is EMPTY", None) == harmless("none is EMPTY", "EMPTY") == "none is EMPTY"


def test_one_line_holds_what_a_terminal_shows() -> None:
    assert one_line("a\r\n b\x1b[2Jc\x00\u202ed\u200be\x9b\u2028f ") == "a b[2Jcde f"
    assert one_line("x" * 10**6, 7) == "x" * 7
