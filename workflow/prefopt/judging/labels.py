"""The stage `judge_labels`: the reward of a policy's own completions, by a judge who sees every two of a prompt."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.verdicts import SCORE
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.judging.judge import PROMPTS_AT_ONCE, Judge, OrderRule, Pair, judge_pairs
from prefopt.judging.judges import JudgeRecipe, add_judge_arguments, build_judge
from prefopt.store.shards import add_shard_argument, parse_shard
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)

# What a completion gets of a comparison; a reply that names no winner says as little as a tie.
_WORTH = SCORE | {"invalid": SCORE["tie"]}


def shares_won(
    judge: Judge, samples: pd.DataFrame, prompts: pd.DataFrame, rule: OrderRule, seed: int
) -> tuple[list[float], list[dict[str, Any]]]:
    """The share of a completion's comparisons with the others of its prompt that it wins, a tie being half of one.

    With two completions a prompt this is the label of online DPO with a judge (Guo et al. 2024, "Direct Language Model
    Alignment from Online AI Feedback").

    Args:
        judge: who compares.
        samples: rows of a samples table, of one run and temperature, several of each prompt.
        prompts: rows of the prompts table, each sample's prompt among them.
        rule: whether two completions are shown in one random order, or in both.
        seed: of the random order.

    Returns:
        A share in [0, 1] for each row of `samples`, and the verdicts' rows. Equal completions tie and are not shown.
    """
    by_id = {prompt["prompt_id"]: prompt for prompt in prompts.to_dict("records")}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for place, prompt_id in enumerate(samples["prompt_id"]):
        groups[prompt_id].append(place)
    rows = samples[["run", "temperature", "sample_index", "text"]].to_dict("records")
    worth: defaultdict[int, list[float]] = defaultdict(list)
    pairs = []
    tie = [_WORTH["tie"]] * (2 if rule == "both" else 1)  # as many as there are verdicts on a pair that is shown
    for prompt_id, places in groups.items():
        prompt = by_id[prompt_id]
        for a, b in itertools.combinations(places, 2):
            if rows[a]["text"] == rows[b]["text"]:
                worth[a] += tie
                worth[b] += tie
                continue
            number = rows[a]["sample_index"] * len(places) + rows[b]["sample_index"]
            key = (prompt_id, rows[a]["run"], rows[a]["temperature"], number)
            shown = (prompt["prompt"], prompt["facts"], rows[a]["text"], rows[b]["text"])
            pairs.append(Pair({"first_place": a, "second_place": b}, key, *shown))
    verdicts = judge_pairs(judge, pairs, rule, seed)
    for verdict in verdicts:
        won = _WORTH[verdict["outcome"]]
        worth[verdict["first_place"]].append(won)
        worth[verdict["second_place"]].append(1 - won)
    return [sum(worth[place]) / len(worth[place]) if worth[place] else 0.5 for place in range(len(rows))], verdicts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `judge_labels`."""
    parser.add_argument("--samples", required=True, type=Path, help="samples table, several completions a prompt")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    add_judge_arguments(parser)
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    add_shard_argument(parser)
    parser.add_argument("--out", required=True, type=Path, help="scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the scores table, or a shard of it."""
    recipe, shard = from_json(JudgeRecipe, args.recipe), parse_shard(args.shard)
    prompts = read_table(args.prompts, "prompts")
    samples = read_table(args.samples, "samples", prompts=prompts.attrs["manifest"]["content_hash"])
    # All completions of a prompt are in one shard, since they are compared with each other.
    rows = shard.rows(samples["prompt_id"].tolist(), PROMPTS_AT_ONCE)
    own = samples.iloc[rows]
    judge = build_judge(args, recipe, prompts)
    rewards, verdicts = shares_won(judge, own, prompts, recipe.order, recipe.seed)
    outcomes = Counter(verdict["outcome"] for verdict in verdicts)
    logger.info("%s compared %d pairs of completions: %s", judge.name, len(verdicts), dict(sorted(outcomes.items())))
    if outcomes["invalid"]:
        logger.warning("warning: %d replies name no winner; their pairs count as ties.", outcomes["invalid"])
    write_table(
        args.out,
        "scores",
        own[["prompt_id", "temperature", "sample_index"]].assign(reward=rewards),
        samples=samples.attrs["manifest"]["content_hash"],
        judge=judge.name,
        recipe=to_dict(recipe),
        **judge.report(),
        **shard.manifest(rows),
    )
