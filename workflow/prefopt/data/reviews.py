"""The stage `reviews`: film reviews with their labels, embedded, from files or from a hub, to a raw table."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from prefopt.data import review_world
from prefopt.data.limits import Limits
from prefopt.data.raw import Account, Parser, Unusable
from prefopt.data.sources import Malformed, Records, describe_files, hub_rows, read_rows, text_of
from prefopt.data.splits import PostKeys, check_shares, is_blank, split_of
from prefopt.errors import UserError
from prefopt.recipes import from_json, to_dict
from prefopt.tables import write_table

logger = logging.getLogger(__name__)

TABLES = ("reviews", "training/reviews", "pretraining")
UNLABELLED = -1
_LABELS = {"pos": 1, "positive": 1, "1": 1, "neg": 0, "negative": 0, "0": 0, "": UNLABELLED, "-1": UNLABELLED}
_FIELDS = ("text", "label")
_LINE_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


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


@dataclasses.dataclass(frozen=True)
class Review:
    """A review's text; the label is 1 (positive), 0 (negative) or -1 (none)."""

    text: str
    label: int


def generate(values: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rows of raw_reviews drawn from the synthetic writer, each with its own random stream; no text stands twice.

    What is trained on comes first, so that it does not depend on the number of test reviews.
    """
    rows, seen = [], set()
    for split in ("train", "unlabelled", "validation", "test"):
        for i in range(values[split]):
            rng = random.Random(f"{values['seed']}/review-{split}/{i}")
            text = review_world.write_review(rng)
            while text in seen:
                text = review_world.write_review(rng)
            seen.add(text)
            label = UNLABELLED if split == "unlabelled" else review_world.label(text)
            name = "train" if split == "unlabelled" else split
            rows.append({"review_id": f"{split}-{i:05d}", "text": text, "label": label, "split": name})
    return rows


def parse_review(row: Mapping[str, Any]) -> Review:
    """A record with `text` and `label`; a label that is empty or missing is none.

    Raises:
        Malformed: the text is no text, or the label is no label.
        Unusable: "empty_text".
    """
    text, given = text_of(row, "text"), row.get("label")
    label = UNLABELLED if given is None else _LABELS.get(str(given).strip().lower())
    if label is None:
        raise Malformed(f"'label' is {reprlib.repr(given)}, which is neither 1, 0, pos, neg nor -1")
    # Stripped part by part: a pattern with the white space before a break takes for ever on a text of blanks.
    text = "\n".join(part.strip() for part in _LINE_BREAK.split(text)).strip()
    if is_blank(text):
        raise Unusable("empty_text")
    return Review(text, label)


def raw_reviews(
    records: Records, splits: Mapping[str, float], max_malformed: int
) -> tuple[list[dict[str, Any]], Account]:
    """Rows of raw_reviews: each text once, labelled ones first, split by a hash of the text.

    Unlabelled reviews are all of the training split: nothing is evaluated on them.

    Args:
        records: see `data.sources`.
        splits: share of the labelled reviews of train, validation and test.
        max_malformed: how many malformed records are dropped and counted.

    Returns:
        The rows, and the account: dropped are "malformed", "empty_text" and "duplicate_text".

    Raises:
        UserError: more than `max_malformed` records are malformed; names the file and line of the last.
    """
    check_shares(splits)
    account = Account()
    reviews = list(Parser(max_malformed)(records, parse_review, account))
    keys = PostKeys.of(review.text for review in reviews)
    rows: dict[str, dict[str, Any]] = {}
    # An unlabelled copy of a labelled review gives way to it.
    for review in sorted(reviews, key=lambda review: review.label == UNLABELLED):
        name = keys.key(review.text)
        if name in rows:
            account.drop("duplicate_text")
        else:
            account.keep()
            split = "train" if review.label == UNLABELLED else split_of(name, splits)
            rows[name] = {"review_id": name, "text": review.text, "label": review.label, "split": split}
    return list(rows.values()), account


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
