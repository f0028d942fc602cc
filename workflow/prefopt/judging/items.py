"""The stage `judge_items`: a judge's verdicts on the pairs that people compare."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path

import pandas as pd

from prefopt.experiment.recipes import from_json, to_dict
from prefopt.judging.judge import Judge, OrderRule, Pair, judge_pairs
from prefopt.judging.judges import JudgeRecipe, add_judge_arguments, build_judge
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)


def judge_items(judge: Judge, items: pd.DataFrame, rule: OrderRule, seed: int) -> pd.DataFrame:
    """Judges each item: rows of an `item_verdicts` table.

    Args:
        judge: who judges.
        items: rows of a `study_items` table; its first text takes the place of the policy's.
        rule: whether a pair is shown in one random order, or in both.
        seed: of the random order.
    """
    pairs = [
        Pair(
            {name: item[name] for name in ("item_id", "matchup", "prompt_id")},
            (item["prompt_id"], item["matchup"], 0.0, 0),
            *(item["prompt"], item["facts"], item["first"], item["second"]),
        )
        for item in items.to_dict("records")
    ]
    return pd.DataFrame(judge_pairs(judge, pairs, rule, seed))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `judge_items`."""
    parser.add_argument("--items", required=True, type=Path, help="study_items table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    add_judge_arguments(parser)
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="item_verdicts table that is made")


def run(args: argparse.Namespace) -> None:
    """Judges all items of a study."""
    recipe = from_json(JudgeRecipe, args.recipe)
    items = read_table(args.items, "study_items")
    judge = build_judge(args, recipe, read_table(args.prompts, "prompts"))
    verdicts = judge_items(judge, items, recipe.order, recipe.seed)
    logger.info("%s judged %d items: %s", judge.name, len(items), dict(sorted(Counter(verdicts["outcome"]).items())))
    study = items.attrs["manifest"]["study"]
    write_table(args.out, "item_verdicts", verdicts, study=study, recipe=to_dict(recipe), **judge.report())
