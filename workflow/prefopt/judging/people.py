"""People as the judge: the majority of their votes on a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.judging.judge import Comparison, Verdict, Winner
from prefopt.store.tables import read_table

_OTHER = {"win": "loss", "loss": "win", "tie": "tie"}
_WINNERS: dict[str, Winner] = {"win": "first", "loss": "second", "tie": "tie"}
_Pair = tuple[str, str, str]


class HumanJudge:
    """Counts votes: more for one text than for the other decide, equally many are a tie.

    Args:
        name: "human:" and the study.
        votes: by prompt_id and the two texts, outcomes seen from the first of them.
        facts: what is known of the raters.
    """

    def __init__(self, name: str, votes: Mapping[_Pair, list[str]], facts: Mapping[str, Any]) -> None:
        self.name = name
        self._votes, self._facts = votes, facts

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison; the reply holds the counts.

        Raises:
            UserError: nobody has voted on a pair.
        """
        found = [self._outcomes(comparison) for comparison in comparisons]
        if missing := [c.prompt_id for c, outcomes in zip(comparisons, found, strict=True) if not outcomes]:
            named = ", ".join(map(repr, missing[:5]))
            raise UserError(
                f"Nobody has voted on {len(missing)} of {len(comparisons)} pairs, those of the prompts {named} "
                f"{'and others' if len(missing) > 5 else ''}: add the matchup to human.matchups with as many items as "
                f"there are test prompts, or judge fewer temperatures."
            )
        return [_verdict(Counter(outcomes)) for outcomes in found]

    def report(self) -> Mapping[str, Any]:
        """Number of raters, and whether they are simulated."""
        return self._facts

    def _outcomes(self, comparison: Comparison) -> list[str]:
        first, second = comparison.first.strip(), comparison.second.strip()
        if first == second:
            return ["tie"]
        straight = self._votes.get((comparison.prompt_id, first, second), [])
        turned = self._votes.get((comparison.prompt_id, second, first), [])
        return [*straight, *(_OTHER[outcome] for outcome in turned)]


def load_votes(path: Path) -> HumanJudge:
    """The judge that a votes table makes."""
    table = read_table(path, "votes")
    votes: dict[_Pair, list[str]] = {}
    for row in table.itertuples():
        pair = (str(row.prompt_id), str(row.first).strip(), str(row.second).strip())
        votes.setdefault(pair, []).append(str(row.outcome))
    manifest = table.attrs["manifest"]
    simulated = bool(table["simulated"].any())
    name = f"human:{'simulated-' if simulated else ''}{manifest['study'][:12]}"
    return HumanJudge(name, votes, {"raters": manifest["raters"], "simulated_raters": simulated})


def _verdict(counts: Counter[str]) -> Verdict:
    if counts["win"] == counts["loss"]:
        winner: Winner = "tie"
    else:
        winner = _WINNERS["win" if counts["win"] > counts["loss"] else "loss"]
    return Verdict(winner, ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))
