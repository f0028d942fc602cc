"""The stage `true_rewards`: the ground-truth reward of every sample."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Literal

import torch

from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.models import weights_hash
from prefopt.rewards.true_reward import load_true_reward
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import read_table, write_table

# Texts of a block, between two progress lines; a shard of the work holds whole blocks.
_TEXTS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueRewardsRecipe:
    """See `load_true_reward`."""

    kind: Literal["rule", "classifier"]
    max_length: int
    batch_size: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `true_rewards`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument(
        "--true-reward-model", type=Path, help="classifier that is the true reward, unless it is a rule"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the scores table, or a shard of it: of each prompt and its completion, read as one text."""
    recipe, shard = from_json(TrueRewardsRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts")
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    usage = Usage("true_rewards", default_device(), torch.float32)
    reward = load_true_reward(folder=args.true_reward_model, device=default_device(), **to_dict(recipe))
    starts = dict(zip(prompts["prompt_id"], prompts["prompt"], strict=True))
    rows = shard.rows(range(len(samples)), _TEXTS_AT_ONCE)
    own = samples.iloc[rows]
    texts = [starts[name] + text for name, text in zip(own["prompt_id"], own["text"], strict=True)]
    rewards: list[float] = []
    with Progress("true_rewards", len(texts), "texts") as progress:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            values, names = reward(part), own["prompt_id"].iloc[start : start + len(part)]
            require_finite(values, names, "A sample's true reward", "look at these prompts and the classifier")
            rewards.extend(values.tolist())
            progress.update(len(part))
    usage.add(len(texts), 0)
    write_table(
        args.out,
        "scores",
        own[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards),
        samples=samples.attrs["manifest"]["content_hash"],
        reward_weights=weights_hash(args.true_reward_model) if args.true_reward_model else None,
        recipe=to_dict(recipe),
        used=usage.report(),
        **shard.manifest(rows),
    )
