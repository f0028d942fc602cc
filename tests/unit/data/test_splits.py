from __future__ import annotations

import random
from collections import Counter

import pytest

from prefopt.data.splits import PostKeys, check_shares, content_hash, gold_split_of, position, split_of
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
