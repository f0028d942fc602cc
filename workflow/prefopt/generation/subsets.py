"""The stage `subsets`: of the candidates, those that the best of seeded subsets are, for a judge that costs something.

Where judging is free, every candidate is judged and the curve over N is the mean over all subsets. Where it is not, a
few random subsets of each size are drawn, and only their best candidates are judged.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pandas as pd

from prefopt.analysis.best_of_n_curve import subset_weights
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.tables import read_table, write_table

_KEY = ["prompt_id", "temperature", "sample_index"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubsetsRecipe:
    """The sizes of the subsets, how many of each are drawn, and the seed."""

    n: tuple[int, ...]
    subsets: int
    seed: int


def chosen_candidates(candidates: pd.DataFrame, recipe: SubsetsRecipe) -> pd.DataFrame:
    """The candidates on test prompts that some subset chooses.

    Args:
        candidates: rows of a samples table with their reward.
        recipe: sizes, number and seed of the subsets.
    """
    test = candidates[candidates["split"] == "test"].sort_values(_KEY, ignore_index=True)
    kept: set[int] = set()
    for (prompt_id, temperature), group in test.groupby(["prompt_id", "temperature"]):
        rewards, name = group["reward"].tolist(), (str(prompt_id), float(str(temperature)))
        for n in recipe.n:
            weights = subset_weights(rewards, n, recipe.subsets, recipe.seed, name)
            kept.update(group.index[weights > 0])
    return test.loc[sorted(kept)].reset_index(drop=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `subsets`."""
    parser.add_argument("--candidates", required=True, type=Path, help="samples table of candidates")
    parser.add_argument("--scores", required=True, type=Path, help="their scores table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="samples table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the candidates that are to be judged."""
    recipe = from_json(SubsetsRecipe, args.recipe)
    candidates = read_table(args.candidates, "samples")
    manifest = candidates.attrs["manifest"]
    scores = read_table(args.scores, "scores", samples=manifest["content_hash"])
    chosen = chosen_candidates(candidates.merge(scores, on=_KEY, validate="one_to_one"), recipe)
    write_table(
        args.out,
        "samples",
        chosen[candidates.columns],
        prompts=manifest["prompts"],
        candidates=manifest["content_hash"],
        recipe=to_dict(recipe),
    )
