"""The stage `human_study`: blind pairwise comparisons for people, a page a rater, and the key that stays here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.files import atomic_directory, stable_hash, write_text
from prefopt.judging.human.page import rater_page
from prefopt.judging.templates import question
from prefopt.plan import REFERENCE
from prefopt.recipes import from_dict, from_json, to_dict
from prefopt.tables import read_table, write_table

logger = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Whose text: a method at a temperature, or the reference text of the prompt."""

    method: str
    temperature: float | None

    def __str__(self) -> str:
        return self.method if self.temperature is None else f"{self.method} T={self.temperature:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matchup:
    """Two sides, and how many prompts they are compared on by how many people each."""

    first: dict[str, Any]
    second: dict[str, Any]
    items: int
    raters_per_item: int

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both, as written in the config."""
        return from_dict(Side, self.first), from_dict(Side, self.second)

    @property
    def name(self) -> str:
        """E.g. "dpo T=0.25 vs ppo T=0"."""
        return " vs ".join(map(str, self.sides))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRecipe:
    """What is compared by how many."""

    task: str
    suffix: str  # last line of the task's prompts, which raters do not see
    title: str
    question: str
    shown: str  # what a prompt is, in words: "a post"
    prompt_heading: str
    matchups: tuple[dict[str, Any], ...]
    judgments_per_rater: int
    swapped_repeats: int  # per rater: an earlier comparison once more, sides exchanged
    attention_checks: int  # per rater: the reference against the reference of another prompt
    seed: int


def study_items(
    samples: pd.DataFrame, prompts: pd.DataFrame, recipe: StudyRecipe
) -> tuple[pd.DataFrame, dict[str, float]]:
    """The comparisons of all matchups.

    The prompts of a matchup are drawn from the test prompts; those for which both texts are the same are passed over,
    since there is nothing to compare.

    Returns:
        Rows of a `study_items` table, and for each matchup the share of test prompts with two equal texts.

    Raises:
        UserError: a side has no samples, or no prompt has two different texts.
    """
    equal: dict[str, float] = {}
    test = prompts[prompts["split"] == "test"].set_index("prompt_id")
    rows: list[dict[str, Any]] = []
    for matchup in _matchups(recipe):
        texts = [_texts(side, samples, test) for side in matchup.sides]
        rng = random.Random(stable_hash([recipe.seed, matchup.name]))
        shared = sorted(set(texts[0]) & set(texts[1]))
        rng.shuffle(shared)
        differing = [name for name in shared if texts[0][name].strip() != texts[1][name].strip()]
        equal[matchup.name] = 1 - len(differing) / len(shared)
        if not differing:
            raise UserError(
                f"The matchup {matchup.name!r} has the same two texts for each of {len(shared)} test prompts, so that "
                f"there is nothing to compare: leave it out."
            )
        if len(differing) < matchup.items:
            logger.warning(
                "%s: %d items are wanted, %d of %d test prompts have two different texts",
                *(matchup.name, matchup.items, len(differing), len(shared)),
            )
        for prompt_id in differing[: matchup.items]:
            row = {
                "matchup": matchup.name,
                "prompt_id": prompt_id,
                "prompt": test.at[prompt_id, "prompt"],
                "facts": test.at[prompt_id, "facts"],
                "first": texts[0][prompt_id],
                "second": texts[1][prompt_id],
                "raters": matchup.raters_per_item,
            }
            rows.append({"item_id": stable_hash([recipe.seed, *row.values()])[:16], **row})
    return pd.DataFrame(rows), equal


def assign(items: pd.DataFrame, prompts: pd.DataFrame, recipe: StudyRecipe) -> dict[str, list[dict[str, Any]]]:
    """What each rater is shown, in order.

    Every item goes to as many different raters as it wants, those with the fewest so far; sides are balanced for
    each rater and matchup; repeats come late and checks anywhere but first.

    Args:
        items: rows of a `study_items` table.
        prompts: the prompts table, whose references are the checks.
        recipe: numbers and seed.

    Returns:
        By rater: dicts with id (says nothing), item_id ("" for a check), kind (item, repeat or check), prompt,
        left, right and swapped (whether the item's first text is on the right; for a check, the reference).
    """
    total = int(items["raters"].sum())
    raters = [f"r{i + 1:02d}" for i in range(max(math.ceil(total / recipe.judgments_per_rater), items["raters"].max()))]
    rng = random.Random(stable_hash([recipe.seed, "assignment"]))
    given: dict[str, list[dict[str, Any]]] = {rater: [] for rater in raters}
    load: Counter[tuple[str, str]] = Counter()
    rows: list[dict[str, Any]] = [{str(name): row[name] for name in row} for row in items.to_dict("records")]
    rng.shuffle(rows)
    for row in sorted(rows, key=lambda row: -row["raters"]):
        tiebreak = {rater: rng.random() for rater in raters}
        freest = sorted(raters, key=lambda r: (len(given[r]), load[r, row["matchup"]], tiebreak[r]))
        for rater in freest[: row["raters"]]:
            given[rater].append(row)
            load[rater, row["matchup"]] += 1
    test = prompts[prompts["split"] == "test"]
    references = list(zip(test["prompt"], test["reference"], strict=True))
    return {
        rater: _sequence(rater, rows, references, random.Random(stable_hash([recipe.seed, rater])), recipe)
        for rater, rows in given.items()
    }


def _sequence(
    rater: str,
    rows: Sequence[dict[str, Any]],
    references: Sequence[tuple[str, str]],
    rng: random.Random,
    recipe: StudyRecipe,
) -> list[dict[str, Any]]:
    """One rater's comparisons, with sides, repeats and checks."""
    shown: list[dict[str, Any]] = []
    for matchup in sorted({row["matchup"] for row in rows}):
        of_matchup = [row for row in rows if row["matchup"] == matchup]
        swaps = [i % 2 == 0 for i in range(len(of_matchup))]
        rng.shuffle(swaps)
        shown += [_shown(row, swapped, "item") for row, swapped in zip(of_matchup, swaps, strict=True)]
    rng.shuffle(shown)
    # Those that come first are repeated last, so that some time lies between.
    half = shown[: max(1, len(shown) // 2)]
    repeats = rng.sample(half, min(recipe.swapped_repeats, len(half)))
    checks = [_check(references, rng) for _ in range(recipe.attention_checks)]
    for repeat in repeats:
        exchanged = {"left": repeat["right"], "right": repeat["left"], "swapped": not repeat["swapped"]}
        shown.insert(rng.randint(3 * len(shown) // 4, len(shown)), {**repeat, **exchanged, "kind": "repeat"})
    for check in checks:
        shown.insert(rng.randint(1, len(shown)), check)
    return [{"id": stable_hash([recipe.seed, rater, i])[:16], **row} for i, row in enumerate(shown)]


def _shown(row: dict[str, Any], swapped: bool, kind: str) -> dict[str, Any]:
    left, right = (row["second"], row["first"]) if swapped else (row["first"], row["second"])
    return {
        **{"item_id": row["item_id"], "kind": kind, "prompt": row["prompt"]},
        **{"left": left.strip(), "right": right.strip(), "swapped": swapped},
    }


def _check(references: Sequence[tuple[str, str]], rng: random.Random) -> dict[str, Any]:
    """The reference of a prompt against that of another: the former is better beyond doubt."""
    prompt, right = rng.choice(references)
    wrong = rng.choice([text for _, text in references if text != right])
    swapped = rng.random() < 0.5
    return _shown({"item_id": "", "prompt": prompt, "first": right, "second": wrong}, swapped, "check")


def study_hash(assignment: dict[str, list[dict[str, Any]]]) -> str:
    """Names what the raters were shown; votes on anything else are refused."""
    return stable_hash(assignment)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `human_study`."""
    parser.add_argument("--samples", required=True, type=Path, nargs="+", help="samples tables of the methods compared")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table, with the references")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--pages", required=True, type=Path, help="folder of the raters' pages that is made")
    parser.add_argument("--items", required=True, type=Path, help="study_items table that is made")
    parser.add_argument("--key", required=True, type=Path, help="JSON key that is made; raters must not see it")


def run(args: argparse.Namespace) -> None:
    """Writes the pages, the items and the key."""
    recipe = from_json(StudyRecipe, args.recipe)
    prompts = read_table(args.prompts, "prompts")
    tables = [read_table(path, "samples", prompts=prompts.attrs["manifest"]["content_hash"]) for path in args.samples]
    items, equal = study_items(pd.concat(tables, ignore_index=True), prompts, recipe)
    assignment = assign(items, prompts, recipe)
    study = study_hash(assignment)
    hidden = ("item_id", "kind", "swapped")  # from the raters
    key = {
        "schema": SCHEMA,
        "study": study,
        "task": recipe.task,
        "recipe": to_dict(recipe),
        "raters": {
            rater: [{name: row[name] for name in ("id", *hidden)} for row in rows] for rater, rows in assignment.items()
        },
    }
    with atomic_directory(args.pages) as folder:
        for rater, rows in assignment.items():
            shown = [{name: row[name] for name in row if name not in hidden} for row in rows]
            for row in shown:
                row["prompt"] = question(row["prompt"], recipe.suffix)
            data = {
                **{"schema": SCHEMA, "study": study, "rater": rater, "task": recipe.task, "title": recipe.title},
                **{"question": recipe.question, "shown": recipe.shown, "prompt_heading": recipe.prompt_heading},
                "items": shown,
            }
            (folder / f"{rater}.html").write_text(rater_page(data), encoding="utf-8")
    write_table(args.items, "study_items", items, study=study, equal_share=equal, recipe=to_dict(recipe))
    write_text(args.key, json.dumps(key, indent=1) + "\n")


def _matchups(recipe: StudyRecipe) -> Iterable[Matchup]:
    return [from_dict(Matchup, values) for values in recipe.matchups]


def _texts(side: Side, samples: pd.DataFrame, test: pd.DataFrame) -> dict[str, str]:
    """A side's text for each test prompt."""
    if side.method == REFERENCE:
        return dict(zip(test.index, test["reference"], strict=True))
    rows = samples[
        (samples["method"] == side.method)
        & (samples["temperature"] == side.temperature)
        & (samples["split"] == "test")
        & (samples["sample_index"] == 0)
    ]
    if rows.empty:
        raise UserError(
            f"There are no samples of {str(side)!r} on test prompts: name one of sampling.temperatures in human.matchups."
        )
    return dict(zip(rows["prompt_id"], rows["text"], strict=True))
