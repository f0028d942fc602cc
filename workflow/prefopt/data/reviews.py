"""The stage `reviews`: film reviews with their labels, embedded, from files or from a hub, to a raw table."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

from prefopt.data.formats.reviews import UNLABELLED, raw_reviews
from prefopt.data.raw.hub import hub_rows
from prefopt.data.raw.limits import Limits
from prefopt.data.raw.parsing import Account
from prefopt.data.raw.sources import describe_files, read_rows
from prefopt.data.synthetic.reviews import generate
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.tables import write_table

logger = logging.getLogger(__name__)

TABLES = ("reviews", "training/reviews", "pretraining")
_FIELDS = ("text", "label")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviewsRecipe:
    """Where the reviews come from and how they are split; a source reads its own keys alone."""

    source: Literal["embedded", "files", "hub"]
    reviews: tuple[str, ...]
    hub: dict[str, Any]  # name, revision
    splits: dict[str, float]  # share of the labelled reviews: train, validation, test
    max_malformed: int  # malformed records that are dropped and counted before one stops the stage
    max_record_mb: int  # MiB of a record, and of all records of one kind, that are read at most
    max_total_mb: int
    embedded: dict[str, int]  # seed, train, validation, test, unlabelled


def read_reviews(recipe: ReviewsRecipe) -> tuple[list[dict[str, Any]], Account, list[dict[str, Any]]]:
    """The rows of the recipe's source, their account, and what they were read from (for a manifest).

    Raises:
        UserError: records are missing, unreachable, larger than the limits, or malformed beyond `max_malformed`.
    """
    if recipe.source == "embedded":
        rows = generate(recipe.embedded)
        return rows, Account(read=len(rows), kept=len(rows)), []
    allowed = Limits(recipe.max_record_mb, recipe.max_total_mb)
    if recipe.source == "files":
        inputs: list[dict[str, Any]] = [{"kind": "reviews", **entry} for entry in describe_files(recipe.reviews)]
        records = read_rows(recipe.reviews, _FIELDS, allowed)
    else:
        name, revision = recipe.hub["name"], recipe.hub["revision"]
        if name is None:
            raise UserError("hub.name is null: with the source 'hub' it must name a data set.")
        inputs = [{"kind": "reviews", "name": name, "revision": revision, "pinned": revision is not None}]
        records = hub_rows(name, "reviews", revision, _FIELDS, allowed)
    return *raw_reviews(records, recipe.splits, recipe.max_malformed), inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `reviews`."""
    parser.add_argument("--table", required=True, choices=TABLES, help="which of the raw tables is made")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="raw table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes all reviews, those that are not of the test split, or the texts of the training split, labelled or not."""
    recipe = from_json(ReviewsRecipe, args.recipe)
    rows, account, inputs = read_reviews(recipe)
    for split in ("train", "validation", "test") if args.table == "reviews" else ():
        if not any(row["split"] == split and row["label"] != UNLABELLED for row in rows):
            raise UserError(f"No labelled review is in the split {split!r}: give more reviews or change data.splits.")
    provenance = {"recipe": to_dict(recipe), "inputs": inputs}
    if args.table == "pretraining":
        texts = [{"text": row["text"]} for row in rows if row["split"] == "train"]
        write_table(args.out, "pretraining", texts, **provenance)
        return
    if args.table == "training/reviews":
        trained = [row for row in rows if row["split"] != "test"]
        account.dropped["test_split"] += len(rows) - len(trained)
        account.kept, rows = len(trained), trained
    write_table(args.out, "raw_reviews", rows, account=account.as_dict(), **provenance)
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(account.dropped.items()))
    logger.info("%s: %d read, %d kept; dropped: %s", args.table, account.read, account.kept, dropped or "none")
