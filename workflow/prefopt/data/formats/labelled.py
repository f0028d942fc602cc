"""Rows with a judgment: one response with a thumb up or down, or two with a winner."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.formats.answers import answered
from prefopt.data.formats.examples import Pair, Thumb, completion, pair
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed, field_of
from prefopt.data.raw.splits import PostKeys

# As JSON, Parquet and CSV spell them; 1.0 is 1.
_LABELS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
_WINNERS = {"a": 0, "b": 1, "model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None, "both_bad": None}


def parse_thumb(row: Mapping[str, Any]) -> Thumb:
    """`prompt, completion, label`.

    Raises:
        Malformed: a field is missing or of the wrong kind, or the label is no truth value.
        Unusable: see `answers.answered`.
    """
    label = field_of(row, "label")
    known = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(known, str | int | float) or known not in _LABELS:
        raise Malformed(f"'label' is {reprlib.repr(label)}, which is neither true nor false")
    post, (response,) = answered(row, ("completion",))
    return Thumb(post, completion(response), _LABELS[known])


def paired(thumbs: Sequence[Thumb]) -> tuple[list[Pair], list[Thumb]]:
    """Pairs of what pleased and what did not, the first of a prompt with the first, and the thumbs that are left over."""
    keys = PostKeys()
    for thumb in thumbs:
        keys.add(thumb.post.post_id, thumb.post.document, thumb.post.known_by)
    sides: dict[str, tuple[list[int], list[int]]] = {}
    for number, thumb in enumerate(thumbs):
        down, up = sides.setdefault(keys.key(thumb.post.document), ([], []))
        (up if thumb.up else down).append(number)
    both = [
        (good, bad)
        for down, up in sides.values()
        for good, bad in zip(up, down, strict=False)
        if thumbs[good].response != thumbs[bad].response
    ]
    pairs = [Pair(thumbs[good].post, thumbs[good].response, thumbs[bad].response, "") for good, bad in both]
    taken = {number for two in both for number in two}
    return pairs, [thumb for number, thumb in enumerate(thumbs) if number not in taken]


def parse_winner(row: Mapping[str, Any], ties: str) -> list[Pair]:
    """`prompt, response_a, response_b, winner`, or `conversation_a, conversation_b, winner`.

    Args:
        row: the record.
        ties: "drop", or "both": a pair in each order, which together prefer neither.

    Raises:
        Malformed: a field is missing or of the wrong kind, or the winner is neither of the two and no tie.
        Unusable: "tie"; "equal_texts"; or see `answers.answered`.
    """
    kind = "conversation" if row.get("conversation_a") is not None else "response"
    given = field_of(row, "winner")
    known = given.strip().lower() if isinstance(given, str) else None
    if known not in _WINNERS:
        raise Malformed(f"'winner' is {reprlib.repr(given)}, which is none of {', '.join(_WINNERS)}")
    post, texts = answered(row, (f"{kind}_a", f"{kind}_b"))
    winner = _WINNERS[known]
    orders = [pair(post, *texts), pair(post, *reversed(texts))]
    if winner is not None:
        return [orders[winner]]
    if ties == "drop":
        raise Unusable("tie")
    return orders
