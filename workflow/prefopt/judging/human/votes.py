"""The stage `human_votes`: what raters exported, checked, unblinded and counted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.win_rates import write_csv
from prefopt.errors import UserError
from prefopt.recipes import from_json, to_dict
from prefopt.tables import read_table, write_table

_VOTES = ("left", "right", "tie", "skip")
_LONGEST = 24 * 3600.0  # seconds for one answer; more was a forgotten page

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VotesRecipe:
    """Which votes count."""

    min_seconds: float  # a faster answer cannot have been read
    failed_checks_allowed: int  # a rater who fails more attention checks is left out
    simulated: bool  # whether the votes are a simulation's


@dataclasses.dataclass(frozen=True)
class Checked:
    """One rater's votes after the checks: those that count, and why others do not."""

    rater: str
    votes: list[dict[str, Any]]
    drops: Counter[str]
    figures: dict[str, Any]


def check_export(export: Any, key: Mapping[str, Any], recipe: VotesRecipe, name: str) -> Checked:
    """Checks one exported file against the key.

    Args:
        export: the file's JSON value.
        key: what `human_study` wrote.
        recipe: which votes count.
        name: the file's, for messages.

    Returns:
        The votes on items with their order and place, drops by reason, and figures of the rater.

    Raises:
        UserError: the file is no export of this study, of a rater whom nobody assigned anything, or holds two
            different answers to one comparison: none of it can be trusted.
    """
    if not isinstance(export, dict) or not isinstance(export.get("votes"), list):
        raise UserError(f"{name}: this is no file that a rater's page exported.")
    for field in ("schema", "study"):
        if export.get(field) != key[field]:
            raise UserError(
                f"{name}: its {field} is {export.get(field)!r}, that of the study here is {key[field]!r}: the rater "
                f"saw other texts, so that these votes cannot be counted; move the file away."
            )
    rater = export.get("rater")
    if not isinstance(rater, str) or rater not in key["raters"]:
        raise UserError(f"{name}: the rater {rater!r} is not one of this study's; move the file away.")
    assigned = {row["id"]: row for row in key["raters"][rater]}
    answers: dict[str, dict[str, Any]] = {}
    drops: Counter[str] = Counter()
    for vote in export["votes"]:
        reason = _problem(vote, assigned)
        if reason:
            drops[reason] += 1
            continue
        earlier = answers.get(vote["id"])
        if earlier is not None and earlier["vote"] != vote["vote"]:
            raise UserError(
                f"{name}: rater {rater!r} gave two different answers to the comparison {vote['id']!r}; the page "
                f"cannot do that, so ask the rater to export again."
            )
        if earlier is not None:
            drops["duplicate"] += 1
            continue
        answers[vote["id"]] = vote
    return _count(rater, answers, assigned, drops, recipe)


