from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from prefopt.errors import UserError
from prefopt.judging.judge import (
    Comparison,
    Pair,
    Verdict,
    judge_pairs,
    order_of,
    orders_of,
    outcome_of,
    require_verdicts,
)


class Silent:
    """A judge that leaves the last comparison out."""

    name = "silent:1"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [Verdict("first", "") for _ in comparisons[1:]]

    def report(self) -> Mapping[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("winner", "order", "outcome"),
    [
        ("first", "policy_first", "win"),
        ("second", "policy_first", "loss"),
        ("first", "reference_first", "loss"),
        ("second", "reference_first", "win"),
        ("tie", "policy_first", "tie"),
        ("tie", "reference_first", "tie"),
        ("invalid", "policy_first", "invalid"),
        ("invalid", "reference_first", "invalid"),  # TRL turned this one into a verdict
    ],
)
def test_the_outcome_is_seen_from_the_policy(winner: Any, order: Any, outcome: str) -> None:
    assert outcome_of(winner, order) == outcome


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="winner"):
        outcome_of("maybe", "policy_first")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="order"):
        outcome_of("tie", "random")  # type: ignore[arg-type]


def test_the_order_is_a_fair_coin_of_its_key() -> None:
    orders = [order_of(0, f"p{i}", "dpo", 0.5, 0) for i in range(2000)]
    assert orders == [order_of(0, f"p{i}", "dpo", 0.5, 0) for i in range(2000)]
    assert 900 < orders.count("policy_first") < 1100
    for other in (
        [order_of(1, f"p{i}", "dpo", 0.5, 0) for i in range(2000)],
        [order_of(0, f"p{i}", "sft", 0.5, 0) for i in range(2000)],
        [order_of(0, f"p{i}", "dpo", 1, 0) for i in range(2000)],
        [order_of(0, f"p{i}", "dpo", 0.5, 1) for i in range(2000)],
    ):
        assert 850 < sum(a == b for a, b in zip(orders, other, strict=True)) < 1150


def test_a_judge_that_skips_a_comparison_is_refused() -> None:
    comparison = Comparison("p", "prompt", "", "a", "b")
    with pytest.raises(UserError, match="silent:1 gave 1 verdicts for 2 comparisons"):
        require_verdicts(Silent(), [comparison, comparison])


class Longer:
    """A judge that prefers the longer text, says what it was shown, and costs something."""

    name = "longer:1"

    def __init__(self) -> None:
        self.shown: list[Comparison] = []

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.shown += comparisons
        return [
            Verdict("first" if len(c.first) > len(c.second) else "second", f"{c.first}|{c.second}", 0.5)
            for c in comparisons
        ]

    def report(self) -> Mapping[str, Any]:
        return {}


PAIRS = [
    Pair({"id": i}, (f"p{i}", "dpo", 0.5, 0), f"prompt {i}", f"facts {i}", "long text" if i % 3 else "t", "short")
    for i in range(12)
]


def test_a_pair_is_shown_in_its_order_and_its_outcome_is_the_policys() -> None:
    judge = Longer()
    rows = judge_pairs(judge, PAIRS, "random", 7)
    orders = [order_of(7, f"p{i}", "dpo", 0.5, 0) for i in range(12)]
    assert set(orders) == {"policy_first", "reference_first"}
    for i, (row, order, shown) in enumerate(zip(rows, orders, judge.shown, strict=True)):
        policy = "long text" if i % 3 else "t"
        texts = (policy, "short") if order == "policy_first" else ("short", policy)
        assert shown == Comparison(f"p{i}", f"prompt {i}", f"facts {i}", *texts)
        assert row == {
            **{
                "id": i,
                "order": order,
                "judge": "longer:1",
                "winner": "first" if len(texts[0]) > len(texts[1]) else "second",
            },
            **{"reply": f"{texts[0]}|{texts[1]}", "cost_usd": 0.5, "outcome": "win" if i % 3 else "loss"},
        }


def test_both_orders_are_two_rows_one_after_the_other() -> None:
    rows = judge_pairs(Longer(), PAIRS[:2], "both", 7)
    assert [(row["id"], row["order"], row["winner"], row["outcome"]) for row in rows] == [
        *((0, "policy_first", "second", "loss"), (0, "reference_first", "first", "loss")),
        *((1, "policy_first", "first", "win"), (1, "reference_first", "second", "win")),
    ]
    assert orders_of("random", 3, "p", "dpo", 0.5, 2) == (order_of(3, "p", "dpo", 0.5, 2),)
    # A number of whichever type is the same number.
    assert all(order_of(0, f"p{i}", "dpo", 1, np.int64(2)) == order_of(0, f"p{i}", "dpo", 1.0, 2) for i in range(30))
