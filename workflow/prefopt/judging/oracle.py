"""The exact judge of the embedded tasks: it reads both texts with the generator's grammar against the hidden facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from prefopt.data.synthetic import dialogue_world, world
from prefopt.errors import UserError
from prefopt.judging.judge import Comparison, Verdict

NAME = "oracle:embedded-v1"


class OracleJudge:
    """Prefers the text of higher hidden quality; equal quality is a tie."""

    name = NAME

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison; the reply holds both scores.

        Raises:
            UserError: a prompt has no hidden facts, because its records are not the embedded ones.
        """
        return [_verdict(comparison) for comparison in comparisons]

    def report(self) -> Mapping[str, Any]:
        """Nothing: the oracle's verdicts are exact by construction."""
        return {}


def quality_score(facts: str, prompt_id: str, text: str) -> float:
    """The hidden quality of a text.

    Raises:
        UserError: the prompt has no hidden facts, because its records are not the embedded ones.
    """
    if not facts:
        raise UserError(f"Prompt {prompt_id!r} has no hidden facts, so that nobody can simulate a rater of its texts.")
    return float(_world(facts).quality(facts, text).score)


def well_formed(facts: str, text: str) -> bool | None:
    """Whether the generator's grammar parses the text whole; None where the prompt has no facts or grammar."""
    return bool(_world(facts).quality(facts, text).well_formed) if facts else None


def _world(facts: str) -> ModuleType:
    """The world that hid these facts: dialogues name theirs, posts and news have the first one's."""
    return dialogue_world if json.loads(facts).get("world") == dialogue_world.NAME else world


def _verdict(comparison: Comparison) -> Verdict:
    if not comparison.facts:
        raise UserError(
            f"The oracle cannot judge prompt {comparison.prompt_id!r}, which has no hidden facts: it knows the "
            f"embedded records only, set the task's judge.kind to reward_model."
        )
    hidden = _world(comparison.facts)
    scores = [hidden.quality(comparison.facts, text).score for text in (comparison.first, comparison.second)]
    winner = hidden.compare(comparison.facts, comparison.first, comparison.second)
    return Verdict(winner, f"first {scores[0]:.4f}, second {scores[1]:.4f}")
