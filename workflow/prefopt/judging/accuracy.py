"""The stage `judge_accuracy`: how often a gold reward model agrees with people, on comparisons that it was not trained on."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from prefopt.analysis.statistics import score_interval
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.models import load_scorer, tokenizer_hash, weights_hash
from prefopt.rewards.learned import score_rows
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, write_table
from prefopt.training.reference import preference_rows

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyRecipe:
    """How the pairs are read, and the confidence of the interval."""

    token_budget: int  # per micro-batch
    confidence: float


def held_out_scores(model: nn.Module, pairs: pd.DataFrame, token_budget: int, usage: Usage) -> pd.DataFrame:
    """The scores of both texts of each pair.

    Args:
        model: a sequence-classification model with one label.
        pairs: rows of a preferences table, which the model was not trained on.
        token_budget: tokens per micro-batch.
        usage: counts what is scored.

    Returns:
        Rows of a held_out_scores table, in the order of `pairs`.
    """
    rows = preference_rows(pairs)
    scores = score_rows(model, rows, token_budget).double().numpy()
    require_finite(scores, pairs["prompt_id"], "The judge's score of a held-out comparison", "look at its gold model")
    usage.add(2 * len(rows), sum(row.tokens for row in rows))
    found = pairs[["pair_id", "prompt_id"]].reset_index(drop=True)
    for i, side in enumerate(("chosen", "rejected")):
        found[f"{side}_score"] = scores[:, i]
        found[f"{side}_tokens"] = np.array([len(row.completions[i]) for row in rows], dtype=np.int32)
    return found


def agreement_with_people(scores: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """How often the model's score is higher for the text that was chosen.

    Args:
        scores: rows of a held_out_scores table.
        confidence: of the interval, which is over prompts (see `score_interval`).

    Returns:
        `judge_accuracy` with `judge_accuracy_low` and `_high`, `longer_wins_accuracy` (by tokens; ties count
        half), `n_held_out`, `interpretable`: whether it is surely better than a coin, and than that on the same pairs, and
        `n_needed`: how many held-out pairs would show both of a judge that is better by as much; None where it is not.
    """
    agrees, longer = (
        0.5 * (1 + np.sign(scores[f"chosen_{what}"] - scores[f"rejected_{what}"])) for what in ("score", "tokens")
    )
    prompts = scores["prompt_id"].tolist()
    interval = score_interval(agrees.tolist(), prompts, confidence)
    better = (1 + agrees - longer) / 2  # above one half where the judge is right more often
    surely = score_interval(better.tolist(), prompts, confidence)
    margins = [(agrees.mean(), interval.low), (better.mean(), surely.low)]
    needed = max(((mean - low) / (mean - 0.5)) ** 2 if mean > 0.5 else math.inf for mean, low in margins)
    return {
        "judge_accuracy": float(agrees.mean()),
        "judge_accuracy_low": interval.low,
        "judge_accuracy_high": interval.high,
        "longer_wins_accuracy": float(longer.mean()),
        "n_held_out": len(scores),
        "interpretable": min(interval.low, surely.low) > 0.5,
        "n_needed": None if math.isinf(needed) else math.ceil(needed * len(scores)),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `judge_accuracy`."""
    parser.add_argument("--gold-model", required=True, type=Path, help="the judge's model")
    parser.add_argument(
        "--gold-data", required=True, type=Path, help="gold preferences table; its split test is held out"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="held_out_scores table that is made")


def run(args: argparse.Namespace) -> None:
    """Scores the held-out comparisons and says how often the model agrees with them.

    Raises:
        UserError: the table was made with another tokenizer, or holds nothing out.
    """
    recipe = from_json(AccuracyRecipe, args.recipe)
    table = read_table(args.gold_data, "preferences", tokenizer_hash=tokenizer_hash(args.gold_model))
    pairs = table[table["split"] == "test"]
    if pairs.empty:
        raise UserError(
            f"{args.gold_data} has no comparison in the split 'test', so that the judge's accuracy is unknown: "
            f"raise the task's data.gold_fraction or give more comparisons."
        )
    usage = Usage("judge_accuracy", default_device(), "float32")
    scores = held_out_scores(load_scorer(args.gold_model, device=default_device()), pairs, recipe.token_budget, usage)
    facts = agreement_with_people(scores, recipe.confidence)
    logger.info(
        'the judge agrees with %.1f%% [%.1f, %.1f] of %d held-out comparisons, "the longer one wins" with %.1f%%',
        *(100 * facts[key] for key in ("judge_accuracy", "judge_accuracy_low", "judge_accuracy_high")),
        facts["n_held_out"],
        100 * facts["longer_wins_accuracy"],
    )
    write_table(
        args.out,
        "held_out_scores",
        scores,
        weights_hash=weights_hash(args.gold_model),
        style=table.attrs["manifest"].get("style", "plain"),
        accuracy=facts,
        recipe=to_dict(recipe),
        used=usage.report(),
    )
