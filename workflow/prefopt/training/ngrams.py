"""The true reward of real reviews without a model that reads: logistic regression on n-grams, and how far it can be trusted."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from prefopt.data.formats.reviews import UNLABELLED
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.lm.models import load_tokenizer, tokenizer_hash
from prefopt.rewards.ngrams import vectorizer
from prefopt.store.files import write_text
from prefopt.store.tables import read_table, split_of, write_table
from prefopt.training.classifier import calibration

logger = logging.getLogger(__name__)

# Of 1, 5 and 20 the best on held-out reviews and excerpts of IMDb; n-grams that fewer reviews have are left out.
_INVERSE_PENALTY = 5.0
_FEWEST_TEXTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramsRecipe:
    """What is learned from."""

    max_length: int  # tokens of an excerpt, as many as prompt and completion have at most


def whole_and_excerpts(reviews: pd.DataFrame, model: Path, max_length: int) -> tuple[list[str], list[str]]:
    """The texts of reviews, and as many of the base's first tokens of each as a policy writes."""
    tokenizer, texts = load_tokenizer(model), reviews["text"].tolist()
    ids = tokenizer(texts, truncation=True, max_length=max_length, add_special_tokens=False)["input_ids"]
    return texts, tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `ngrams`."""
    parser.add_argument("--model", required=True, type=Path, help="base model, by whose tokens excerpts are cut")
    parser.add_argument("--reviews", required=True, type=Path, help="raw_reviews table")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--table", required=True, type=Path, help="CSV file of accuracy and calibration that is made")
    parser.add_argument("--out", required=True, type=Path, help="ngrams table that is made")


def run(args: argparse.Namespace) -> None:
    """Fits the regression to reviews and to their excerpts, measures it on the test reviews, and writes both tables."""
    recipe = from_json(NgramsRecipe, args.recipe)
    table = read_table(args.reviews, "raw_reviews")
    reviews = table[table["label"] != UNLABELLED]
    training, test = (split_of(reviews, split, args.reviews) for split in ("train", "test"))
    if training["label"].nunique() < 2:
        raise UserError(f"{args.reviews}: all reviews to train on have one label: give positive and negative ones.")
    features = vectorizer(min_df=min(_FEWEST_TEXTS, len(training)))
    whole, excerpts = whole_and_excerpts(training, args.model, recipe.max_length)
    try:
        counted = features.fit_transform([*whole, *excerpts])
    except ValueError as error:
        raise UserError(f"{args.reviews}: no word stands in {_FEWEST_TEXTS} texts: give more reviews.") from error
    fitted = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit(counted, [*training["label"]] * 2)
    intercept, weights = float(fitted.intercept_[0]), fitted.coef_[0]
    rows, held_out = [], {}
    for name, texts in zip(
        ("reviews", "excerpts"), whole_and_excerpts(test, args.model, recipe.max_length), strict=True
    ):
        probabilities = expit(features.transform(texts) @ weights + intercept)
        measured = calibration(probabilities, test["label"].to_numpy(), name)
        rows += measured
        held_out[name] = {key: measured[0][key] for key in ("n", "accuracy", "brier")}
    write_text(args.table, pd.DataFrame(rows).to_csv(index=False))
    names = features.get_feature_names_out()
    write_table(
        args.out,
        "ngrams",
        pd.DataFrame({"ngram": names, "idf": features.idf_, "weight": weights}),
        intercept=intercept,
        reviews=table.attrs["manifest"]["content_hash"],
        tokenizer_hash=tokenizer_hash(args.model),
        recipe=to_dict(recipe),
        held_out=held_out,
    )
    logger.info("ngrams: %d of them, on held-out texts %s", len(names), held_out)
