"""Verdicts as the tables count them: one outcome a sample, whether it was shown in one order or in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from prefopt.errors import UserError
from prefopt.store.tables import read_table

KEY = ["run", "prompt_id", "temperature", "sample_index"]  # of a judged sample
SCORE = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def read_verdicts(path: str | Path) -> pd.DataFrame:
    """A verdicts table, settled; its manifest is `.attrs["manifest"]`."""
    table = read_table(path, "verdicts")
    settled = settle(table, KEY)
    settled.attrs = table.attrs
    return settled


def settle(verdicts: pd.DataFrame, key: list[str]) -> pd.DataFrame:
    """One row for each pair of texts.

    A pair that was shown in both orders has the outcome on which both agree; where they disagree it is a tie, and
    where one is invalid it is invalid.

    Args:
        verdicts: rows with the columns of `key`, order, winner, outcome, reply and cost_usd, one or two a pair.
        key: columns that name a pair.

    Returns:
        The pairs in the order of their first rows, with these columns instead of order and winner: `flipped`
        (whether the two orders disagree; NA for one order or an invalid verdict), `decided` (verdicts that name a
        winner) and `first_wins` (those that name the text shown first).
    """
    rows = verdicts.assign(
        decided=verdicts["winner"].isin(["first", "second"]).astype(int),
        first_wins=(verdicts["winner"] == "first").astype(int),
        invalid=verdicts["outcome"] == "invalid",
    ).drop(columns=["order", "winner"])
    groups = rows.groupby(key, sort=False)
    single = rows.drop(columns="invalid").drop_duplicates(key).set_index(key)
    outcomes = groups["outcome"]
    first, last, count = outcomes.first(), outcomes.last(), outcomes.size()
    valid = ~groups["invalid"].any()
    single["outcome"] = first.where(first == last, "tie").where(valid, "invalid")
    single["flipped"] = (first != last).astype("boolean").mask((count == 1) | ~valid)
    single["reply"] = groups["reply"].agg("\n".join) if (count > 1).any() else single["reply"]
    for column in ("cost_usd", "decided", "first_wins"):
        single[column] = groups[column].sum()
    return single.reset_index()


def seed_scores(verdicts: pd.DataFrame) -> np.ndarray:
    """Mean score of each seed's valid verdicts on each prompt, float64 [seeds, prompts]; NaN where none is valid.

    Args:
        verdicts: settled verdicts of one run at one temperature, with the column seed.
    """
    scores = verdicts["outcome"].map(SCORE).groupby([verdicts["seed"], verdicts["prompt_id"]]).mean()
    return scores.unstack().to_numpy(float)


def select_temperatures(verdicts: pd.DataFrame) -> dict[str, float]:
    """Each run's temperature by its win rate on the validation prompts; equal ones: the lower.

    Raises:
        UserError: a run has no verdict on validation prompts.
    """
    selected = {}
    for run, rows in verdicts.groupby("run"):
        if rows["temperature"].nunique() == 1:
            selected[str(run)] = float(rows["temperature"].iloc[0])
            continue
        validation = rows[rows["split"] == "validation"]
        if set(validation["temperature"]) != set(rows["temperature"]):
            raise UserError(
                f"The run {run!r} lacks verdicts on validation prompts at some temperature, so that its "
                f"temperature cannot be chosen: raise the task's evaluation.validation_prompts."
            )
        rates = validation["outcome"].map(SCORE).groupby(validation["temperature"]).mean().fillna(-1.0)
        # The first of equal rates, and they are sorted by temperature.
        selected[str(run)] = float(rates.index.to_numpy()[rates.to_numpy().argmax()])
    return selected
