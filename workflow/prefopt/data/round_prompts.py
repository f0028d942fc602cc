"""The stage `round_prompts`: the prompts of one round of a run that is trained in rounds."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import numpy as np
import pandas as pd

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundPromptsRecipe:
    """How many prompts a round has, and which round it is."""

    prompts: int  # of the training split
    validation_prompts: int  # the first, the same in every round, so that rounds can be compared
    round: int  # from 1
    seed: int


def round_prompts(table: pd.DataFrame, recipe: RoundPromptsRecipe) -> pd.DataFrame:
    """The prompts of a round: pieces of a seeded permutation of the training split, then of the next.

    No prompt comes twice in a round, nor in two rounds while the split has prompts enough for another round; those that
    are left over then wait for the next permutation. Which they are does not depend on how many rounds there are.

    Args:
        table: rows of the prompts table.
        recipe: see `RoundPromptsRecipe`.

    Returns:
        Rows of the table: training prompts, then those of validation.

    Raises:
        UserError: a split has fewer prompts than the recipe asks for.
    """
    training, validation = (table[table["split"] == split] for split in ("train", "validation"))
    for key, rows in (("prompts", training), ("validation_prompts", validation)):
        if getattr(recipe, key) > len(rows):
            raise UserError(
                f"{key} is {getattr(recipe, key)}, but a round has {len(rows)} of them to draw from: ask for fewer."
            )
    permutation, place = divmod(recipe.round - 1, len(training) // recipe.prompts)
    order = np.random.default_rng([recipe.seed, permutation]).permutation(len(training))
    chosen = training.iloc[order[place * recipe.prompts : (place + 1) * recipe.prompts]]
    return pd.concat([chosen, validation.head(recipe.validation_prompts)], ignore_index=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `round_prompts`."""
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table with a training split")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="prompts table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the prompts of one round."""
    recipe = from_json(RoundPromptsRecipe, args.recipe)
    table = read_table(args.prompts, "prompts")
    manifest = table.attrs["manifest"]
    chosen = round_prompts(table, recipe)
    write_table(
        args.out,
        "prompts",
        chosen,
        prompts=manifest["content_hash"],
        tokenizer_hash=manifest["tokenizer_hash"],
        style=manifest.get("style", "plain"),
        recipe=to_dict(recipe),
    )
    logger.info("round %d: %d training prompts", recipe.round, recipe.prompts)
