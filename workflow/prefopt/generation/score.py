"""The learned reward of every sample."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.batching import Row
from prefopt.lm.models import load_scorer, tokenizer_hash, weights_hash
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.rewards.learned import score_rows
from prefopt.runtime.progress import Progress
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import read_table, write_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRecipe:
    """How samples are scored."""

    token_budget: int
    dtype: Literal["float32", "bfloat16"]


def score_samples(
    model: torch.nn.Module, prompts: pd.DataFrame, samples: pd.DataFrame, recipe: ScoreRecipe, usage: Usage
) -> pd.DataFrame:
    """Rewards of all samples; a prompt is read once for all its samples at a temperature.

    Returns:
        Rows of the scores table, in the samples' order.

    Raises:
        UserError: a reward is not finite: names the prompts.
    """
    rewards = read_in_rows(
        *("score", model, prompts, samples, recipe.token_budget, usage),
        lambda row: score_rows(model, [row], recipe.token_budget, recipe.dtype),
    )
    require_finite(rewards, samples["prompt_id"], "A sample's reward", "look at these prompts and at the reward model")
    return samples[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards)


def read_in_rows(
    name: str,
    model: torch.nn.Module,
    prompts: pd.DataFrame,
    samples: pd.DataFrame,
    token_budget: int,
    usage: Usage,
    read: Callable[[Row], Tensor],
) -> pd.Series:
    """A number of each sample, in the samples' order; a prompt is read once for all its samples at a temperature.

    Args:
        name: of what is done, in progress lines.
        model: what reads, for the operations.
        prompts: rows of the prompts table.
        samples: rows of the samples table.
        token_budget: tokens of a row at most, unless it has one completion.
        usage: counts what is read.
        read: a number for each completion of a row.
    """
    prompt_ids = dict(zip(prompts["prompt_id"], prompts["prompt_ids"], strict=True))
    numbers = pd.Series(0.0, index=samples.index)
    shape = shape_of(model)
    with Progress(name, len(samples), "samples") as progress:
        for (prompt_id, _), group in samples.groupby(["prompt_id", "temperature"], sort=False):
            completions = [tuple(ids.tolist()) for ids in group["token_ids"]]
            # A long row is cut so that one row stays within the budget of a micro-batch.
            prompt = tuple(prompt_ids[prompt_id].tolist())
            for start, stop in _pieces(len(prompt), [len(c) for c in completions], token_budget):
                row = Row(prompt, tuple(completions[start:stop]))
                numbers.loc[group.index[start:stop]] = read(row).flatten().double().cpu().numpy()
                usage.add(stop - start, row.tokens, flops=rows_flops(shape, [row]))
            progress.update(len(group))
    return numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `score`."""
    parser.add_argument("--model", required=True, type=Path, help="the reward model")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--samples", required=True, type=Path, help="samples table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Scores every sample and writes the scores table, or a shard of it."""
    recipe, shard = from_json(ScoreRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    usage = Usage("score", default_device(), recipe.dtype)
    model = load_scorer(args.model, device=default_device())
    # A group is scored by itself, so that it does not matter with which others.
    rows = shard.rows(list(zip(samples["prompt_id"], samples["temperature"], strict=True)))
    scores = score_samples(model, prompts, samples.iloc[rows], recipe, usage)
    write_table(
        args.out,
        "scores",
        scores,
        samples=samples.attrs["manifest"]["content_hash"],
        reward_weights=weights_hash(args.model),
        recipe=to_dict(recipe),
        used=usage.report(),
        shape=dataclasses.asdict(shape_of(model)),
        **shard.manifest(rows),
    )


def _pieces(prompt: int, completions: list[int], token_budget: int) -> list[tuple[int, int]]:
    """Ranges of completions that fit the budget together with their prompt, at least one in each."""
    pieces, start, tokens = [], 0, prompt
    for i, length in enumerate(completions):
        if i > start and tokens + length > token_budget:
            pieces.append((start, i))
            start, tokens = i, prompt
        tokens += length
    return [*pieces, (start, len(completions))]
