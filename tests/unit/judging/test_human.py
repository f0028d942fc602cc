"""The study behind the raters' pages: items, assignment, votes, people as the judge, simulated raters."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.data.synthetic.world import SLOTS, join_clauses, make_post, write_summary
from prefopt.errors import UserError
from prefopt.judging.human import simulated, study, votes
from prefopt.judging.human.simulated import SimulatedRecipe, simulate, simulated_answer
from prefopt.judging.human.study import StudyRecipe, assign, read_key, read_secret, study_hash, study_items
from prefopt.judging.human.votes import Answers, Checked, VotesRecipe, count, merge, read_answers
from prefopt.judging.judge import Comparison
from prefopt.judging.people import load_votes
from prefopt.store.files import stable_hash
from prefopt.store.tables import read_table, write_table

VOTES = VotesRecipe(min_seconds=1.0, failed_checks_allowed=1, simulated=False)
SECRET = "5" * 64


def check_export(export: Any, key: dict[str, Any], recipe: VotesRecipe, name: str) -> Checked:
    """One file alone."""
    return count(read_answers(export, key, name), key, recipe)


def side(method: str, temperature: float | None = 0.0) -> dict[str, Any]:
    return {"run": method, "temperature": temperature}


def recipe(**changes: Any) -> StudyRecipe:
    values: dict[str, Any] = {
        **{"task": "tldr", "suffix": "\n\nTL;DR:", "title": "t", "question": "q", "shown": "s", "prompt_heading": "h"},
        "matchups": (
            {"first": side("dpo", 0.25), "second": side("ppo"), "items": 20, "raters_per_item": 2},
            {"first": side("dpo", 0.25), "second": side("reference", None), "items": 10, "raters_per_item": 1},
        ),
        **{"judgments_per_rater": 25, "swapped_repeats": 2, "attention_checks": 2, "seed": 3},
        "simulated": False,
    }
    return StudyRecipe(**{**values, **changes})


def world(n: int = 40) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Prompts with hidden facts, and samples of two methods: dpo is right, ppo says a part; five are equal."""
    rng = random.Random(0)
    prompts, samples = [], []
    for i in range(n):
        post = make_post(rng)
        summary = join_clauses([post.facts[slot].text() for slot in SLOTS])
        prompts.append(
            {
                **{"prompt_id": f"p{i:02d}", "prompt": post.prompt, "reference": f" {write_summary(rng, post)}"},
                **{"split": "test", "facts": post.facts_json(), "prompt_ids": [1, 2]},
            }
        )
        part = join_clauses([post.facts["event"].text()])
        for method, temperature, text in (
            ("dpo", 0.25, f" {summary} "),
            ("ppo", 0.0, f" {summary if i < 5 else part}"),
        ):
            samples.append(
                {
                    **{"prompt_id": f"p{i:02d}", "sample_index": 0, "run": method, "temperature": temperature},
                    **{"split": "test", "text": text, "tokens": 3, "token_ids": [1], "finish_reason": "eos"},
                    **{"logp": 0.0, "reference_logp": 0.0},
                }
            )
    return pd.DataFrame(samples), pd.DataFrame(prompts)


@pytest.fixture(scope="module")
def made() -> tuple[pd.DataFrame, pd.DataFrame, dict[str, list[dict[str, Any]]]]:
    samples, prompts = world()
    items, _ = study_items(samples, prompts, recipe())
    return items, prompts, assign(items, prompts, recipe(), SECRET)


def test_items_are_drawn_from_prompts_with_two_different_texts() -> None:
    samples, prompts = world()
    items, equal = study_items(samples, prompts, recipe())
    assert Counter(items["matchup"]) == {"dpo T=0.25 vs ppo T=0": 20, "dpo T=0.25 vs reference": 10}
    assert equal["dpo T=0.25 vs ppo T=0"] == pytest.approx(5 / 40)
    first = items[items["matchup"] == "dpo T=0.25 vs ppo T=0"]
    assert (first["first"].str.strip() != first["second"].str.strip()).all()
    assert first["prompt_id"].is_unique and items["item_id"].is_unique
    assert items.equals(study_items(samples.sample(frac=1, random_state=1), prompts, recipe())[0])
    assert not items.equals(study_items(samples, prompts, recipe(seed=4))[0])


