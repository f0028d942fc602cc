"""A judge for tests: the longer text wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.judging.judge import Comparison, Verdict

# Of a stage that judges; who judges is put in its place.
RECIPE = {
    **{"kind": "oracle", "order": "random", "seed": 0, "repeat": 0.0, "suffix": "", "token_budget": 64},
    "chat": None,
}


class LongerWins:
    """Judges by length and keeps what it was shown; an empty text gets no verdict."""

    name = "longer:1"

    def __init__(self) -> None:
        self.shown: list[Comparison] = []

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.shown += comparisons
        return [self._verdict(len(one.first), len(one.second)) for one in comparisons]

    def report(self) -> Mapping[str, Any]:
        return {"judge_accuracy": 0.6}

    def _verdict(self, a: int, b: int) -> Verdict:
        if not a or not b:
            return Verdict("invalid", "no text")
        return Verdict("tie" if a == b else "first" if a > b else "second", "by length")
