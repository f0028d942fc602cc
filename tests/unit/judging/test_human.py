"""The study behind the raters' pages: items, assignment, votes, people as the judge, simulated raters."""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.data.world import SLOTS, join_clauses, make_post, write_summary
from prefopt.errors import UserError
from prefopt.judging.human import simulated, study, votes
from prefopt.judging.human.judge import load_votes
from prefopt.judging.human.simulated import SimulatedRecipe, simulate, simulated_answer
from prefopt.judging.human.study import StudyRecipe, assign, study_hash, study_items
from prefopt.judging.human.votes import Checked, VotesRecipe, check_export, merge
from prefopt.judging.judge import Comparison
from prefopt.tables import read_table, write_table

VOTES = VotesRecipe(min_seconds=1.0, failed_checks_allowed=1, simulated=False)


def side(method: str, temperature: float | None = 0.0) -> dict[str, Any]:
    return {"method": method, "temperature": temperature}


def recipe(**changes: Any) -> StudyRecipe:
    values: dict[str, Any] = {
        **{"task": "tldr", "suffix": "\n\nTL;DR:", "title": "t", "question": "q", "shown": "s", "prompt_heading": "h"},
        "matchups": (
            {"first": side("dpo", 0.25), "second": side("ppo"), "items": 20, "raters_per_item": 2},
            {"first": side("dpo", 0.25), "second": side("reference", None), "items": 10, "raters_per_item": 1},
        ),
        **{"judgments_per_rater": 25, "swapped_repeats": 2, "attention_checks": 2, "seed": 3},
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
                    **{"prompt_id": f"p{i:02d}", "sample_index": 0, "method": method, "temperature": temperature},
                    **{"split": "test", "text": text, "tokens": 3, "token_ids": [1], "finish_reason": "eos"},
                    **{"logp": 0.0, "reference_logp": 0.0},
                }
            )
    return pd.DataFrame(samples), pd.DataFrame(prompts)


@pytest.fixture(scope="module")
def made() -> tuple[pd.DataFrame, pd.DataFrame, dict[str, list[dict[str, Any]]]]:
    samples, prompts = world()
    items, _ = study_items(samples, prompts, recipe())
    return items, prompts, assign(items, prompts, recipe())


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
    for method, rows in samples.groupby("method"):
        write_table(tmp_path / f"{method}.parquet", "samples", rows, prompts=written["content_hash"])
    parser = argparse.ArgumentParser()
    study.add_arguments(parser)
    values = {**recipe().__dict__, **changes}
    args = parser.parse_args(
        [
            *("--samples", str(tmp_path / "dpo.parquet"), str(tmp_path / "ppo.parquet")),
            *("--prompts", str(tmp_path / "prompts.parquet"), "--recipe", json.dumps(values)),
            *("--pages", str(tmp_path / "pages"), "--items", str(tmp_path / "items.parquet")),
            *("--key", str(tmp_path / "key.json")),
        ]
    )
    study.run(args)
    return args, json.loads((tmp_path / "key.json").read_text())


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
    return {"schema": study.SCHEMA, "study": study_hash(assignment), "task": "tldr", "raters": assignment}


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
    whole = check_export(export(key), key, VOTES, "f")
    early = check_export({**export(key), "votes": export(key)["votes"][:9]}, key, VOTES, "g")
    assert merge([early, whole]) == merge([whole, early]) == [whole]
    changed = Checked("r01", [{**whole.votes[0], "outcome": "loss"}], Counter(), whole.figures)
    with pytest.raises(UserError, match="Two files of rater 'r01'"):
        merge([whole, changed])


def run_votes(tmp_path: Path, *exports: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    votes.add_arguments(parser)
    args = parser.parse_args(
        [
            *("--exports", *map(str, exports), "--key", str(tmp_path / "key.json")),
            *("--items", str(tmp_path / "items.parquet"), "--recipe", json.dumps(VOTES.__dict__)),
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
    rows = read_table(tmp_path / "items.parquet", "study_items").to_dict("records")
    for row in rows:
        texts = (f" {row['first'].strip()} ", row["second"])
        straight = Comparison(row["prompt_id"], row["prompt"], "", *texts)
        turned = Comparison(row["prompt_id"], row["prompt"], "", *texts[::-1])
        expected = ["tie", "tie"] if row["item_id"] in shared else ["first", "second"]
        assert [verdict.winner for verdict in judge.compare([straight, turned])] == expected
    assert judge.compare([Comparison("p00", "", "", "same", " same ")])[0].winner == "tie"
    with pytest.raises(UserError, match=r"Nobody has voted on 1 of 1 pairs, those of the prompts 'p00'"):
        judge.compare([Comparison("p00", "", "", "a", "b")])


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: this is no JSON file"):
        run_votes(tmp_path, tmp_path / "bad.json")


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


def test_raters_cannot_be_simulated_without_hidden_facts(tmp_path: Path) -> None:
    _, key = files(tmp_path)
    items = read_table(tmp_path / "items.parquet", "study_items").assign(facts="")
    with pytest.raises(UserError, match="no hidden facts"):
        simulate(key, items, SIMULATED)
