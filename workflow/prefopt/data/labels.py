"""Single labelled completions: pairs taken apart, and for each example a completion of another prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prefopt.data.raw.splits import position
from prefopt.errors import UserError


def taken_apart(pairs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Two rows of raw_labels for each row of raw_preferences: chosen is desirable, rejected is not."""
    for pair in pairs:
        shared = {name: pair[name] for name in ("prompt_id", "prompt", "split", "source", "messages")}
        for side in ("chosen", "rejected"):
            made = {"example_id": f"{pair['pair_id']}-{side}", "completion": pair[side], "label": side == "chosen"}
            yield {**shared, **made}


def mismatched(prompts: Sequence[str], what: str) -> list[int]:
    """For each example another one, of another prompt; each is taken once, so that both have the same completions.

    The prompts stand in an order of their hashes, and each example takes what stands as many places on as the most
    frequent prompt has examples.

    Args:
        prompts: names of the examples' prompts, at least one.
        what: whose they are, for a message.

    Returns:
        Indices into `prompts`.

    Raises:
        UserError: more than half of the examples are of one prompt.
    """
    ((most, shift),) = Counter(prompts).most_common(1)
    if 2 * shift > len(prompts):
        raise UserError(
            f"{shift} of {len(prompts)} examples of {what} are of the prompt {most!r}, more than half, so that not each can "
            f"have a completion of another prompt: give more prompts, or change data.splits."
        )
    order = sorted(range(len(prompts)), key=lambda i: (position("mismatched", prompts[i]), prompts[i], i))
    found = [0] * len(prompts)
    for place, i in enumerate(order):
        found[i] = order[(place + shift) % len(order)]
    return found
