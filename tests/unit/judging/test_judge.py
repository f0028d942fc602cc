from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.judging.judge import Comparison, Verdict, order_of, outcome_of, require_verdicts


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
