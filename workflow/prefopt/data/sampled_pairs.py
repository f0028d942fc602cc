"""The stage `sampled_pairs`: preferences among a policy's own completions, ordered by their rewards (section 6.1)."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from prefopt.data.raw.splits import position
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.files import write_text
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPairsRecipe:
    """Which completions of a prompt are pairs.

    `all` are every two; `best_vs_worst` is one pair a prompt; `best_vs_random` another, of the best and a worse one that
    the seed draws.
    """

    pairs: Literal["all", "best_vs_worst", "best_vs_random"]
    length_penalty: float  # what each token takes from a completion's reward
    missing_eos_reward: float | None  # replaces the reward of a completion that did not end; None keeps it
    seed: int


def preference_pairs(
    prompts: pd.DataFrame, samples: pd.DataFrame, scores: pd.DataFrame, recipe: SampledPairsRecipe
) -> tuple[list[dict[str, Any]], Counter[str], list[float]]:
    """Pairs of a prompt's completions by the recipe's rule, the one with the higher reward chosen.

    The pairs hold the sampled tokens themselves: decoding and encoding them again may give others.

    Args:
        prompts: prompts table.
        samples: samples table, several completions of each prompt at one temperature.
        scores: scores table of these samples.
        recipe: see `SampledPairsRecipe`.

    Returns:
        Rows of the preferences table; how many pairs were dropped, "equal_rewards" or "equal_tokens"; the rewards'
        difference in each pair.
    """
    by_id = prompts.set_index("prompt_id")
    rewarded = samples.merge(scores, on=["prompt_id", "temperature", "sample_index"], validate="one_to_one")
    if len(rewarded) != len(samples):
        raise UserError(f"{len(samples) - len(rewarded)} samples have no reward: score them again.")
    require_finite(rewarded["reward"], rewarded["prompt_id"], "A sample's reward", "score them again")
    rewarded["reward"] = rewarded["reward"].astype(float) - recipe.length_penalty * rewarded["tokens"]
    if recipe.missing_eos_reward is not None:
        rewarded.loc[rewarded["finish_reason"] == "length", "reward"] = recipe.missing_eos_reward
    rows, dropped, gaps = [], Counter[str](), []
    for prompt_id, group in rewarded.groupby("prompt_id", sort=False):
        prompt = by_id.loc[prompt_id]
        completions: list[dict[str, Any]] = group.sort_values("sample_index").to_dict("records")  # type: ignore[assignment]
        for a, b in _compared(completions, recipe, prompt_id):
            if a["token_ids"].tolist() == b["token_ids"].tolist():
                dropped["equal_tokens"] += 1
                continue
            if a["reward"] == b["reward"]:
                dropped["equal_rewards"] += 1
                continue
            chosen, rejected = (a, b) if a["reward"] > b["reward"] else (b, a)
            gaps.append(float(chosen["reward"] - rejected["reward"]))
            rows.append(
                {
                    "pair_id": f"{prompt_id}-{chosen['sample_index']}-{rejected['sample_index']}",
                    "prompt_id": prompt_id,
                    "prompt": prompt["prompt"],
                    "chosen": chosen["text"],
                    "rejected": rejected["text"],
                    "split": prompt["split"],
                    "source": "sampled",
                    "prompt_ids": prompt["prompt_ids"].tolist(),
                    "chosen_ids": chosen["token_ids"].tolist(),
                    "rejected_ids": rejected["token_ids"].tolist(),
                }
            )
    return rows, dropped, gaps


def _compared(
    completions: list[dict[str, Any]], recipe: SampledPairsRecipe, prompt_id: Any
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The two completions of each pair that is to be looked at; of equal rewards the first sampled are the best."""
    if recipe.pairs == "all":
        return list(itertools.combinations(completions, 2))
    ranked = sorted(completions, key=lambda one: -one["reward"])
    others = ranked[1:]
    if recipe.pairs == "best_vs_random":
        worse = [one for one in others if one["reward"] < ranked[0]["reward"]] or others
        drawn = math.floor(position(f"pairs-{recipe.seed}", str(prompt_id)) * len(worse))
        return [(ranked[0], one) for one in worse[drawn : drawn + 1]]
    return [(ranked[0], one) for one in others[-1:]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `sampled_pairs`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table, several completions a prompt")
    parser.add_argument("--scores", required=True, type=Path, help="scores table of these samples")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="preferences table that is made")
    parser.add_argument("--summary", required=True, type=Path, help="JSON file with the account that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the preferences table and its account."""
    recipe = from_json(SampledPairsRecipe, args.recipe)
    prompts = read_table(args.prompts, "prompts")
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    scores = read_table(args.scores, "scores", samples=samples.attrs["manifest"]["content_hash"])
    rows, dropped, gaps = preference_pairs(prompts, samples, scores, recipe)
    if not rows:
        raise UserError(
            f"{args.samples} gives no pair of unequal rewards: sample more completions, longer ones, or at a higher temperature."
        )
    summary = {
        "read": len(rows) + dropped.total(),
        "kept": len(rows),
        "dropped": dict(sorted(dropped.items())),
        "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
        "mean_difference_of_rewards": float(np.mean(gaps)),
    }
    write_table(
        args.out,
        "preferences",
        rows,
        tokenizer_hash=prompts.attrs["manifest"]["tokenizer_hash"],
        samples=samples.attrs["manifest"]["content_hash"],
        scores=scores.attrs["manifest"]["content_hash"],
        recipe=to_dict(recipe),
        summary=summary,
    )
    write_text(args.summary, json.dumps(summary, indent=2, sort_keys=True) + "\n")
    logger.info("sampled_pairs: %s", json.dumps(summary, sort_keys=True))
