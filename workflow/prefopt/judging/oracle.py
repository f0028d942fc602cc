"""The exact judge of the embedded tasks: it reads both texts with the generator's grammar against the hidden facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.data.synthetic.hidden import world_of
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


def _verdict(comparison: Comparison) -> Verdict:
    if not comparison.facts:
        raise UserError(
            f"The oracle cannot judge prompt {comparison.prompt_id!r}, which has no hidden facts: it knows the "
            f"embedded records only, set the task's judge.kind to reward_model."
        )
    hidden = world_of(comparison.facts)
    scores = [hidden.quality(comparison.facts, text).score for text in (comparison.first, comparison.second)]
    winner = hidden.compare(comparison.facts, comparison.first, comparison.second)
    return Verdict(winner, f"first {scores[0]:.4f}, second {scores[1]:.4f}")
