"""What a chat judge's calls cost, and when that is too much."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from prefopt.errors import UserError
from prefopt.judging.verdict_store import VerdictStore

_CHARACTERS_PER_TOKEN = 4  # of English text, about

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Price:
    """USD per million tokens."""

    input: float
    output: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """USD for so many tokens."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


class Budget:
    """What a model's replies in a store may cost in all, whichever job asked.

    Args:
        judge: its name, for messages.
        endpoint: the endpoint's address.
        model: its name there.
        max_tokens: of a reply.
        limit: USD.
        price: of the model.
        store: its replies.
    """

    def __init__(
        self, judge: str, endpoint: str, model: str, max_tokens: int, limit: float, price: Price, store: VerdictStore
    ) -> None:
        self._judge, self._endpoint, self._model = judge, endpoint, model
        self._max_tokens, self._limit, self._price, self._store = max_tokens, limit, price, store

    def announce(self, lengths: Sequence[int]) -> None:
        """Says what calls will cost before the first is made.

        Args:
            lengths: characters of each call's message.

        Raises:
            UserError: with what was spent before, it is more than the budget.
        """
        read = math.ceil(sum(lengths) / _CHARACTERS_PER_TOKEN)
        written = len(lengths) * self._max_tokens
        estimate, spent = self._price.of(read, written), self.spent()
        logger.info(
            "%s: %d calls, about %d tokens to read and at most %d to write, about %.4f USD; %.4f USD spent before, "
            "budget %.4f USD",
            *(self._judge, len(lengths), read, written, estimate, spent, self._limit),
        )
        if spent + estimate > self._limit:
            raise UserError(
                f"{self._judge}: {len(lengths)} calls would cost about {estimate:.4f} USD on top of {spent:.4f} USD "
                f"spent before, which is over judge.chat.budget_usd, {self._limit:g}: raise it or judge less."
            )

    def spent(self) -> float:
        """USD for all replies of the model in the store."""
        return self._price.of(*self._store.tokens(self._endpoint, self._model))

    def check(self) -> float:
        """USD spent.

        Raises:
            UserError: it is more than the budget.
        """
        if (spent := self.spent()) > self._limit:
            raise UserError(
                f"{self._judge}: {spent:.4f} USD are spent, which is over judge.chat.budget_usd, {self._limit:g}; "
                f"verdicts so far are kept, raise it to go on."
            )
        return spent

    def report(self) -> None:
        """Says what the store holds."""
        read, written = self._store.tokens(self._endpoint, self._model)
        logger.info("the store now holds %d tokens read, %d written, %.4f USD", read, written, self.spent())
