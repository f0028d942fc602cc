"""Best-of-N: of the first N candidates of each prompt, the one that the reward model likes best.

Any N up to the number of candidates is read from the same table of candidates, without sampling again. The
candidates carry no reference log-probability, which is computed here for the chosen ones only.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.generation.sample import reference_logps
from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.lm.precision import DTYPES
from prefopt.runtime.usage import default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, write_table

_KEY = ["prompt_id", "temperature", "sample_index"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNRecipe:
    """How the chosen completions' reference log-probabilities are computed."""

    token_budget: int
    dtype: Literal["float32", "bfloat16"]


def best_of_n(candidates: pd.DataFrame, scores: pd.DataFrame, greedy: pd.DataFrame, n: int, run: str) -> pd.DataFrame:
    """The best candidate of each prompt and temperature; at temperature 0 the greedy completion.

    Args:
        candidates: samples table with at least n samples for each prompt and temperature above 0.
        scores: their rewards.
        greedy: samples table that holds the same policy's completions at temperature 0.
        n: how many candidates to compare; ties go to the earlier one.
        run: name of the run in the result.

    Returns:
        Rows of the samples table with `sample_index` 0.

    Raises:
        UserError: a prompt has fewer than n candidates, or a candidate has no score, or one that is not finite.
    """
    first = candidates[(candidates["sample_index"] < n) & (candidates["temperature"] > 0)]
    counts = first.groupby(["prompt_id", "temperature"], as_index=False).size()
    for row in counts[counts["size"] < n].itertuples():
        raise UserError(
            f"prompt {row.prompt_id!r} has {row.size} candidates at temperature {row.temperature}, best-of-{n} needs "
            f"{n}: sample more candidates."
        )
    scored = first.merge(scores, on=_KEY, how="left", validate="one_to_one")
    if scored["reward"].isna().any():
        prompt_id = scored.loc[scored["reward"].isna(), "prompt_id"].iloc[0]
        raise UserError(f"prompt {prompt_id!r} has a candidate without a score: run the stage `score` again.")
    require_finite(scored["reward"], scored["prompt_id"], "A score", "run the stage `score` again")
    best = scored.loc[scored.groupby(["prompt_id", "temperature"], sort=False)["reward"].idxmax()]
    zero = greedy[greedy["temperature"] == 0]
    rows = pd.concat([zero, best[candidates.columns]], ignore_index=True)
    return rows.assign(run=run, sample_index=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `best_of_n`."""
    parser.add_argument("--candidates", required=True, type=Path, help="samples table of candidates")
    parser.add_argument("--scores", required=True, type=Path, help="their scores table")
    parser.add_argument("--greedy", required=True, type=Path, help="samples table with temperature 0")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--reference-model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--run", required=True, help="name of the run in the samples table")
    parser.add_argument("--n", required=True, type=int, help="how many candidates are compared")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="samples table that is made")


def run(args: argparse.Namespace) -> None:
    """Chooses the best candidates and writes them as a samples table."""
    recipe = from_json(BestOfNRecipe, args.recipe)
    candidates = read_table(args.candidates, "samples")
    manifest = candidates.attrs["manifest"]
    scores = read_table(args.scores, "scores", samples=manifest["content_hash"])
    greedy = read_table(args.greedy, "samples", prompts=manifest["prompts"])
    expected = {"content_hash": manifest["prompts"], "tokenizer_hash": tokenizer_hash(args.reference_model)}
    prompts = read_table(args.prompts, "prompts", **expected)
    rows = best_of_n(candidates, scores, greedy, args.n, args.run)
    model, _ = load_policy(args.reference_model, device=default_device(), dtype=DTYPES[recipe.dtype])
    chosen: list[dict[Any, Any]] = rows.to_dict("records")
    rows["reference_logp"] = reference_logps(model, prompts, chosen, [len(chosen)], recipe.token_budget, recipe.dtype)
    write_table(
        args.out,
        "samples",
        rows,
        prompts=manifest["prompts"],
        model_weights=manifest["model_weights"],
        reference_weights=weights_hash(args.reference_model),
        candidates=manifest["content_hash"],
        scores=scores.attrs["manifest"]["content_hash"],
        reward_weights=scores.attrs["manifest"]["reward_weights"],
        best_of_n=args.n,
        recipe=to_dict(recipe),
    )