def test_fewer_items_than_wanted_are_no_error_but_none_is(caplog: pytest.LogCaptureFixture) -> None:
    samples, prompts = world()
    matchup = {"first": side("dpo", 0.25), "second": side("ppo"), "items": 39, "raters_per_item": 1}
    items, _ = study_items(samples, prompts, recipe(matchups=(matchup,)))
    assert len(items) == 35
    assert "39 items are wanted, 35 of 40" in caplog.text
    same = {**matchup, "second": side("dpo", 0.25)}
    with pytest.raises(UserError, match="nothing to compare"):
        study_items(samples, prompts, recipe(matchups=(same,)))
    with pytest.raises(UserError, match="no samples of 'sft T=1'"):
        study_items(samples, prompts, recipe(matchups=({**matchup, "first": side("sft", 1.0)},)))


def test_every_item_has_its_raters_and_every_rater_a_fair_share(made: Any) -> None:
    items, _, assignment = made
    shown = [(rater, row["item_id"]) for rater, rows in assignment.items() for row in rows if row["kind"] == "item"]
    assert len(shown) == len(set(shown)) == 50
    assert Counter(item for _, item in shown) == items.set_index("item_id")["raters"].to_dict()
    assert set(Counter(rater for rater, _ in shown).values()) == {25}
    matchups = items.set_index("item_id")["matchup"]
    for rows in assignment.values():
        kinds = Counter(row["kind"] for row in rows)
        assert kinds == {"item": 25, "repeat": 2, "check": 2}
        assert rows[0]["kind"] != "check"
        for matchup in set(matchups):
            of_matchup = [
                row["swapped"] for row in rows if row["kind"] == "item" and matchups[row["item_id"]] == matchup
            ]
            assert abs(2 * sum(of_matchup) - len(of_matchup)) <= 1
        ids = [row["id"] for row in rows]
        assert len(set(ids)) == len(ids)


def test_sides_and_repeats(made: Any) -> None:
    items, prompts, assignment = made
    texts = items.set_index("item_id")[["first", "second"]]
    references = dict(zip(prompts["prompt"], prompts["reference"], strict=True))
    for rows in assignment.values():
        originals = {row["item_id"]: (place, row) for place, row in enumerate(rows) if row["kind"] == "item"}
        for place, row in enumerate(rows):
            right_way = (row["right"], row["left"]) if row["swapped"] else (row["left"], row["right"])
            if row["kind"] == "check":
                assert right_way[0] == references[row["prompt"]].strip() != right_way[1]
                continue
            assert right_way == tuple(text.strip() for text in texts.loc[row["item_id"]])
            if row["kind"] == "repeat":
                before, original = originals[row["item_id"]]
                assert before < place and row["swapped"] != original["swapped"]


def files(tmp_path: Path, **changes: Any) -> tuple[argparse.Namespace, dict[str, Any]]:
    samples, prompts = world()
    written = write_table(tmp_path / "prompts.parquet", "prompts", prompts)
    for method, rows in samples.groupby("run"):
        write_table(tmp_path / f"{method}.parquet", "samples", rows, prompts=written["content_hash"])
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    values = {**recipe().__dict__, **changes}
    args = parser.parse_args(
        [
            *("--samples", str(tmp_path / "dpo.parquet"), str(tmp_path / "ppo.parquet")),
            *("--prompts", str(tmp_path / "prompts.parquet"), "--recipe", json.dumps(values)),
            *("--pages", str(tmp_path / "pages"), "--items", str(tmp_path / "items.parquet")),
            *("--key", str(tmp_path / "key.json"), "--secret", str(tmp_path / "human" / "secrets" / "tldr")),
        ]
    )
    study.run(args)
    return args, json.loads((tmp_path / "key.json").read_text())


def test_what_a_page_shows_is_drawn_from_the_secret_and_the_items_from_the_seed() -> None:
    samples, prompts = world()
    items, _ = study_items(samples, prompts, recipe())
    made = assign(items, prompts, recipe(), SECRET)
    assert made == assign(items, prompts, recipe(seed=99), SECRET)
    others = [assign(items, prompts, recipe(), f"{i:064x}") for i in range(60)]
    assert len({study_hash(one, SECRET) for one in (made, *others)}) == 61
    assert len({study_hash(made, f"{i:064x}") for i in range(60)}) == 60
    # Ids, who compares what, sides, order, repeats and checks: none is the same everywhere, or follows another.
    ids = [row["id"] for one in (made, *others) for rows in one.values() for row in rows]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-f]{16}", name) for name in ids)
    name = items["item_id"].iloc[0]
    shown = [[(rater, i, row) for rater, rows in one.items() for i, row in enumerate(rows)] for one in others]
    items_of = [[entry for entry in one if entry[2]["item_id"] == name and entry[2]["kind"] == "item"] for one in shown]
    swapped = [entry[2]["swapped"] for one in items_of for entry in one]
    assert 0.3 < sum(swapped) / len(swapped) < 0.7
    assert len({i for one in items_of for _, i, _ in one}) > 15
    assert len({frozenset(row["item_id"] for _, _, row in one if row["kind"] == "repeat") for one in shown}) > 50
    assert len({tuple(i for r, i, row in one if r == "r01" and row["kind"] == "check") for one in shown}) > 30
    given = [frozenset(row["item_id"] for r, _, row in one if r == "r01") for one in shown]
    assert len(set(given)) > 50
    # Another question, or other items, are other pages from the same secret.
    again = assign(items, prompts, recipe(question="another"), SECRET)
    assert not {row["id"] for rows in again.values() for row in rows} & {row["id"] for row in made["r01"]}


