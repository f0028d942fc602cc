from __future__ import annotations

import random
import unicodedata
from collections import Counter

import pytest

from prefopt.data.raw import splits
from prefopt.data.raw.splits import (
    PostKeys,
    check_shares,
    content_hash,
    gold_split_of,
    identity,
    is_blank,
    position,
    split_of,
)
from prefopt.errors import UserError

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
KEYS = [f"t3_{i:06x}" for i in range(20_000)]


def test_positions_are_fixed() -> None:
    # The first seven bytes of the SHA-256 of "split/t3_1wbdsh": a change would move every user's posts.
    assert position("split", "t3_1wbdsh") == 0x1666777CC6C37A / 2**56
    assert split_of("t3_1wbdsh", SHARES) == "train"


def test_shares_are_met() -> None:
    counts = Counter(split_of(key, SHARES) for key in KEYS)
    for split, share in SHARES.items():
        assert counts[split] / len(KEYS) == pytest.approx(share, abs=0.01)  # three standard deviations


def test_a_share_of_zero_is_empty_and_the_last_takes_the_rest() -> None:
    assert {split_of(key, {"train": 0.5, "validation": 0.0, "test": 0.5}) for key in KEYS} == {"train", "test"}
    assert {split_of(key, {"train": 1e-12, "validation": 1e-12, "test": 1e-12}) for key in KEYS} == {"test"}


def test_a_split_begins_at_its_first_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "position", lambda salt, key: 0.5)
    assert split_of("x", {"train": 0.5, "validation": 0.25, "test": 0.25}) == "validation"


def test_gold_is_reserved_independently_of_the_split() -> None:
    gold = {key: split for key in KEYS if (split := gold_split_of(key, 0.4)) is not None}
    assert len(gold) / len(KEYS) == pytest.approx(0.4, abs=0.011)
    counts = Counter(gold.values())
    assert counts["gold_test"] / len(gold) == pytest.approx(0.3, abs=0.016)
    assert set(counts) == {"gold_train", "gold_test"}
    for split, share in SHARES.items():
        assert sum(split_of(key, SHARES) == split for key in gold) / len(gold) == pytest.approx(share, abs=0.016)
    assert {gold_split_of(key, 0.0) for key in KEYS} == {None}


def test_more_gold_keeps_the_gold_that_was() -> None:
    for key in KEYS[:1000]:
        if gold_split_of(key, 0.2) is not None:
            assert gold_split_of(key, 0.5) == gold_split_of(key, 0.2)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"train": 0.7, "validation": 0.1, "test": 0.1}, "add up to 1"),
        ({"train": 1.2, "validation": -0.4, "test": 0.2}, "add up to 1"),
        ({"train": 0.8, "test": 0.2}, "expected train, validation and test"),
    ],
)
def test_shares_that_are_none(shares: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_shares(shares)


def test_a_post_is_known_by_id_or_content() -> None:
    records = [
        ("b", "one"),
        (None, "one"),  # the id is missing here
        ("a", "one"),  # posted twice under two ids
        ("b", "one, edited"),
        ("c", "other"),
        (None, "third"),
    ]
    for seed in range(5):
        random.Random(seed).shuffle(records)
        keys = PostKeys()
        for post_id, content in records:
            keys.add(post_id, content)
        assert [keys.key(content) for content in ("one", "one, edited", "other", "third")] == [
            *("a", "a", "c"),
            content_hash("third"),
        ]


def test_an_id_is_not_taken_for_a_content() -> None:
    keys = PostKeys()
    keys.add(content_hash("x"), "y")
    keys.add("z", "x")
    assert keys.key("y") == content_hash("x") and keys.key("x") == "z"


TEXT = "Caf\u00e9 \u1e69 \ufb01ne\n\n  2\u00b2 = \uff14, \uac00 \U0001f469\u200d\U0001f4bb ok?"
FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (" ", " "),
        ("\n", "\r\n"),
        ("\n", "\r"),
        ("\n", "\u2028"),
        ("\n\n", "\n"),
        ("\n\n", " "),
        (" ", ""),
        (" ", "\xa0"),
        (" ", "\u3000\t \v\f"),
        (" ", "\u200b"),
        ("e", "e\u200b"),
        ("f", "\xadf\ufe0f"),
        ("o", "\u2060o\u200e"),
        ("C", "\ufeffC"),
        ("k", "k\0\x1b\x85"),
    ],
)
def test_what_a_text_is_known_by(form: str, old: str, new: str) -> None:
    known = "Caf\u00e9\u1e69fine22=4,\uac00\U0001f469\U0001f4bbok?"
    assert identity(unicodedata.normalize(form, TEXT).replace(old, new)) == known
    assert identity(unicodedata.normalize(form, TEXT.replace(old, new)) + " ") == known


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "A"), ("a b", "a, b"), ("cafe", "caf\u00e9"), ("a-b", "a b"), ("1", "2"), ("\U0001f600", "")],
)
def test_another_text_is_known_by_something_else(one: str, other: str) -> None:
    assert identity(one) != identity(other)


def test_an_accent_finds_its_letter_whatever_stood_between() -> None:
    assert identity("e\u200b\u0301") == identity("e\u0301") == identity("\xe9") == "\xe9"


def test_signs_that_hold_a_space_and_marks_in_plain_text() -> None:
    assert identity("a\xb4b") == identity("a \u0301b") == "\xe1b"  # a free accent is a space with an accent
    assert identity("a\0b\x7f\x1bc") == "abc"


def test_blank_is_what_shows_nothing() -> None:
    for text in ("", " \n\t", "\u200b\ufeff", "\xa0\u3000", "\0\x7f\xad", "\u2028\u3164\U000e0020"):
        assert is_blank(text) and identity(text) == ""
    for text in (".", " a", "\u200b\u0301", "\U0001f600", "\ufffd"):
        assert not is_blank(text) and identity(text) != ""


def test_content_that_differs_in_white_space_is_one_post() -> None:
    forms = ["a b\n\nc", "a b\nc", "a  b c", "abc\u200b"]
    smallest = min(map(content_hash, forms))
    for seed in range(5):
        random.Random(seed).shuffle(forms)
        keys = PostKeys.of([*forms, "other"])
        assert {keys.key(form) for form in forms} == {smallest}
        assert keys.key("other") == content_hash("other")
    # An id comes before every content, whichever form it stands beside.
    keys = PostKeys.of(forms)
    keys.add("t3_1", "ab c")
    assert {keys.key(form) for form in forms} == {"t3_1"}


def test_a_content_may_be_known_by_something_else() -> None:
    keys = PostKeys()
    keys.add(None, "one", "same")
    keys.add(None, "two", "same")
    keys.add(None, "same")
    assert keys.key("one") == keys.key("two") == min(map(content_hash, ("one", "two", "same")))
