"""What is told of a table that loses much."""

from __future__ import annotations

import pytest

from prefopt.data.losses import loss_warnings


def account(read: int, **dropped: int) -> dict[str, object]:
    return {"read": read, "kept": read - sum(dropped.values()), "dropped": dropped}


def test_more_than_a_tenth_for_one_reason_is_told_with_the_key() -> None:
    # The real HH pairs at the default lengths.
    tables = {"preferences": account(2312, completion_too_long=1227, malformed=3)}
    assert list(loss_warnings("hh", tables)) == [
        "1,227 of 2,312 records of preferences (53%) are lost: they have a completion that does not fit; raise "
        "tasks.hh.lengths.max_length."
    ]


@pytest.mark.parametrize(("lost", "told"), [(10, 0), (11, 1)])
def test_a_tenth_itself_is_not_told(lost: int, told: int) -> None:
    assert len(list(loss_warnings("tldr", {"prompts": account(100, reference_too_long=lost)}))) == told


def test_what_is_put_aside_is_no_loss_and_does_not_hide_one() -> None:
    aside = {"reserved_for_gold": 500, "duplicate_pair": 300, "more_than_one_turn": 100, "unlabelled": 50}
    assert list(loss_warnings("hh", {"preferences": account(1000, **aside)})) == []
    (said,) = loss_warnings("hh", {"preferences": account(1000, **aside, completion_too_long=6)})
    assert said.startswith("6 of 1,000 records of preferences (1%)")


def test_every_reason_of_every_table_is_told_for_itself() -> None:
    tables = {"a": account(10, malformed=2, ends_with_human=2), "b": account(10, empty_text=9)}
    assert list(loss_warnings("x", tables)) == [
        "2 of 10 records of a (20%) are lost: they are malformed.",
        "2 of 10 records of a (20%) are lost: they are dropped for the reason ends_with_human.",
        "9 of 10 records of b (90%) are lost: they have no text.",
    ]
    assert list(loss_warnings("x", {"a": account(0)})) == []
