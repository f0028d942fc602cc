"""What a judge is: it takes a prompt and two texts and says which is better, knowing nothing of who wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from prefopt.errors import UserError
from prefopt.store.files import stable_hash

Winner = Literal["first", "second", "tie", "invalid"]
Order = Literal["policy_first", "reference_first"]
OrderRule = Literal["random", "both"]
Outcome = Literal["win", "loss", "tie", "invalid"]

# A judge that reads several prompts at once reads these together; a shard of the work holds whole blocks of them.
PROMPTS_AT_ONCE = 16

_POLICY_PLACE: dict[Order, Winner] = {"policy_first": "first", "reference_first": "second"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two texts for one prompt, in the order in which the judge sees them."""

    prompt_id: str
    prompt: str
    facts: str  # hidden facts of an embedded prompt (JSON), "" where there are none
    first: str
    second: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which text won, the judge's raw reply, and what it cost. `invalid`: the reply names no winner."""

    winner: Winner
    reply: str
    cost_usd: float = 0.0


class Judge(Protocol):
    """Anything that compares two texts. A judge that gets no usable reply says `invalid`; it never guesses."""

    @property
    def name(self) -> str:
        """Begins with the judge's kind and identifies what judged, e.g. "oracle:embedded-v1"."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in their order."""

    def report(self) -> Mapping[str, Any]:
        """What is known of the judge itself (its accuracy, say), for the verdict table's manifest."""


def orders_of(
    rule: OrderRule, seed: int, prompt_id: str, run: str, temperature: float, sample_index: int
) -> tuple[Order, ...]:
    """The orders in which a pair is shown: one, by a coin (the paper), or both."""
    if rule == "both":
        return ("policy_first", "reference_first")
    return (order_of(seed, prompt_id, run, temperature, sample_index),)


def order_of(seed: int, prompt_id: str, run: str, temperature: float, sample_index: int) -> Order:
    """Who is shown first: a coin thrown by a hash of its arguments, whatever the rows beside it."""
    key = [seed, prompt_id, run, float(temperature), int(sample_index)]
    return "policy_first" if int(stable_hash(key), 16) % 2 == 0 else "reference_first"


def outcome_of(winner: Winner, order: Order) -> Outcome:
    """The verdict seen from the policy; a tie and an invalid verdict are the same from both sides.

    Raises:
        ValueError: `winner` or `order` is none of the allowed words.
    """
    place = _POLICY_PLACE.get(order)
    if place is None:
        raise ValueError(f"order is {order!r}; allowed: {', '.join(_POLICY_PLACE)}")
    match winner:
        case "tie" | "invalid":
            return winner
        case "first" | "second":
            return "win" if winner == place else "loss"
    raise ValueError(f"winner is {winner!r}; allowed: first, second, tie, invalid")


def require_verdicts(judge: Judge, comparisons: Sequence[Comparison]) -> list[Verdict]:
    """The judge's verdicts, one for each comparison.

    Raises:
        UserError: the judge gave another number of verdicts.
    """
    verdicts = judge.compare(comparisons)
    if len(verdicts) != len(comparisons):
        raise UserError(
            f"The judge {judge.name} gave {len(verdicts)} verdicts for {len(comparisons)} comparisons: "
            f"none of them can be trusted."
        )
    return verdicts


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two texts that are to be judged, before their order is drawn.

    Attributes:
        row: what stands in the table of verdicts beside the verdict.
        key: prompt_id, run, temperature and sample_index, which draw the order (see `order_of`).
        prompt: the prompt's text.
        facts: its hidden facts, "" where there are none.
        policy: the text whose outcome is told.
        reference: the text that it is compared with.
    """

    row: Mapping[str, Any]
    key: tuple[str, str, float, int]
    prompt: str
    facts: str
    policy: str
    reference: str


def judge_pairs(judge: Judge, pairs: Sequence[Pair], rule: OrderRule, seed: int) -> list[dict[str, Any]]:
    """The rows of all pairs with order, winner, outcome, reply, cost_usd and judge: one a pair, or two for `both`.

    Raises:
        UserError: the judge gave another number of verdicts.
    """
    rows: list[dict[str, Any]] = []
    comparisons: list[Comparison] = []
    for pair in pairs:
        texts = (pair.policy, pair.reference)
        for order in orders_of(rule, seed, *pair.key):
            first, second = texts if order == "policy_first" else texts[::-1]
            comparisons.append(Comparison(pair.key[0], pair.prompt, pair.facts, first, second))
            rows.append({**pair.row, "order": order, "judge": judge.name})
    for row, verdict in zip(rows, require_verdicts(judge, comparisons), strict=True):
        row |= {"winner": verdict.winner, "reply": verdict.reply, "cost_usd": verdict.cost_usd}
        row["outcome"] = outcome_of(verdict.winner, row["order"])
    return rows
