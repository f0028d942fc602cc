"""The stage `human_study`: blind pairwise comparisons for people, a page a rater, and the key that stays here.

Whatever a page shows beyond the texts themselves (ids, sides, order, repeats, checks, who compares what) is drawn from a
secret, because the config and this code are public. The secret is made once and kept outside results/: pages that are
made again are the same pages, and votes that were given on them still count.
"""

from __future__ import annotations

import argparse
import dataclasses
import hmac
import json
import logging
import math
import random
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.experiment.targets import REFERENCE
from prefopt.judging.human.page import rater_page
from prefopt.judging.templates import question
from prefopt.store.files import atomic_directory, atomic_path, canonical_json, stable_hash
from prefopt.store.tables import read_table, write_table

logger = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Whose text: a run at a temperature, or the reference text of the prompt."""

    run: str
    temperature: float | None

    def __str__(self) -> str:
        return self.run if self.temperature is None else f"{self.run} T={self.temperature:g}"


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
    seed: int  # of the items alone, but where raters are simulated
    simulated: bool  # nobody sees the pages, so that they are drawn from the seed and every run has the same


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


def assign(
    items: pd.DataFrame, prompts: pd.DataFrame, recipe: StudyRecipe, secret: str
) -> dict[str, list[dict[str, Any]]]:
    """What each rater is shown, in order.

    Every item goes to as many different raters as it wants, those with the fewest so far; sides are balanced for
    each rater and matchup; repeats come late and checks anywhere but first.

    Args:
        items: rows of a `study_items` table.
        prompts: the prompts table, whose references are the checks.
        recipe: numbers.
        secret: all that is drawn is drawn from it; equal secrets and items give equal pages.

    Returns:
        By rater: dicts with id (says nothing), item_id ("" for a check), kind (item, repeat or check), prompt,
        left, right and swapped (whether the item's first text is on the right; for a check, the reference).
    """
    total = int(items["raters"].sum())
    raters = [f"r{i + 1:02d}" for i in range(max(math.ceil(total / recipe.judgments_per_rater), items["raters"].max()))]
    # Other items or another question are another study, whose pages say nothing of this one's.
    asked = [recipe.question, recipe.judgments_per_rater, recipe.swapped_repeats, recipe.attention_checks]
    secret = keyed_hash(secret, [items["item_id"].tolist(), asked])
    rng = random.Random(keyed_hash(secret, "assignment"))
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
    # A prompt alone has none.
    references = [(prompt, text) for prompt, text in zip(test["prompt"], test["reference"], strict=True) if text]
    if recipe.attention_checks and len({text for _, text in references}) < 2:
        raise UserError("Attention checks need the references of two test prompts: set human.attention_checks to 0.")
    return {rater: _sequence(rater, rows, references, secret, recipe) for rater, rows in given.items()}


def _sequence(
    rater: str,
    rows: Sequence[dict[str, Any]],
    references: Sequence[tuple[str, str]],
    secret: str,
    recipe: StudyRecipe,
) -> list[dict[str, Any]]:
    """One rater's comparisons, with sides, repeats and checks."""
    rng = random.Random(keyed_hash(secret, rater))
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
    return [{"id": keyed_hash(secret, [rater, i])[:16], **row} for i, row in enumerate(shown)]


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


def study_hash(assignment: dict[str, list[dict[str, Any]]], secret: str) -> str:
    """Names what the raters were shown; votes on anything else are refused.

    It stands on every page. Without the secret sides and kinds could be tried until the hash fits.
    """
    return keyed_hash(secret, assignment)


def keyed_hash(secret: str, value: Any) -> str:
    """HMAC-SHA-256 (hex) of a JSON value's canonical form: nobody without the secret can compute or check it."""
    return hmac.digest(secret.encode(), canonical_json(value).encode(), "sha256").hex()


def read_secret(path: Path) -> str:
    """The secret of a study, 64 hex digits; where the file is missing it is made, for its owner alone.

    Raises:
        UserError: the file holds something else, or cannot be read or made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_private(path, secrets.token_hex(32) + "\n")
            logger.info("%s: a new secret, from which the pages are drawn; keep it until all votes are counted", path)
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the secret of the study cannot be kept there ({error}): make it readable.") from error
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise UserError(
            f"{path} holds no secret of a study, which is 64 hex digits: bring the file back, or delete it, which makes "
            f"other pages, on which votes already given do not count."
        )
    return text


def read_key(path: Path) -> dict[str, Any]:
    """What `human_study` wrote as the key.

    Raises:
        UserError: it is missing, or no whole key.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as a study's key ({error}): run the stage `human_study` again."
        ) from error
    if not isinstance(key, dict) or not {"schema", "study", "task", "raters"} <= key.keys():
        raise UserError(f"{path} is no study's key: run the stage `human_study` again.")
    return key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `human_study`."""
    parser.add_argument("--samples", required=True, type=Path, nargs="+", help="samples tables of the runs compared")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table, with the references")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--pages", required=True, type=Path, help="folder of the raters' pages that is made")
    parser.add_argument("--items", required=True, type=Path, help="study_items table that is made")
    parser.add_argument("--key", required=True, type=Path, help="JSON key that is made; raters must not see it")
    parser.add_argument(
        "--secret", type=Path, help="file of the study's secret, made where it is missing (default: beside the key)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the pages, the items and the key."""
    recipe = from_json(StudyRecipe, args.recipe)
    prompts = read_table(args.prompts, "prompts")
    tables = [read_table(path, "samples", prompts=prompts.attrs["manifest"]["content_hash"]) for path in args.samples]
    items, equal = study_items(pd.concat(tables, ignore_index=True), prompts, recipe)
    if recipe.simulated:
        secret = stable_hash(["simulated", recipe.seed])
    else:
        secret = read_secret(args.secret or args.key.with_suffix(".secret"))
    assignment = assign(items, prompts, recipe, secret)
    study = study_hash(assignment, secret)
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
                "simulated": recipe.simulated,
                "items": shown,
            }
            (folder / f"{rater}.html").write_text(rater_page(data), encoding="utf-8")
    write_table(args.items, "study_items", items, study=study, equal_share=equal, recipe=to_dict(recipe))
    _write_private(args.key, json.dumps(key, indent=1) + "\n")


def _write_private(path: Path, text: str) -> None:
    """Writes a text that its owner alone may read."""
    with atomic_path(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.chmod(0o600)
        temporary.write_text(text, encoding="utf-8")


def _matchups(recipe: StudyRecipe) -> Iterable[Matchup]:
    return [from_dict(Matchup, values) for values in recipe.matchups]


def _texts(side: Side, samples: pd.DataFrame, test: pd.DataFrame) -> dict[str, str]:
    """A side's text for each test prompt."""
    if side.run == REFERENCE:
        if test["reference"].eq("").any():
            raise UserError(
                "Some test prompts came alone, so that a matchup with the reference has no text: leave it out."
            )
        return dict(zip(test.index, test["reference"], strict=True))
    rows = samples[
        (samples["run"] == side.run)
        & (samples["temperature"] == side.temperature)
        & (samples["split"] == "test")
        & (samples["sample_index"] == 0)
    ]
    if rows.empty:
        raise UserError(
            f"There are no samples of {str(side)!r} on test prompts: name one of sampling.temperatures in human.matchups."
        )
    return dict(zip(rows["prompt_id"], rows["text"], strict=True))
