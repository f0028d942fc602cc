"""The stage `implicit_rewards`: a policy's own implicit reward of completions (Rafailov et al. 2023, equation 5).

A policy that labels its own samples so rewards itself (Chen et al. 2024, "Bootstrapping Language Models with DPO Implicit
Rewards", equation 4).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from prefopt.experiment.recipes import from_json, to_dict
from prefopt.generation.score import read_in_rows
from prefopt.lm.batching import Row
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import check_tokenizer, load_policy, tokenizer_hash, weights_hash
from prefopt.lm.precision import DTYPES, autocast
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import read_table, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImplicitRewardsRecipe:
    """The scale of the rewards, and how they are computed."""

    beta: float
    length_normalized: bool  # log-ratios are averaged over tokens, as in a loss that does so
    token_budget: int
    dtype: Literal["float32", "bfloat16"]


@torch.no_grad()
def sample_logps(
    folder: Path, prompts: pd.DataFrame, samples: pd.DataFrame, recipe: ImplicitRewardsRecipe, usage: Usage
) -> pd.Series:
    """Log-probability (nats, at temperature 1) of each sample under the policy in a folder, in the samples' order."""
    device = default_device()
    model, _ = load_policy(folder, device=device, dtype=DTYPES[recipe.dtype])

    def read(row: Row) -> Tensor:
        with autocast(recipe.dtype, device):
            return completion_logprobs(model, [row]).sums

    return read_in_rows("implicit_rewards", model, prompts, samples, recipe.token_budget, usage, read)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `implicit_rewards`."""
    parser.add_argument("--model", required=True, type=Path, help="the policy whose implicit reward it is")
    parser.add_argument("--reference-model", required=True, type=Path, help="the reference policy that it started from")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--samples", required=True, type=Path, help="samples table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the scores table, or a shard of it."""
    recipe, shard = from_json(ImplicitRewardsRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    check_tokenizer(args.reference_model, args.model)
    usage = Usage("implicit_rewards", default_device(), recipe.dtype)
    # A group is read by itself, so that it does not matter with which others.
    rows = shard.rows(list(zip(samples["prompt_id"], samples["temperature"], strict=True)))
    own = samples.iloc[rows]
    # One after the other, so that one is in memory.
    policy, reference = (
        sample_logps(folder, prompts, own, recipe, usage) for folder in (args.model, args.reference_model)
    )
    rewards = recipe.beta * (policy - reference) / (own["tokens"] if recipe.length_normalized else 1)
    advice = f"look at these prompts, and at the weights of {args.model} and {args.reference_model}"
    require_finite(rewards, own["prompt_id"], "A sample's implicit reward", advice)
    write_table(
        args.out,
        "scores",
        own[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards),
        samples=samples.attrs["manifest"]["content_hash"],
        reward_weights=[weights_hash(args.model), weights_hash(args.reference_model)],
        recipe=to_dict(recipe),
        used=usage.report(),
        **shard.manifest(rows),
    )
