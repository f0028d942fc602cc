"""The stage `prefixes`: the first tokens of each review as a prompt, the rest as the completion (section 6.1)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.prepare import encode_all
from prefopt.data.reviews import UNLABELLED
from prefopt.data.splits import position
from prefopt.errors import UserError
from prefopt.files import write_text
from prefopt.lm.models import decode, load_tokenizer, max_positions, tokenizer_hash
from prefopt.recipes import from_json, to_dict
from prefopt.tables import read_table, write_table

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixesRecipe:
    """Lengths in tokens; `max_length` is of prefix and completion together, EOS included."""

    min_prefix: int
    max_prefix: int
    max_length: int


def prefix_length(review_id: str, recipe: PrefixesRecipe) -> int:
    """How many tokens of a review are its prompt: uniform, and the same whatever else is prepared."""
    return recipe.min_prefix + int(position("prefix", review_id) * (recipe.max_prefix - recipe.min_prefix + 1))


def split_reviews(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[Any, Any]], recipe: PrefixesRecipe
) -> tuple[list[dict[str, Any]], Counter[str], int]:
    """Rows of the demonstrations table, each a labelled review.

    A long review is cut, and then has no EOS: its end is not where it was cut. The texts are the decoded tokens, so
    that prompt and response together are the review.

    Returns:
        The rows; how many reviews were dropped, "unlabelled" (they are to pretrain on) or "too_short" (nothing is
        left after the prefix); how many of the kept ones were cut.
    """
    dropped: Counter[str] = Counter()
    labelled = [row for row in rows if row["label"] != UNLABELLED]
    dropped["unlabelled"] = len(rows) - len(labelled)
    kept, cut = [], 0
    for row, ids in zip(labelled, encode_all(tokenizer, [row["text"] for row in labelled]), strict=True):
        length = prefix_length(row["review_id"], recipe)
        if len(ids) <= length:
            dropped["too_short"] += 1
            continue
        whole = [*ids, tokenizer.eos_token_id]
        cut += len(whole) > recipe.max_length
        response = whole[length : recipe.max_length]
        kept.append(
            {
                "prompt_id": row["review_id"],
                "prompt": decode(tokenizer, ids[:length]),
                "response": decode(tokenizer, response),
                "split": row["split"],
                "facts": "",
                "prompt_ids": ids[:length],
                "response_ids": response,
            }
        )
    return kept, +dropped, cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `prefixes`."""
    parser.add_argument("--reviews", required=True, type=Path, help="raw_reviews table")
    parser.add_argument("--model", required=True, type=Path, help="base model, whose tokenizer is used")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--demonstrations", required=True, type=Path, help="demonstrations table that is made")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table that is made")
    parser.add_argument("--summary", required=True, type=Path, help="JSON file of what became of every review")


def run(args: argparse.Namespace) -> None:
    """Writes both tables and the summary."""
    recipe = from_json(PrefixesRecipe, args.recipe)
    positions = max_positions(args.model)
    if positions is not None and recipe.max_length > positions:
        raise UserError(
            f"max_length is {recipe.max_length}, but the model in {args.model} has {positions} positions: "
            f"lower lengths.max_length or take another model."
        )
    tokenizer = load_tokenizer(args.model)
    reviews = read_table(args.reviews, "raw_reviews")
    rows, dropped, cut = split_reviews(tokenizer, reviews.to_dict("records"), recipe)
    summary = {
        "read": len(reviews),
        "kept": len(rows),
        "dropped": dict(sorted(dropped.items())),
        "splits": dict(sorted(Counter(row["split"] for row in rows).items())),
        "responses_cut": cut,
    }
    if summary["read"] != len(rows) + dropped.total():
        raise AssertionError(f"the account of the reviews does not add up: {summary}")
    shared = ("prompt_id", "prompt", "split", "facts", "prompt_ids")
    prompts = [{**{name: row[name] for name in shared}, "reference": row["response"]} for row in rows]
    provenance = {
        "tokenizer_hash": tokenizer_hash(args.model),
        "recipe": to_dict(recipe),
        "reviews": reviews.attrs["manifest"]["content_hash"],
        "summary": summary,
    }
    write_table(args.demonstrations, "demonstrations", rows, **provenance)
    write_table(args.prompts, "prompts", prompts, **provenance)
    account = {"raw": reviews.attrs["manifest"]["account"], "reviews": summary}
    write_text(args.summary, json.dumps(account, indent=2, sort_keys=True) + "\n")
    logger.info("prefixes: %d reviews, %d kept, %d of them cut", len(reviews), len(rows), cut)
