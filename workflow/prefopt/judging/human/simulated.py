"""The stage `simulated_votes`: raters whom a program plays, with noise and a bias for length, over an exact judge.

They show that the study's machinery counts right, and nothing about people.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.data.synthetic.hidden import quality_score
from prefopt.experiment.recipes import from_json
from prefopt.judging.human.study import read_key
from prefopt.store.files import atomic_directory, stable_hash
from prefopt.store.tables import read_table

_NOISE_SPREAD = 0.3  # of the logarithm of raters' noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRecipe:
    """What the raters are like."""

    noise: float  # scale of the logistic error, in units of the hidden quality
    length_bias: float  # quality that ten more words are worth
    indifference: float  # differences below this are called a tie
    careless: float  # share of raters who answer at random
    seed: int


def simulated_answer(
    rng: random.Random, left: float, right: float, words: int, rater: dict[str, float], recipe: SimulatedRecipe
) -> str:
    """left, right or tie.

    Args:
        rng: draws the error.
        left: hidden quality of the left text.
        right: of the right text.
        words: words of the left text less those of the right.
        rater: noise and length_bias of this rater.
        recipe: the rest.
    """
    uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)
    error = rater["noise"] * math.log(uniform / (1 - uniform))
    felt = left - right + rater["length_bias"] * words / 10 + error
    if abs(felt) < recipe.indifference:
        return "tie"
    return "left" if felt > 0 else "right"


def simulate(key: dict[str, Any], items: pd.DataFrame, recipe: SimulatedRecipe) -> dict[str, dict[str, Any]]:
    """The export of each rater, as the page would write it.

    Args:
        key: what `human_study` wrote.
        items: its items, with the hidden facts.
        recipe: what the raters are like.

    Raises:
        UserError: an item has no hidden facts.
    """
    quality: dict[str, tuple[float, float]] = {}
    longer: dict[str, int] = {}
    for row in items.to_dict("records"):
        texts = (row["first"], row["second"])
        first, second = (quality_score(row["facts"], row["prompt_id"], text) for text in texts)
        quality[row["item_id"]] = (first, second)
        longer[row["item_id"]] = len(texts[0].split()) - len(texts[1].split())
    exports = {}
    for rater, rows in key["raters"].items():
        rng = random.Random(stable_hash([recipe.seed, rater]))
        own = {
            "noise": recipe.noise * math.exp(rng.gauss(0.0, _NOISE_SPREAD)),
            "length_bias": recipe.length_bias * rng.uniform(0.0, 2.0),
        }
        careless = rng.random() < recipe.careless
        votes = []
        for row in rows:
            if careless:
                answer = rng.choice(["left", "right"])
            elif row["kind"] == "check":
                answer = "right" if row["swapped"] else "left"
            else:
                first, second = quality[row["item_id"]]
                words = longer[row["item_id"]]
                seen = (second, first, -words) if row["swapped"] else (first, second, words)
                answer = simulated_answer(rng, *seen, own, recipe)
            votes.append({"id": row["id"], "vote": answer, "seconds": round(2.0 + rng.lognormvariate(2.5, 0.5), 2)})
        exports[rater] = {
            **{"schema": key["schema"], "study": key["study"], "rater": rater, "complete": True},
            **{"votes": votes, "simulated": True},
        }
    return exports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `simulated_votes`."""
    parser.add_argument("--key", required=True, type=Path, help="the study's key")
    parser.add_argument("--items", required=True, type=Path, help="the study's items")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="folder of exported files that is made")


def run(args: argparse.Namespace) -> None:
    """Writes a file a rater."""
    recipe = from_json(SimulatedRecipe, args.recipe)
    key = read_key(args.key)
    items = read_table(args.items, "study_items", study=key["study"])
    with atomic_directory(args.out) as folder:
        for rater, export in simulate(key, items, recipe).items():
            (folder / f"{key['task']}-{rater}.json").write_text(json.dumps(export, indent=1), encoding="utf-8")
