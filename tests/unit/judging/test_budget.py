"""What calls cost, by hand, with a store of made-up counts."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.judging.budget import Budget, Price

PRICE = Price(input=2.0, output=8.0)


def budget(limit: float) -> Budget:
    """Of the replies in the store those of one model count: 1,000,000 tokens read and 500,000 written, 6 USD."""
    counts = {("http://judge", "m"): (1e6, 5e5)}
    store: Any = SimpleNamespace(tokens=lambda endpoint, model: counts[endpoint, model])
    return Budget("chat:m", "http://judge", "m", 50, limit, PRICE, store)


def test_a_price_is_for_a_million_tokens() -> None:
    assert PRICE.of(3, 5) == (3 * 2 + 5 * 8) / 10**6
    assert budget(6.0).spent() == 6.0


def test_all_of_the_budget_may_be_spent_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    assert budget(6.0).check() == 6.0
    with pytest.raises(
        UserError, match=r"^chat:m: 6\.0000 USD are spent, which is over judge\.chat\.budget_usd, 5\.9;"
    ):
        budget(5.9).check()
    # Two calls of 42 characters in all, so 11 tokens to read, and of 50 tokens each to write.
    calls = (11 * 2 + 100 * 8) / 1e6
    budget(6 + calls).announce([20, 22])
    with pytest.raises(UserError, match=r"2 calls would cost about 0\.0008 USD on top of 6\.0000 USD"):
        budget(6 + calls - 1e-9).announce([20, 22])
    with caplog.at_level(logging.INFO):
        budget(6.0).report()
    assert caplog.messages == ["the store now holds 1000000 tokens read, 500000 written, 6.0000 USD"]