def test_nothing_on_a_page_can_be_computed_from_the_config(tmp_path: Path) -> None:
    """The attack that was run: every hash of seed, rater and place, and of what is known, is tried against the ids."""
    args, key = files(tmp_path)
    shown = {row["id"] for rows in key["raters"].values() for row in rows}
    known: list[Any] = ["r01", "r02", "tldr", recipe().__dict__, key["study"], None]
    for seed in range(200):
        for i in range(30):
            for first in known:
                assert stable_hash([seed, first, i])[:16] not in shown
    (page,) = args.pages.glob("r01.html")
    secret = (tmp_path / "human/secrets/tldr").read_text().strip()
    assert secret not in page.read_text() and secret not in (tmp_path / "key.json").read_text()
    assert secret not in json.dumps(read_table(tmp_path / "items.parquet", "study_items").attrs["manifest"])


def test_pages_that_are_made_again_are_the_same_pages(tmp_path: Path) -> None:
    args, key = files(tmp_path)
    before = {page.name: page.read_bytes() for page in args.pages.glob("*")}
    secret = tmp_path / "human/secrets/tldr"
    assert [path.stat().st_mode & 0o777 for path in (secret, args.key)] == [0o600, 0o600]
    values = json.loads(json.dumps(recipe().__dict__))
    manifest = read_table(args.items, "study_items").attrs["manifest"]
    assert key["recipe"] == manifest["recipe"] == values and manifest["study"] == key["study"]
    assert manifest["equal_share"]["dpo T=0.25 vs ppo T=0"] == 5 / 40 and len(manifest["equal_share"]) == 2
    # Snakemake deletes what a job makes before it runs again.
    args.key.unlink()
    study.run(args)
    assert {page.name: page.read_bytes() for page in args.pages.glob("*")} == before
    assert json.loads(args.key.read_text()) == key
    # Without the secret it is another study, and votes on the old pages are refused.
    secret.unlink()
    study.run(args)
    other = json.loads(args.key.read_text())
    assert other["study"] != key["study"]
    with pytest.raises(UserError, match="the rater saw other texts"):
        read_answers(export(key), other, "f")


def test_a_study_of_simulated_raters_is_the_same_everywhere_and_says_that_nobody_votes(tmp_path: Path) -> None:
    keys = [files(tmp_path / name, simulated=True) for name in ("a", "b")]
    assert keys[0][1] == keys[1][1] != files(tmp_path / "c", simulated=True, seed=4)[1]
    assert not (tmp_path / "a" / "human").exists()
    assert "answers to it are not counted" in (tmp_path / "a" / "pages" / "r01.html").read_text()
    assert "are not counted" not in (files(tmp_path / "d")[0].pages / "r01.html").read_text()


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64, b"5" * 63 + b"\n5"])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(UserError, match=r"secret of (a|the) study"):
        read_secret(tmp_path / "secret")


def test_a_secret_is_made_once_and_is_no_other_studys(tmp_path: Path) -> None:
    first = read_secret(tmp_path / "one")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert read_secret(tmp_path / "one") == first != read_secret(tmp_path / "two")


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100000, '{"schema": 1, "study": "x", "task": "t"}'])
def test_a_key_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(UserError, match=r"key\.json .*run the stage `human_study` again"):
        read_key(tmp_path / "key.json")


