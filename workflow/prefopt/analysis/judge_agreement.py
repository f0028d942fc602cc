"""The stage `judge_agreement`: how far the judges of a task agree on the same texts."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.judge_statistics import agreement
from prefopt.analysis.texts import write_csv
from prefopt.analysis.verdicts import KEY, SCORE, read_verdicts
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class AgreementRecipe:
    """Whose the verdict tables are, and the confidence of each task's intervals."""

    tables: tuple[tuple[str, str, int], ...]  # task, judge ("main": the task's own) and seed of each table
    confidence: dict[str, float]
    seed: int


def agreement_table(verdicts: pd.DataFrame, recipe: AgreementRecipe) -> pd.DataFrame:
    """A row for each pair of judges of a task and each run, and one over all runs; the texts of all seeds are counted.

    Args:
        verdicts: settled verdicts with the columns task, judge_name and training_seed; only what both judges of a pair have
            judged, and neither found invalid, is compared.
        recipe: confidence and seed.

    Returns:
        task, run, judge_a, judge_b, n, agreement, ci_low, ci_high, kappa, kappa_low, kappa_high, win_rate_a,
        win_rate_b, tie_rate_a, tie_rate_b, identity_a, identity_b, seed.
    """
    rows = []
    for task, of_task in verdicts.groupby("task", sort=False):
        for a, b in itertools.combinations(of_task["judge_name"].drop_duplicates(), 2):
            sides = [of_task[of_task["judge_name"] == name] for name in (a, b)]
            both = sides[0].merge(sides[1], on=["training_seed", *KEY], suffixes=("_a", "_b"), validate="one_to_one")
            both = both[(both["outcome_a"] != "invalid") & (both["outcome_b"] != "invalid")]
            identities = {f"identity_{side}": rows_["judge"].iloc[0] for side, rows_ in zip("ab", sides, strict=True)}
            runs = both["run"].drop_duplicates().tolist()
            for run in ["all", *runs] if len(runs) > 1 else runs:
                rows.append(
                    {
                        "task": task,
                        "run": run,
                        "judge_a": a,
                        "judge_b": b,
                        **agreement_figures(
                            both if run == "all" else both[both["run"] == run],
                            recipe.confidence[str(task)],
                            recipe.seed,
                        ),
                        **identities,
                        "seed": recipe.seed,
                    }
                )
    return pd.DataFrame(rows)


def agreement_figures(both: pd.DataFrame, confidence: float, seed: int) -> dict[str, Any]:
    """Agreement, kappa and marginals of the columns outcome_a and outcome_b, over prompts."""
    a, b = both["outcome_a"], both["outcome_b"]
    found = agreement(a.tolist(), b.tolist(), both["prompt_id"].tolist(), confidence, seed)
    return {
        "n": found.n,
        "agreement": found.rate,
        "ci_low": found.rate_interval.low,
        "ci_high": found.rate_interval.high,
        "kappa": found.kappa,
        "kappa_low": found.kappa_interval.low,
        "kappa_high": found.kappa_interval.high,
        "win_rate_a": a.map(SCORE).astype(float).mean(),
        "win_rate_b": b.map(SCORE).astype(float).mean(),
        "tie_rate_a": (a == "tie").mean(),
        "tie_rate_b": (b == "tie").mean(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `judge_agreement`."""
    parser.add_argument(
        "--verdicts", required=True, type=Path, nargs="+", help="verdict tables, as the recipe names them"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table."""
    recipe = from_json(AgreementRecipe, args.recipe)
    write_csv(args.out, agreement_table(_read(args.verdicts, recipe), recipe))


def _read(paths: Sequence[Path], recipe: AgreementRecipe) -> pd.DataFrame:
    if len(paths) != len(recipe.tables):
        raise UserError(f"{len(paths)} verdict tables are given, the recipe names {len(recipe.tables)}.")
    frames = [
        read_verdicts(path).assign(task=task, judge_name=judge, training_seed=seed)
        for path, (task, judge, seed) in zip(paths, recipe.tables, strict=True)
    ]
    return pd.concat(frames, ignore_index=True)
