"""Lines as a reader takes them, letter by letter."""

from __future__ import annotations

import re

import pytest

from prefopt.judging.disguise import letters, undisguised


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("Summary B: 12_x", "summary b: 12_x"),
        ("Straße", "strasse"),
        ("Ｆｕｌｌ ﬁ ②", "full fi 2"),
        ("Súm\u0336mary", "summary"),  # accents, by themselves or on a letter (Mn)
        ("A\u20dd B\u0903", "a b"),  # a circle around (Me), a mark that takes room (Mc)
        ("a\u200bb\u00adc\u202ed", "abcd"),  # nothing to be seen (Cf)
        ("a\x00b\x1bc\x7fd", "abcd"),  # nothing that is shown (Cc)
        ("a\tb", "a\tb"),
        ("Ѕummаrу Ⅼ", "summary l"),  # look-alikes, capitals too
        ("Đ ł Ø", "d l o"),
        ("Ё Ϊ", "e i"),  # look-alikes with marks
        ("ᗅlpha", "alpha"),
        ("жук 語 ß", "жyk ж ss"),  # letters that look like none of them are all one
    ],
)
def test_what_a_reader_sees_of_a_line(line: str, seen: str) -> None:
    assert undisguised(line) == seen


def test_words_are_found_in_any_spacing_and_with_letters_of_another_script_in_them() -> None:
    pattern = letters("Summary B")
    assert pattern == r"[\W_]*+".join(f"[{letter}ж]" for letter in "summaryb")
    for line in ("summary b", "s-u m__m.a.ryb", "suжmary ж"):
        assert re.fullmatch(pattern, line)
    for line in ("summary c", "summary", "summmary b", " summary b"):
        assert not re.fullmatch(pattern, line)