def test_the_pages_say_nothing_of_who_wrote_what(tmp_path: Path) -> None:
    args, key = files(tmp_path)
    pages = sorted(args.pages.glob("*.html"))
    assert [page.stem for page in pages] == ["r01", "r02"]
    for page in pages:
        text = page.read_text()
        data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
        assert set(data["items"][0]) == {"id", "prompt", "left", "right"}
        assert data["study"] == key["study"]
        assert "TL;DR" not in data["items"][0]["prompt"]
        for word in (
            "dpo",
            "ppo",
            "0.25",
            "swapped",
            "check",
            "repeat",
            *(row["item_id"] for row in key["raters"]["r01"]),
        ):
            assert not word or not re.search(rf"\b{word}\b", json.dumps(data))
        assert "http://" not in text and "https://" not in text
        assert "default-src 'none'" in text


def export(key: dict[str, Any], rater: str = "r01", answer: str = "first") -> dict[str, Any]:
    """A complete export that prefers each item's first text."""
    answers = {True: "right", False: "left"}
    rows = key["raters"][rater]
    return {
        **{"schema": key["schema"], "study": key["study"], "rater": rater, "complete": True},
        "votes": [{"id": row["id"], "vote": answers[row["swapped"]], "seconds": 5.0} for row in rows],
    }


@pytest.fixture(scope="module")
def key(made: Any) -> dict[str, Any]:
    _, _, assignment = made
    return {"schema": study.SCHEMA, "study": study_hash(assignment, SECRET), "task": "tldr", "raters": assignment}


def test_votes_are_unblinded(key: dict[str, Any]) -> None:
    checked = check_export(export(key), key, VOTES, "f")
    assert len(checked.votes) == 25
    assert {vote["outcome"] for vote in checked.votes} == {"win"}
    assert checked.figures["repeats_agree"] == checked.figures["repeats"] == 2
    assert checked.figures["checks_failed"] == 0
    turned = export(key)
    for vote, row in zip(turned["votes"], key["raters"]["r01"], strict=True):
        if row["kind"] == "item":
            vote["vote"] = {"left": "right", "right": "left"}[vote["vote"]]
    checked = check_export(turned, key, VOTES, "f")
    assert {vote["outcome"] for vote in checked.votes} == {"loss"}
    assert checked.figures["repeats_agree"] == 0


def test_what_does_not_count_is_counted_by_reason(key: dict[str, Any]) -> None:
    rows = key["raters"]["r01"]
    items = [place for place, row in enumerate(rows) if row["kind"] == "item"]
    given = export(key)
    given["votes"][items[0]]["vote"] = "skip"
    given["votes"][items[1]]["seconds"] = 0.2
    given["votes"][items[2]]["seconds"] = -1
    given["votes"][items[3]]["seconds"] = 1e9
    given["votes"][items[4]]["vote"] = "both"
    given["votes"][items[5]]["seconds"] = "5"
    given["votes"][items[6]]["vote"] = "tie"
    given["votes"] += [copy.deepcopy(given["votes"][items[7]]), {"id": "f" * 16, "vote": "left", "seconds": 3}, 7]
    given["votes"].append({"id": ["x"], "vote": "left", "seconds": 3})
    checked = check_export(given, key, VOTES, "f")
    assert checked.drops == {
        **{"skipped": 1, "too fast": 1, "impossible time": 2, "unknown vote": 1, "malformed": 2},
        **{"duplicate": 1, "not assigned": 2},
    }
    assert len(checked.votes) == 25 - 6
    assert Counter(vote["outcome"] for vote in checked.votes) == {"win": 18, "tie": 1}


def test_a_check_that_was_not_answered_is_failed(key: dict[str, Any]) -> None:
    rows = key["raters"]["r01"]
    checks = {row["id"] for row in rows if row["kind"] == "check"}
    given = export(key)
    given["votes"] = [vote for vote in given["votes"] if vote["id"] not in checks]
    checked = check_export(given, key, VOTES, "f")
    assert (checked.figures["checks"], checked.figures["checks_failed"], checked.figures["counted"]) == (2, 2, 0)
    assert checked.drops == {"failed attention checks": 25}
    one = export(key)
    next(vote for vote in one["votes"] if vote["id"] in checks)["vote"] = "both"  # cannot be read, so is no answer
    checked = check_export(one, key, VOTES, "f")
    assert (checked.figures["checks_failed"], checked.figures["counted"]) == (1, 25)
    assert checked.drops == {"unknown vote": 1}


@pytest.mark.parametrize("seconds", [10**400, -(10**400), 1e308 * 10, "9" * 400, [3.0], True, None, float("nan")])
def test_no_time_is_too_odd_to_be_counted_as_odd(key: dict[str, Any], seconds: Any) -> None:
    given = export(key)
    given["votes"][0]["seconds"] = seconds
    checked = check_export(given, key, VOTES, "f")
    assert checked.drops.total() == 1 and set(checked.drops) <= {"malformed", "impossible time"}
    assert checked.figures["answered"] == 28


