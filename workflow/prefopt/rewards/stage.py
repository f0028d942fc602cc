"""The stage `true_rewards`: the reward of every sample that no policy has learned from."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from prefopt.data.synthetic.hidden import quality_score
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.batching import Row
from prefopt.lm.models import load_scorer, tokenizer_hash
from prefopt.rewards.learned import score_rows
from prefopt.rewards.true_reward import load_true_reward, reward_hash
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import read_table, write_table

# Texts of a block, between two progress lines; a shard of the work holds whole blocks.
_TEXTS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrueRewardsRecipe:
    """What the true reward is.

    Of reviews a rule, n-grams or a classifier, see `load_true_reward`; of embedded posts and dialogues the hidden quality
    that their oracle knows; of other pairs the gold reward model, which has learned from pairs that nothing else sees.
    """

    kind: Literal["rule", "ngrams", "classifier", "oracle", "gold_reward_model"]
    max_length: int  # of a classifier
    batch_size: int
    token_budget: int  # of a reward model


# Rows of a samples table -> float32 [rows].
SampleReward = Callable[[pd.DataFrame], Tensor]


def sample_reward(
    recipe: TrueRewardsRecipe, prompts: pd.DataFrame, folder: Path | None, device: torch.device
) -> SampleReward:
    """The true reward of samples.

    Args:
        recipe: which it is.
        prompts: rows of the prompts table.
        folder: of the classifier or the gold reward model.
        device: where it runs.

    Raises:
        UserError: there is no model in the folder, or a prompt has no hidden facts.
    """
    by_id = prompts.set_index("prompt_id")
    if recipe.kind == "oracle":
        facts = by_id["facts"].to_dict()
        return lambda rows: torch.tensor(
            [quality_score(facts[name], name, text) for name, text in zip(rows["prompt_id"], rows["text"], strict=True)]
        )
    if recipe.kind == "gold_reward_model":
        if folder is None:
            raise UserError("The true reward is a gold reward model; give its folder by --true-reward-model.")
        return scored_by(folder, prompts, recipe.token_budget, device)
    starts = by_id["prompt"].to_dict()
    reward = load_true_reward(
        kind=recipe.kind, folder=folder, max_length=recipe.max_length, batch_size=recipe.batch_size, device=device
    )
    return lambda rows: reward(
        [starts[name] + text for name, text in zip(rows["prompt_id"], rows["text"], strict=True)]
    )


def scored_by(folder: Path, prompts: pd.DataFrame, token_budget: int, device: torch.device) -> SampleReward:
    """The reward that a reward model gives to samples, in float32.

    Args:
        folder: of the reward model.
        prompts: rows of the prompts table.
        token_budget: tokens per micro-batch.
        device: where it runs.
    """
    ids = prompts.set_index("prompt_id")["prompt_ids"].map(lambda ids: tuple(ids.tolist())).to_dict()
    model = load_scorer(folder, device=device)

    def scores(rows: pd.DataFrame) -> Tensor:
        named = zip(rows["prompt_id"], rows["token_ids"], strict=True)
        read = [Row(ids[name], (tuple(completion.tolist()),)) for name, completion in named]
        return score_rows(model, read, token_budget).flatten()

    return scores


def _tokenized_by(recipe: TrueRewardsRecipe, folder: Path | None) -> dict[str, str]:
    """What prompts must have in their manifest whose token ids a reward model reads."""
    return {"tokenizer_hash": tokenizer_hash(folder)} if recipe.kind == "gold_reward_model" and folder else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `true_rewards`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--true-reward-model", type=Path, help="model that is the true reward, unless a program is")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the scores table, or a shard of it."""
    recipe, shard = from_json(TrueRewardsRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts", **_tokenized_by(recipe, args.true_reward_model))
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    usage = Usage("true_rewards", default_device(), "float32")
    reward = sample_reward(recipe, prompts, args.true_reward_model, default_device())
    rows = shard.rows(range(len(samples)), _TEXTS_AT_ONCE)
    own = samples.iloc[rows]
    rewards: list[float] = []
    with Progress("true_rewards", len(own), "texts") as progress:
        for start in range(0, len(own), _TEXTS_AT_ONCE):
            part = own.iloc[start : start + _TEXTS_AT_ONCE]
            values = reward(part)
            require_finite(values, part["prompt_id"], "A sample's true reward", "look at these prompts and the model")
            rewards.extend(values.tolist())
            progress.update(len(part))
    usage.add(len(own), 0)
    write_table(
        args.out,
        "scores",
        own[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards),
        samples=samples.attrs["manifest"]["content_hash"],
        reward_weights=reward_hash(args.true_reward_model),
        recipe=to_dict(recipe),
        used=usage.report(),
        **shard.manifest(rows),
    )
