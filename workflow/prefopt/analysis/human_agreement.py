"""The stage `human_agreement`: what people and judges say of the same pairs, and how far they agree (Table 2)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.judge_statistics import agreement
from prefopt.analysis.statistics import score_interval
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import SCORE, settle
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_table

_PEOPLE = {False: "people", True: "simulated raters"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HumanAgreementRecipe:
    """Whose the tables are, and the confidence of the intervals."""

    tables: tuple[tuple[str, str], ...]  # task and judge of each table of verdicts
    confidence: dict[str, float]  # of each task; one for each votes table
    seed: int


def human_agreement_table(
    task: str,
    votes: pd.DataFrame,
    verdicts: dict[str, pd.DataFrame],
    equal_share: dict[str, float],
    recipe: HumanAgreementRecipe,
) -> pd.DataFrame:
    """For each matchup of a task a row of the raters and one of each judge.

    Win rates are those of the matchup's first side, a tie being half. Agreement is with single votes of people (for
    the raters' own row: of two raters on the same item), where both sides name a winner: ties are left out, as in
    the paper.

    Args:
        task: its name.
        votes: rows of a votes table.
        verdicts: settled item_verdicts by the judge's name.
        equal_share: share of test prompts, by matchup, for which both sides wrote the same; nobody was asked of these.
        recipe: confidence and seed.

    Returns:
        task, matchup, equal_share, judge, raters, items, n (votes or verdicts), win_rate, ci_low, ci_high, ties, invalid,
        agreement_n, agreement, agreement_low, agreement_high, kappa, kappa_low, kappa_high, identity, seed.
    """
    rows = []
    people, confidence = _PEOPLE[bool(votes["simulated"].any())], recipe.confidence[task]
    for matchup, of_matchup in votes.groupby("matchup", sort=False):
        base = {"task": task, "matchup": matchup, "equal_share": equal_share[str(matchup)]}
        rater_figures = {
            **{"judge": people, "raters": of_matchup["rater"].nunique(), **_win_rate(of_matchup, confidence)},
            **_agreement(_pairs_of_raters(of_matchup), confidence, recipe.seed),
            **{"identity": people, "seed": recipe.seed},
        }
        rows.append({**base, **rater_figures})
        for name, table in verdicts.items():
            judged = table[table["matchup"] == matchup]
            against = of_matchup.merge(judged, on="item_id", suffixes=("_a", "_b"), validate="many_to_one")
            rows.append(
                {
                    **base,
                    **{"judge": name, "raters": 0, **_win_rate(judged, confidence)},
                    **_agreement(against, confidence, recipe.seed),
                    **{"identity": judged["judge"].iloc[0], "seed": recipe.seed},
                }
            )
    return pd.DataFrame(rows)


def _win_rate(rows: pd.DataFrame, confidence: float) -> dict[str, Any]:
    valid = rows[rows["outcome"] != "invalid"]
    scores = valid["outcome"].map(SCORE).astype(float)
    interval = score_interval(scores.tolist(), valid["item_id"].tolist(), confidence)
    return {
        "items": rows["item_id"].nunique(),
        "n": len(rows),
        "win_rate": scores.mean(),
        "ci_low": interval.low,
        "ci_high": interval.high,
        "ties": int((rows["outcome"] == "tie").sum()),
        "invalid": len(rows) - len(valid),
    }


def _pairs_of_raters(votes: pd.DataFrame) -> pd.DataFrame:
    """Each two votes of different raters on one item: item_id, outcome_a, outcome_b."""
    pairs = [
        {"item_id": item, "outcome_a": a, "outcome_b": b}
        for item, group in votes.sort_values("rater").groupby("item_id")
        for a, b in itertools.combinations(group["outcome"], 2)
    ]
    return pd.DataFrame(pairs, columns=["item_id", "outcome_a", "outcome_b"])


def _agreement(pairs: pd.DataFrame, confidence: float, seed: int) -> dict[str, Any]:
    decided = pairs[pairs["outcome_a"].isin(["win", "loss"]) & pairs["outcome_b"].isin(["win", "loss"])]
    found = agreement(
        *(decided["outcome_a"].tolist(), decided["outcome_b"].tolist(), decided["item_id"].tolist()),
        confidence=confidence,
        seed=seed,
    )
    return {
        "agreement_n": found.n,
        "agreement": found.rate,
        "agreement_low": found.rate_interval.low,
        "agreement_high": found.rate_interval.high,
        "kappa": found.kappa,
        "kappa_low": found.kappa_interval.low,
        "kappa_high": found.kappa_interval.high,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `human_agreement`."""
    parser.add_argument("--votes", required=True, type=Path, nargs="+", help="votes tables, as the recipe names them")
    parser.add_argument(
        "--verdicts", required=True, type=Path, nargs="+", help="item_verdicts, as the recipe names them"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table."""
    recipe = from_json(HumanAgreementRecipe, args.recipe)
    tables = []
    for task, path in zip(recipe.confidence, args.votes, strict=True):
        votes = read_table(path, "votes")
        if votes.empty:
            raise UserError(f"{path} holds no vote that counts: see the table of raters beside it.")
        manifest = votes.attrs["manifest"]
        verdicts = {
            judge: settle(read_table(file, "item_verdicts", study=manifest["study"]), ["item_id"])
            for (owner, judge), file in zip(recipe.tables, args.verdicts, strict=True)
            if owner == task
        }
        tables.append(human_agreement_table(task, votes, verdicts, manifest["equal_share"], recipe))
    write_csv(args.out, pd.concat(tables, ignore_index=True))
