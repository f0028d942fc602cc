"""The stage `evaluations`: true and learned reward and KL of what a run wrote while it trained."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.generation.measures import completion_measures
from prefopt.generation.sample import reference_logps
from prefopt.lm.models import check_tokenizer, load_policy, tokenizer_hash, weights_hash
from prefopt.lm.precision import DTYPES
from prefopt.rewards.stage import SampleReward, TrueRewardsRecipe, sample_reward, scored_by
from prefopt.rewards.true_reward import reward_hash
from prefopt.runtime.usage import default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationsRecipe:
    """Whose samples they are, and how they are read."""

    run: str
    method: str
    seed: int
    conservativeness: float | None  # what the method's runs differ in
    reward: dict[str, Any]  # see `TrueRewardsRecipe`
    token_budget: int
    dtype: Literal["float32", "bfloat16"]


def evaluations_of(
    samples: pd.DataFrame,
    prompts: pd.DataFrame,
    reference: list[float],
    reward: SampleReward,
    learned: SampleReward | None,
    recipe: EvaluationsRecipe,
) -> pd.DataFrame:
    """Rows of an evaluations table.

    The KL of a step is the mean of `kl`, the log-ratio of policy to reference of each sample at temperature 1: that is
    unbiased, and wider than the exact KL at each token that the sweep has, whose policies are still in memory.

    Args:
        samples: rows of a samples table at temperature 1, whose runs are the run's name, "_step_" and a number of steps.
        prompts: rows of the prompts table.
        reference: log-probability of each under the reference policy.
        reward: of rows of a samples table.
        learned: the reward model's, None where the task has none.
        recipe: see `EvaluationsRecipe`.

    Raises:
        UserError: a reward or KL is not finite: names the prompts.
    """
    conservativeness = float("nan") if recipe.conservativeness is None else recipe.conservativeness
    ids = dict(zip(prompts["prompt_id"], prompts["prompt_ids"], strict=True))
    measures = [
        completion_measures(ids[prompt], completion, text, reason != "length")
        for prompt, completion, text, reason in zip(
            *(samples[name] for name in ("prompt_id", "token_ids", "text", "finish_reason")), strict=True
        )
    ]
    table = samples[["prompt_id", "sample_index", "tokens", "logp"]].assign(
        run=recipe.run,
        method=recipe.method,
        seed=recipe.seed,
        conservativeness=conservativeness,
        step=samples["run"].str.removeprefix(f"{recipe.run}_step_").astype(int),
        reward=reward(samples).numpy(),
        kl=samples["logp"].to_numpy() - reference,
        **pd.DataFrame(measures, index=samples.index),
        learned_reward=float("nan") if learned is None else learned(samples).numpy(),
    )
    for name in ("reward", "kl", *(["learned_reward"] if learned else [])):
        require_finite(table[name], table["prompt_id"], f"A sample's {name}", "look at these prompts and the run")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `evaluations`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table of a run, sampled while it trained")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--reference-model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--true-reward-model", type=Path, help="model that is the true reward, unless a program is")
    parser.add_argument("--reward-model", type=Path, help="the learned reward, where the task has one")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="evaluations table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the evaluations of every step of a run."""
    recipe, device = from_json(EvaluationsRecipe, args.recipe), default_device()
    reward = from_dict(TrueRewardsRecipe, recipe.reward)
    prompts = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.reference_model))
    whole = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    samples = whole[whole["temperature"] == 1].reset_index(drop=True)
    if samples.empty:
        raise UserError(
            f"{args.samples} holds no completion at temperature 1, at which a KL is told: sample there too."
        )
    model, _ = load_policy(args.reference_model, device=device, dtype=DTYPES[recipe.dtype])
    rows = [{str(name): value for name, value in row.items()} for row in samples.to_dict("records")]
    logps = reference_logps(model, prompts, rows, [len(rows)], recipe.token_budget, recipe.dtype)
    learned = None
    if args.reward_model is not None:
        check_tokenizer(args.reward_model, args.reference_model)
        learned = scored_by(args.reward_model, prompts, recipe.token_budget, device)
    true = sample_reward(reward, prompts, args.true_reward_model, device)
    table = evaluations_of(samples, prompts, logps, true, learned, recipe)
    write_table(
        args.out,
        "evaluations",
        table,
        recipe=to_dict(recipe),
        samples=whole.attrs["manifest"]["content_hash"],
        reference_weights=weights_hash(args.reference_model),
        reward_weights=reward_hash(args.true_reward_model),
        learned_reward_weights=reward_hash(args.reward_model),
    )