def test_who_fails_the_checks_is_left_out(key: dict[str, Any]) -> None:
    given = export(key)
    for vote, row in zip(given["votes"], key["raters"]["r01"], strict=True):
        if row["kind"] == "check":
            vote["vote"] = "tie"
    checked = check_export(given, key, VOTES, "f")
    assert (checked.figures["checks_failed"], checked.votes) == (2, [])
    assert checked.drops == {"failed attention checks": 25}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"study": "0" * 64}, "the rater saw other texts"),
        ({"schema": 0}, "its schema is 0"),
        ({"rater": "r99"}, "'r99' is not one of this study's"),
        ({"rater": ["r01"]}, "is not one of this study's"),
        ({"votes": None}, "no file that a rater's page exported"),
    ],
)
def test_files_that_cannot_be_trusted_are_refused(key: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_export({**export(key), **change}, key, VOTES, "f")


def test_two_answers_to_one_comparison_are_refused(key: dict[str, Any]) -> None:
    given = export(key)
    other = {**given["votes"][0], "vote": "tie"}
    with pytest.raises(UserError, match="two different answers"):
        check_export({**given, "votes": [*given["votes"], other]}, key, VOTES, "f")


def test_an_earlier_export_of_the_same_rater_adds_nothing(key: dict[str, Any]) -> None:
    whole = read_answers(export(key), key, "f")
    early = read_answers({**export(key), "votes": export(key)["votes"][:9]}, key, "g")
    assert merge([early, whole]) == merge([whole, early]) == [whole]
    first = key["raters"]["r01"][0]["id"]
    turned = {**whole.answers[first], "vote": "tie"}
    changed = Answers("r01", {first: turned}, Counter(), "h")
    with pytest.raises(UserError, match="f and h: two files of rater 'r01' answer the comparison"):
        merge([whole, changed])


@pytest.mark.parametrize("kind", ["item", "check", "repeat"])
@pytest.mark.parametrize("backwards", [False, True])
def test_files_that_contradict_are_found_before_anything_is_left_out(
    key: dict[str, Any], kind: str, backwards: bool
) -> None:
    """A rater who failed every check, and sends a second file with other answers of one kind."""
    kinds = {row["id"]: row["kind"] for row in key["raters"]["r01"]}
    failed = export(key)
    for vote in failed["votes"]:
        if kinds[vote["id"]] == "check":
            vote["vote"] = "tie"
    second = copy.deepcopy(failed)
    for vote in second["votes"]:
        if kinds[vote["id"]] == kind:
            vote["vote"] = {"left": "right", "right": "left", "tie": "left"}[vote["vote"]]
    both = [read_answers(failed, key, "one"), read_answers(second, key, "two")]
    with pytest.raises(UserError, match="answer the comparison"):
        merge(both[::-1] if backwards else both)


def test_answers_of_two_files_count_together(key: dict[str, Any]) -> None:
    """Failed checks cannot be left out of a second file, and an answer too fast not be slowed down in it."""
    kinds = {row["id"]: row["kind"] for row in key["raters"]["r01"]}
    first, second = export(key), export(key)
    for vote in first["votes"]:
        if kinds[vote["id"]] == "check":
            vote["vote"] = "tie"
    second["votes"] = [vote for vote in second["votes"] if kinds[vote["id"]] != "check"]
    (merged,) = merge([read_answers(first, key, "a"), read_answers(second, key, "b")])
    assert count(merged, key, VOTES).figures["checks_failed"] == 2
    fast, slow = export(key), export(key)
    item = next(i for i, vote in enumerate(fast["votes"]) if kinds[vote["id"]] == "item")
    fast["votes"][item]["seconds"] = 0.1
    for pair in ([fast, slow], [slow, fast]):
        (merged,) = merge([read_answers(one, key, "f") for one in pair])
        assert count(merged, key, VOTES).drops == {"too fast": 1}
    halves = [{**export(key), "votes": export(key)["votes"][i::2]} for i in (0, 1)]
    (merged,) = merge([read_answers(half, key, "f") for half in halves])
    assert count(merged, key, VOTES).figures["answered"] == 29


SMALL: dict[str, Any] = {
    **{"schema": 1, "study": "s" * 64, "task": "tldr"},
    "raters": {
        "r01": [
            {"id": f"id{i}", "kind": kind, "item_id": item, "swapped": swapped}
            for i, (kind, item, swapped) in enumerate(
                [
                    *(("item", "a", False), ("item", "b", True), ("check", "", False), ("item", "c", True)),
                    *(("repeat", "a", True), ("check", "", True), ("repeat", "b", False), ("item", "d", False)),
                    ("repeat", "d", True),
                ]
            )
        ]
    },
}


def answered(*given: tuple[str, float]) -> dict[str, Any]:
    """An export with these answers and times, in the order of the page."""
    return {
        "schema": 1,
        "study": "s" * 64,
        "rater": "r01",
        "votes": [{"id": f"id{i}", "vote": vote, "seconds": seconds} for i, (vote, seconds) in enumerate(given)],
    }


def test_a_raters_votes_and_figures_by_hand() -> None:
    """Left is the first text where the sides are not swapped; a repeat shows them the other way round."""
    given = answered(
        *(("left", 2.0), ("left", 8.0), ("left", 0.0), ("tie", 4.0), ("right", 3.0), ("left", 3.0), ("left", 1.0)),
        *(("right", 1.0), ("left", 0.5)),
    )
    checked = check_export(given, SMALL, VOTES, "f")
    assert checked.votes == [
        {"rater": "r01", "item_id": "a", "outcome": "win", "place": 0, "order": "first_first", "seconds": 2.0},
        {"rater": "r01", "item_id": "b", "outcome": "loss", "place": 1, "order": "second_first", "seconds": 8.0},
        {"rater": "r01", "item_id": "c", "outcome": "tie", "place": 3, "order": "second_first", "seconds": 4.0},
        {"rater": "r01", "item_id": "d", "outcome": "loss", "place": 7, "order": "first_first", "seconds": 1.0},
    ]
    # The second check is swapped, so that its left is the worse text. Of the repeats a agrees, b does not, and that of
    # d was too fast, which counts no vote less.
    assert checked.figures == {
        **{"rater": "r01", "assigned": 9, "answered": 9, "checks": 2, "checks_failed": 1, "repeats": 2},
        **{"repeats_agree": 1, "first_shown_rate": 2 / 3, "median_seconds": 3.0, "counted": 4},
    }
    assert checked.drops == {}
    # One failure more than is allowed, and a time below the least, and a skipped repeat of what was voted on.
    strict = VotesRecipe(min_seconds=1.5, failed_checks_allowed=0, simulated=False)
    given["votes"][4]["vote"] = "skip"
    checked = check_export(given, SMALL, strict, "f")
    assert checked.votes == [] and checked.drops == {"too fast": 1, "failed attention checks": 3}
    assert (checked.figures["counted"], checked.figures["repeats"], checked.figures["median_seconds"]) == (0, 0, 4.0)
    none = check_export(answered(), SMALL, VOTES, "f").figures
    assert none["checks_failed"] == 2 and math.isnan(none["first_shown_rate"]) and math.isnan(none["median_seconds"])


def test_a_day_is_the_longest_time_of_an_answer_and_nothing_the_shortest() -> None:
    for seconds, drops in (
        (0, {}),
        (24 * 3600, {}),
        (24 * 3600 + 1, {"impossible time": 1}),
        (-0.1, {"impossible time": 1}),
    ):
        assert read_answers(answered(("left", seconds)), SMALL, "f").drops == drops
    for odd in ({"id": "id0", "vote": "left"}, {"id": "id0", "seconds": 1}, {"vote": "left", "seconds": 1}, "left"):
        found = read_answers({**answered(), "votes": [odd]}, SMALL, "f")
        assert found.drops == {"malformed": 1} and found.answers == {}


def test_files_of_one_rater_and_of_several_are_put_together() -> None:
    """The answers' order is the longer file's, the shorter time counts, and a reason counts once for each file's vote."""
    other = {**SMALL, "raters": {"r01": SMALL["raters"]["r01"], "r02": SMALL["raters"]["r01"]}}
    long = answered(("left", 5.0), ("right", 5.0), ("left", 9.0), ("both", 1.0))
    short = {
        **answered(),
        "votes": [
            {"id": id_, "vote": vote, "seconds": seconds}
            for id_, vote, seconds in (
                ("id7", "tie", 3.0),
                ("id1", "right", 4.0),
                ("id3", "both", 1.0),
                ("id4", "both", 1.0),
            )
        ],
    }
    files = [read_answers(given, other, name) for given, name in ((short, "s"), (long, "l"))]
    alone = read_answers({**long, "rater": "r02"}, other, "o")
    for both in (files, files[::-1]):
        merged = merge([both[0], alone, both[1]])
        assert [one.rater for one in merged] == ["r01", "r02"] and merged[1] == alone
        assert {id_: vote["seconds"] for id_, vote in merged[0].answers.items()} == {
            **{"id0": 5.0, "id1": 4.0, "id2": 9.0, "id7": 3.0}
        }
        assert list(merged[0].answers) == ["id0", "id1", "id2", "id7"]
        assert (merged[0].name, merged[0].drops) == ("l", {"unknown vote": 2})


def run_votes(tmp_path: Path, *exports: Path, recipe: VotesRecipe = VOTES) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    votes.add_arguments(parser)
    args = parser.parse_args(
        [
            *("--exports", *map(str, exports), "--key", str(tmp_path / "key.json")),
            *("--items", str(tmp_path / "items.parquet"), "--recipe", json.dumps(recipe.__dict__)),
            *("--out", str(tmp_path / "votes.parquet"), "--raters", str(tmp_path / "raters.csv")),
        ]
    )
    votes.run(args)
    return args


def test_votes_become_verdicts(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    (tmp_path / "exports").mkdir()
    one, two = export(key, "r01"), export(key, "r02")
    # The second rater prefers the other text of every item with two raters.
    shared = {row["item_id"] for row in key["raters"]["r01"]} & {row["item_id"] for row in key["raters"]["r02"]} - {""}
    for vote, row in zip(two["votes"], key["raters"]["r02"], strict=True):
        if row["item_id"] in shared:
            vote["vote"] = {"left": "right", "right": "left"}[vote["vote"]]
    for given in (one, two):
        (tmp_path / "exports" / f"{given['rater']}.json").write_text(json.dumps(given))
    args = run_votes(tmp_path, tmp_path / "exports")
    table = read_table(args.out, "votes")
    assert len(table) == 50
    assert pd.read_csv(args.raters)["counted"].tolist() == [25, 25]
    judge = load_votes(args.out)
    assert judge.name == f"human:{key['study'][:12]}"
    assert judge.report() == {"raters": 2, "simulated_raters": False}
    rows = read_table(tmp_path / "items.parquet", "study_items").to_dict("records")
    for row in rows:
        texts = (f" {row['first'].strip()} ", row["second"])
        straight = Comparison(row["prompt_id"], row["prompt"], "", *texts)
        turned = Comparison(row["prompt_id"], row["prompt"], "", *texts[::-1])
        expected = ["tie", "tie"] if row["item_id"] in shared else ["first", "second"]
        verdicts = judge.compare([straight, turned])
        assert [verdict.winner for verdict in verdicts] == expected
        counts = ["loss 1, win 1"] * 2 if row["item_id"] in shared else ["win 1", "loss 1"]
        assert [verdict.reply for verdict in verdicts] == counts
    assert judge.compare([Comparison("p00", "", "", "same", " same ")])[0].winner == "tie"
    with pytest.raises(UserError, match=r"Nobody has voted on 1 of 1 pairs, those of the prompts 'p00'"):
        judge.compare([Comparison("p00", "", "", "a", "b")])


def test_the_table_of_raters_says_why_votes_of_each_do_not_count(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    (tmp_path / "exports").mkdir()
    for rater, seconds in (("r01", 0.2), ("r02", 5.0)):
        given = export(key, rater)
        items = [i for i, row in enumerate(key["raters"][rater]) if row["kind"] == "item"]
        given["votes"][items[0]]["vote"], given["votes"][items[1]]["seconds"] = "skip", seconds
        (tmp_path / "exports" / f"{rater}.json").write_text(json.dumps(given))
    args = run_votes(tmp_path, tmp_path / "exports")
    raters = pd.read_csv(args.raters)[["rater", "counted", "skipped", "too_fast", "simulated"]]
    assert raters.to_numpy().tolist() == [["r01", 23, 1, 1, False], ["r02", 24, 1, 0, False]]
    manifest = read_table(args.out, "votes").attrs["manifest"]
    assert (manifest["drops"], manifest["raters"], manifest["study"]) == (
        {"skipped": 2, "too fast": 1},
        2,
        key["study"],
    )
    assert manifest["recipe"] == VOTES.__dict__


BAD = {
    "open.json": b"{",
    "deep.json": b"[" * 200000,
    "digits.json": b'{"votes": [' + b"9" * 6000 + b"]}",
    "bytes.json": b"\xff\xfe\x00",
    "empty.json": b"",
    "list.json": b"[]",
    "huge.json": b" " * (10**7 + 1),
}


def test_every_file_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    (tmp_path / "exports").mkdir()
    for name, content in BAD.items():
        (tmp_path / "exports" / name).write_bytes(content)
    deep = {**export(key, "r02"), "study": json.loads("[" * 900 + "]" * 900)}
    (tmp_path / "exports" / "study.json").write_text(json.dumps(deep))
    (tmp_path / "exports" / "good.json").write_text(json.dumps(export(key)))
    (tmp_path / "exports" / "good\n\x1b]0;x.json").write_text("{")
    with pytest.raises(UserError) as raised:
        run_votes(tmp_path, tmp_path / "exports")
    lines = str(raised.value).splitlines()
    assert len(lines) == len(BAD) + 2 and max(map(len, lines)) < 500
    assert all(sum(f"/{name}: " in line for line in lines) == 1 for name in (*BAD, "study.json"))
    assert "this is no JSON file" in next(line for line in lines if "open.json" in line)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", str(raised.value))
    assert not (tmp_path / "votes.parquet").exists()


def test_a_file_with_a_byte_order_mark_counts(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    (tmp_path / "r01.json").write_text(json.dumps(export(key)), encoding="utf-8-sig")
    assert len(read_table(run_votes(tmp_path, tmp_path / "r01.json").out, "votes")) == 25


SIMULATED = SimulatedRecipe(noise=0.5, length_bias=0.0, indifference=0.1, careless=0.0, seed=0)


def test_simulated_raters_prefer_what_is_better_by_their_noise() -> None:
    rater = {"noise": 0.5, "length_bias": 0.0}
    rng = random.Random(0)
    answers = Counter(simulated_answer(rng, 1.0, 0.0, 0, rater, SIMULATED) for _ in range(20000))
    # P(difference + error > 0.1) with a logistic error: sigma(0.9 / 0.5); below -0.1: sigma(-1.1 / 0.5).
    assert answers["left"] / 20000 == pytest.approx(0.8581, abs=0.01)
    assert answers["right"] / 20000 == pytest.approx(0.0998, abs=0.01)
    biased = Counter(
        simulated_answer(rng, 0.0, 0.0, 20, {**rater, "length_bias": 0.5}, SIMULATED) for _ in range(20000)
    )
    assert biased["left"] / 20000 == pytest.approx(0.8581, abs=0.01)  # twenty words are worth 1.0


def test_simulated_votes_are_exports_that_count(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    items = read_table(tmp_path / "items.parquet", "study_items")
    exports = simulate(key, items, SIMULATED)
    assert list(exports) == ["r01", "r02"]
    assert [(value["rater"], value["complete"], value["simulated"]) for value in exports.values()] == [
        *(("r01", True, True), ("r02", True, True))
    ]
    checked = [check_export(value, key, VOTES, rater) for rater, value in exports.items()]
    assert [one.figures["checks_failed"] for one in checked] == [0, 0]
    outcomes = Counter(vote["outcome"] for one in checked for vote in one.votes)
    assert outcomes["win"] / 50 > 0.8  # dpo is right, ppo tells one fact of five
    careless = simulate(key, items, SimulatedRecipe(**{**SIMULATED.__dict__, "careless": 1.0}))
    assert careless != exports
    parser = argparse.ArgumentParser()
    simulated.add_arguments(parser)
    inputs = ["--key", str(tmp_path / "key.json"), "--items", str(tmp_path / "items.parquet")]
    recipe_json = json.dumps(SIMULATED.__dict__)
    simulated.run(parser.parse_args([*inputs, "--recipe", recipe_json, "--out", str(tmp_path / "votes")]))
    written = sorted((tmp_path / "votes").glob("*.json"))
    assert [path.name for path in written] == ["tldr-r01.json", "tldr-r02.json"]
    assert [json.loads(path.read_text()) for path in written] == list(exports.values())
    judge = load_votes(run_votes(tmp_path, *written, recipe=dataclasses.replace(VOTES, simulated=True)).out)
    assert judge.name == f"human:simulated-{key['study'][:12]}"
    assert judge.report() == {"raters": 2, "simulated_raters": True}


def test_raters_cannot_be_simulated_without_hidden_facts(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    items = read_table(tmp_path / "items.parquet", "study_items").assign(facts="")
    with pytest.raises(UserError, match="no hidden facts"):
        simulate(key, items, SIMULATED)
