"""The stage `human_votes`: what raters exported, checked, unblinded and counted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from prefopt.analysis.texts import write_csv
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.judging.human.study import read_key
from prefopt.store.tables import read_table, write_table

_VOTES = ("left", "right", "tie", "skip")
_LONGEST = 24 * 3600.0  # seconds for one answer; more was a forgotten page
_LARGEST = 10**7  # bytes of an exported file, which holds no texts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VotesRecipe:
    """Which votes count."""

    min_seconds: float  # a faster answer cannot have been read
    failed_checks_allowed: int  # a rater who fails more attention checks is left out
    simulated: bool  # whether the votes are a simulation's


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one rater answered, as it was given, and what could not be read."""

    rater: str
    answers: dict[str, dict[str, Any]]  # by the comparison's id, in the order in which they were given
    drops: Counter[str]
    name: str  # of the file, for messages


@dataclasses.dataclass(frozen=True)
class Checked:
    """One rater's votes after the checks: those that count, and why others do not."""

    rater: str
    votes: list[dict[str, Any]]
    drops: Counter[str]
    figures: dict[str, Any]


def read_answers(export: Any, key: Mapping[str, Any], name: str) -> Answers:
    """The answers of one exported file.

    Args:
        export: the file's JSON value.
        key: what `human_study` wrote.
        name: the file's, for messages.

    Raises:
        UserError: the file is no export of this study, of a rater whom nobody assigned anything, or holds two
            different answers to one comparison: none of it can be trusted.
    """
    if not isinstance(export, dict) or not isinstance(export.get("votes"), list):
        raise UserError(f"{name}: this is no file that a rater's page exported; move the file away.")
    for field in ("schema", "study"):
        if export.get(field) != key[field]:
            raise UserError(
                f"{name}: its {field} is {reprlib.repr(export.get(field))}, that of the study here is {key[field]!r}: the "
                f"rater saw other texts, so that these votes cannot be counted; move the file away."
            )
    rater = export.get("rater")
    if not isinstance(rater, str) or rater not in key["raters"]:
        raise UserError(f"{name}: the rater {reprlib.repr(rater)} is not one of this study's; move the file away.")
    assigned = {row["id"] for row in key["raters"][rater]}
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
    return Answers(rater, answers, drops, name)


def merge(files: Sequence[Answers]) -> list[Answers]:
    """One entry a rater: the answers of all files of one rater together, before any is left out.

    Whatever the files do not agree on is refused, be it a check or an answer that would not count: otherwise a rater
    who failed the checks could send a second file with better ones. Of two times for one answer the shorter counts.

    Raises:
        UserError: two files of one rater answer one comparison differently.
    """
    by_rater: dict[str, Answers] = {}
    for one in files:
        other = by_rater.get(one.rater)
        if other is None:
            by_rater[one.rater] = one
            continue
        # An earlier export is the beginning of a later one.
        longer, shorter = (one, other) if len(one.answers) > len(other.answers) else (other, one)
        both = dict(longer.answers)
        for vote_id, vote in shorter.answers.items():
            found = both.setdefault(vote_id, vote)
            if found["vote"] != vote["vote"]:
                raise UserError(
                    f"{other.name} and {one.name}: two files of rater {one.rater!r} answer the comparison {vote_id!r} "
                    f"differently: keep the one that counts and move the other away."
                )
            if vote["seconds"] < found["seconds"]:
                both[vote_id] = vote
        by_rater[one.rater] = Answers(one.rater, both, longer.drops | shorter.drops, longer.name)
    return list(by_rater.values())


def _problem(vote: Any, assigned: Collection[str]) -> str:
    """Why a vote cannot be read; "" where it can."""
    if not isinstance(vote, dict) or not {"id", "vote", "seconds"} <= vote.keys():
        return "malformed"
    if not isinstance(vote["id"], str) or vote["id"] not in assigned:
        return "not assigned"
    if vote["vote"] not in _VOTES:
        return "unknown vote"
    seconds = vote["seconds"]
    # A whole number may be too large for a float, and is compared as it is.
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds != seconds:
        return "malformed"
    return "impossible time" if not 0 <= seconds <= _LONGEST else ""


def count(given: Answers, key: Mapping[str, Any], recipe: VotesRecipe) -> Checked:
    """Separates items from repeats and checks, and drops what does not count.

    Args:
        given: all that a rater answered.
        key: what `human_study` wrote.
        recipe: which votes count. A check that was not answered is failed.

    Returns:
        The votes on items with their order and place, drops by reason, and figures of the rater.
    """
    rater, answers, drops = given.rater, given.answers, Counter(given.drops)
    assigned = {row["id"]: row for row in key["raters"][rater]}
    votes: list[dict[str, Any]] = []
    repeats: dict[str, str] = {}
    checks = [row["id"] for row in assigned.values() if row["kind"] == "check"]
    failed = sum(check not in answers for check in checks)
    for place, (vote_id, vote) in enumerate(answers.items()):
        row = assigned[vote_id]
        outcome = _outcome(vote["vote"], row["swapped"])
        if row["kind"] == "check":
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
        "checks": len(checks),
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
    key = read_key(args.key)
    items = read_table(args.items, "study_items", study=key["study"])
    checked = [count(given, key, recipe) for given in merge(_read_all(_files(args.exports), key))]
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


def _files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those of folders."""
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def _read_all(paths: Sequence[Path], key: Mapping[str, Any]) -> list[Answers]:
    """The answers of every file.

    Raises:
        UserError: names every file that cannot be counted, not the first alone.
    """
    found, faults = [], []
    for path in paths:
        try:
            found.append(read_answers(_read(path), key, _shown(path)))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("\n".join(faults))
    return found


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{_shown(path)}: no page exports more than {_LARGEST / 1e6:.0f} MB; move the file away.")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    # Also too deep, or a number of too many digits.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{_shown(path)}: this is no JSON file ({error}); ask the rater to export again.") from error


def _shown(path: Path) -> str:
    """A file's name as a terminal may show it."""
    return str(path) if str(path).isprintable() else repr(str(path))