def _problem(vote: Any, assigned: Mapping[str, Any]) -> str:
    """Why a vote cannot be read; "" where it can."""
    if not isinstance(vote, dict) or not {"id", "vote", "seconds"} <= vote.keys():
        return "malformed"
    if not isinstance(vote["id"], str) or vote["id"] not in assigned:
        return "not assigned"
    if vote["vote"] not in _VOTES:
        return "unknown vote"
    seconds = vote["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "malformed"
    return "impossible time" if not 0 <= seconds <= _LONGEST else ""


def _count(
    rater: str,
    answers: Mapping[str, dict[str, Any]],
    assigned: Mapping[str, dict[str, Any]],
    drops: Counter[str],
    recipe: VotesRecipe,
) -> Checked:
    """Separates items from repeats and checks, and drops what does not count."""
    votes: list[dict[str, Any]] = []
    repeats: dict[str, str] = {}
    failed = checks = 0
    for place, (vote_id, vote) in enumerate(answers.items()):
        row = assigned[vote_id]
        outcome = _outcome(vote["vote"], row["swapped"])
        if row["kind"] == "check":
            checks += 1
            failed += outcome != "win"
        elif vote["vote"] == "skip":
            drops["skipped"] += row["kind"] == "item"
        elif vote["seconds"] < recipe.min_seconds:
            drops["too fast"] += row["kind"] == "item"
        elif row["kind"] == "repeat":
            repeats[row["item_id"]] = outcome
        else:
            votes.append(
                {
                    **{"rater": rater, "item_id": row["item_id"], "outcome": outcome, "place": place},
                    **{"order": "second_first" if row["swapped"] else "first_first", "seconds": float(vote["seconds"])},
                }
            )
    own = {vote["item_id"]: vote["outcome"] for vote in votes}
    both = [(own[item], outcome) for item, outcome in repeats.items() if item in own]
    lefts = [
        (vote["order"] == "first_first") == (vote["outcome"] == "win") for vote in votes if vote["outcome"] != "tie"
    ]
    figures = {
        "rater": rater,
        "assigned": len(assigned),
        "answered": len(answers),
        "checks": checks,
        "checks_failed": failed,
        "repeats": len(both),
        "repeats_agree": sum(a == b for a, b in both),
        "first_shown_rate": sum(lefts) / len(lefts) if lefts else math.nan,
        "median_seconds": float(pd.Series([vote["seconds"] for vote in votes], dtype=float).median()),
    }
    if failed > recipe.failed_checks_allowed:
        drops["failed attention checks"] += len(votes)
        votes = []
    return Checked(rater, votes, +drops, {**figures, "counted": len(votes)})


def _outcome(vote: str, swapped: bool) -> str:
    """The vote seen from the item's first text."""
    if vote in ("tie", "skip"):
        return vote
    return "win" if (vote == "left") != swapped else "loss"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `human_votes`."""
    parser.add_argument(
        "--exports",
        required=True,
        type=Path,
        nargs="+",
        help="files that the raters' pages exported, or folders of them",
    )
    parser.add_argument("--key", required=True, type=Path, help="the study's key")
    parser.add_argument("--items", required=True, type=Path, help="the study's items")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="votes table that is made")
    parser.add_argument("--raters", required=True, type=Path, help="CSV of the raters that is made")


def run(args: argparse.Namespace) -> None:
    """Checks all exports and writes the votes that count, and what became of every rater's."""
    recipe = from_json(VotesRecipe, args.recipe)
    key = json.loads(args.key.read_text(encoding="utf-8"))
    items = read_table(args.items, "study_items", study=key["study"])
    checked = merge([check_export(_read(path), key, recipe, str(path)) for path in _files(args.exports)])
    rows = [vote for one in checked for vote in one.votes]
    columns = ["item_id", "matchup", "prompt_id", "prompt", "first", "second"]
    empty = pd.DataFrame(columns=["rater", "item_id", "outcome", "place", "order", "seconds"])
    # In the order of the items, which is that of the config's matchups.
    votes = items[columns].merge(pd.DataFrame(rows, columns=empty.columns), on="item_id", validate="one_to_many")
    drops = sum((one.drops for one in checked), Counter[str]())
    logger.info("%d votes of %d raters count; not counted: %s", len(votes), len(checked), dict(drops) or "none")
    names = sorted(drops)
    table = [{**one.figures, **{name.replace(" ", "_"): one.drops[name] for name in names}} for one in checked]
    write_table(
        args.out,
        "votes",
        votes.assign(simulated=recipe.simulated),
        study=key["study"],
        drops=dict(drops),
        equal_share=items.attrs["manifest"]["equal_share"],
        raters=len(checked),
        recipe=to_dict(recipe),
    )
    write_csv(args.raters, pd.DataFrame(table).assign(simulated=recipe.simulated))


def merge(checked: Sequence[Checked]) -> list[Checked]:
    """One entry a rater.

    Raises:
        UserError: two files of one rater answer one comparison differently.
    """
    by_rater: dict[str, Checked] = {}
    for one in checked:
        other = by_rater.get(one.rater)
        if other is None:
            by_rater[one.rater] = one
            continue
        own = {vote["item_id"]: vote["outcome"] for vote in other.votes}
        for vote in one.votes:
            if own.get(vote["item_id"], vote["outcome"]) != vote["outcome"]:
                raise UserError(
                    f"Two files of rater {one.rater!r} answer the comparison {vote['item_id']!r} differently: keep "
                    f"the one that counts and move the other away."
                )
        # An earlier export is part of a later one.
        fuller = max(one, other, key=lambda checked: checked.figures["answered"])
        by_rater[one.rater] = fuller
    return list(by_rater.values())


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those of folders."""
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: this is no JSON file ({error}); ask the rater to export again.") from error
