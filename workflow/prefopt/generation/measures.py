"""What a completion looks like, whatever it says: whether it ends, repeats itself, copies its prompt or is empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.store.files import stable_hash

GRAM = 4  # tokens of what is repeated or copied


def completion_measures(prompt: Sequence[int], completion: Sequence[int], text: str, ended: bool) -> dict[str, Any]:
    """Measures of one completion, columns of the evaluations table.

    Args:
        prompt: its token ids.
        completion: token ids; where an end token was reached it may be among them.
        text: of the completion, without special tokens.
        ended: whether it came to an end of its own, at an end token or a stop string, before the length limit.

    Returns:
        ended; repeats, whether four tokens in a row stand in it twice; copies, whether more than half of its runs of four
        tokens stand in the prompt; empty, whether the text is white space or nothing; text_hash, equal for equal texts.
    """
    grams = _grams(completion)
    of_prompt = set(_grams(prompt))
    return {
        "ended": ended,
        "repeats": len(set(grams)) < len(grams),
        "copies": 2 * sum(gram in of_prompt for gram in grams) > len(grams),
        "empty": not text.strip(),
        "text_hash": stable_hash(text),
    }


def _grams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(int(token) for token in ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
