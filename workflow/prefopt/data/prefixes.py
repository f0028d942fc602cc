"""The stage `prefixes`: the first tokens of each review as a prompt, the rest as the completion (section 6.1)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.formats.reviews import UNLABELLED
from prefopt.data.losses import loss_warnings
from prefopt.data.prepare import encode_all
from prefopt.data.raw.splits import position
from prefopt.data.special_tokens import REASON, warn_of_template, with_special_tokens
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.continuations import decode_continuation
from prefopt.lm.models import beginning, decode, load_tokenizer, max_positions, tokenizer_hash
from prefopt.store.files import write_text
from prefopt.store.tables import read_table, write_table

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
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[Any, Any]],
    recipe: PrefixesRecipe,
    special: Collection[str] = (),
) -> tuple[list[dict[str, Any]], Counter[str], int]:
    """Rows of the demonstrations table, each a labelled review.

    A long review is cut, and then has no EOS: its end is not where it was cut. The texts are the decoded tokens, so
    that prompt and response together are the review. Where the tokenizer begins a text with BOS, the prompt begins with
    it, beside its own tokens.

    Returns:
        The rows; how many reviews were dropped, "unlabelled" (they are to pretrain on), "too_short" (nothing is left
        after the prefix) or "special_token_in_text" (those in `special`); how many of the kept ones were cut.
    """
    dropped: Counter[str] = Counter()
    labelled = [row for row in rows if row["label"] != UNLABELLED]
    dropped["unlabelled"] = len(rows) - len(labelled)
    kept, cut, start = [], 0, beginning(tokenizer)
    for row, ids in zip(labelled, encode_all(tokenizer, [row["text"] for row in labelled]), strict=True):
        length = prefix_length(row["review_id"], recipe)
        if row["review_id"] in special:
            dropped[REASON] += 1
            continue
        if len(ids) <= length:
            dropped["too_short"] += 1
            continue
        whole = [*ids, tokenizer.eos_token_id]
        room = recipe.max_length - len(start)
        cut += len(whole) > room
        response = whole[length:room]
        kept.append(
            {
                "prompt_id": row["review_id"],
                "prompt": decode(tokenizer, ids[:length]),
                "response": decode_continuation(tokenizer, ids[:length], response),
                "split": row["split"],
                "facts": "",
                "prompt_ids": [*start, *ids[:length]],
                "response_ids": response,
            }
        )
    return kept, +dropped, cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `prefixes`."""
    parser.add_argument("--task", required=True, help="its name, for messages")
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
    warn_of_template(tokenizer, args.model)
    labelled = reviews[reviews["label"] != UNLABELLED].to_dict("records")
    special = with_special_tokens(tokenizer, labelled, "review_id", ("text",), args.reviews)
    rows, dropped, cut = split_reviews(tokenizer, reviews.to_dict("records"), recipe, special)
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
    raw = reviews.attrs["manifest"]
    account = {"raw": raw["account"], "reviews": summary}
    warnings = list(loss_warnings(args.task, account))
    for warning in warnings:
        logger.warning("warning: %s", warning)
    facts = {"task": args.task, "synthetic": raw["recipe"]["source"] == "embedded", "warnings": warnings}
    write_text(args.summary, json.dumps({**account, **facts}, indent=2, sort_keys=True) + "\n")
    logger.info("prefixes: %d reviews, %d kept, %d of them cut", len(reviews), len(rows), cut)
