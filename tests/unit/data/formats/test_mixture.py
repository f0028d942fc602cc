"""Sources to tables: every row accounted for, mixed as asked, and no prompt on two sides."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from prefopt.data.formats.mixture import Source, raw_tables
from prefopt.data.formats.recognise import Choices
from prefopt.data.raw.parsing import RawTables
from prefopt.errors import UserError

SPLITS = {"train": 0.5, "validation": 0.2, "test": 0.3}


def source(name: str, rows: list[Any], **values: Any) -> Source:
    records = [(f"{name}:{number}", row) for number, row in enumerate(rows, start=1)]
    options = {"format": None, "cells": False, "side": None, "weight": None, "count": None, **values}
    return Source(name=name, records=records, **options)


def build(
    *sources: Source, seed: int = 0, ties: str = "drop", gold_fraction: float = 0.0, max_malformed: int = 0
) -> RawTables:
    choices = Choices(rule="all", margin=0.0, ties=ties, seed=seed)
    tables = raw_tables(sources, choices, splits=SPLITS, gold_fraction=gold_fraction, max_malformed=max_malformed)
    for name, rows in (("raw_demonstrations", tables.demonstrations), ("raw_preferences", tables.preferences)):
        account = tables.accounts[name]
        assert account.read == account.kept + account.dropped.total() and account.kept == len(rows)
    for one in tables.notes["sources"]:
        assert one["rows"]["read"] == one["rows"]["kept"] + sum(one["rows"]["dropped"].values())
    return tables


def pair(number: int | str, **values: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {number}", "chosen": f"good {number}", "rejected": f"bad {number}", **values}


def told(tables: RawTables) -> list[tuple[Any, ...]]:
    return [
        (one["source"], one["format"], one["rows"]["read"], one["rows"]["dropped"], one["examples"], one["taken"])
        for one in tables.notes["sources"]
    ]


def test_every_row_says_its_source_and_is_accounted_for() -> None:
    tables = build(
        source("a", [pair(1), pair(2, rejected="good 2"), {"prompt": "p"}, pair(3)]),
        source("b", [{"prompt": "prompt 1", "response": "r"}, {"prompt": "prompt 9", "response": " "}]),
        source("c", [{"prompt": f"t{i % 2}", "completion": f"c{i}", "label": i < 2} for i in range(5)]),
        source("d", [{"prompt": "s", "responses": ["x", "y", "z"], "scores": [1, 2, 3]}]),
        max_malformed=1,
    )
    assert told(tables) == [
        ("a", "pairs", 4, {"equal_texts": 1, "malformed": 1}, 2, 2),
        ("b", "prompt_response", 2, {"empty_text": 1}, 1, 1),
        ("c", "thumbs", 5, {"unpaired": 1}, 2, 2),
        ("d", "scored", 1, {}, 3, 3),
    ]
    assert tables.accounts["raw_preferences"].as_dict() == {
        "read": 10,
        "kept": 7,
        "dropped": {"equal_texts": 1, "malformed": 1, "unpaired": 1},
    }
    assert tables.accounts["raw_demonstrations"].as_dict() == {"read": 2, "kept": 1, "dropped": {"empty_text": 1}}
    assert [row["source"] for row in tables.preferences] == ["a", "a", "c", "c", "d", "d", "d"]
    assert [row["source"] for row in tables.demonstrations] == ["b"]


def test_a_mixture_in_one_file_stops_with_file_and_line() -> None:
    with pytest.raises(UserError) as error:
        build(source("a.jsonl", [pair(1), pair(2), {"prompt": "p", "response": "r"}]))
    assert str(error.value) == (
        "a.jsonl:3: the row has the fields 'prompt', 'response', of the format 'prompt_response', and the first row is of "
        "the format 'pairs'; correct the record, or raise data.max_malformed, now 0."
    )
    with pytest.raises(
        UserError, match=r"^a\.csv:1: the row has the fields 'answer', 'question', which fit no format of docs"
    ):
        build(source("a.csv", [{"question": "q", "answer": "a"}]))


def test_chosen_responses_are_demonstrations_where_there_are_no_others() -> None:
    rows = [pair(1), pair(1, chosen="other"), pair(2)]
    tables = build(source("a", rows), source("p", [{"prompt": "prompt 2"}, {"prompt": "alone"}]))
    assert [(row["prompt"], row["response"], row["source"]) for row in tables.demonstrations] == [
        ("prompt 1", " good 1", "a"),
        ("prompt 2", " good 2", "a"),
        ("alone", "", "p"),
    ]
    assert tables.accounts["raw_demonstrations"].as_dict()["dropped"] == {"duplicate_prompt": 2}
    tables = build(source("a", rows), source("b", [{"prompt": "x", "response": "y"}]))
    assert [row["prompt"] for row in tables.demonstrations] == ["x"]


def test_no_prompt_is_on_two_sides_however_it_is_written() -> None:
    def variants(i: int) -> list[str]:
        return [f"Caf\u00e9 {i}?", f" Cafe\u0301\u00a0{i}? ", f"Caf\u00e9\r\n{i}?\u200b"]

    rows = [variants(i) for i in range(60)]
    tables = build(
        source("a", [pair(i, prompt=prompt) for i, (prompt, _, _) in enumerate(rows)]),
        source("b", [{"prompt": prompt, "response": "r"} for _, prompt, _ in rows]),
        source(
            "c",
            [
                {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"c {i}"}]}
                for i, (_, _, prompt) in enumerate(rows)
            ],
        ),
        gold_fraction=0.3,
    )
    splits: dict[str, set[str]] = {}
    for row in (*tables.preferences, *tables.demonstrations):
        splits.setdefault(row["prompt_id"], set()).add(row["split"].partition("_")[0])
    assert len(splits) == 60 and all(len(found) == 1 for found in splits.values())
    assert Counter(split for (split,) in splits.values()).keys() == {"train", "validation", "test", "gold"}
    assert len(tables.preferences) == 60 and len(tables.demonstrations) < 60


def test_a_conversation_is_known_by_all_turns_before_its_last_answer() -> None:
    def chat(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}

    tables = build(
        source(
            "a",
            [chat("a", "b", "c", "d"), chat(" a", "b ", "C".lower(), "e"), chat("a", "x", "c", "d"), chat("a", "b")],
        )
    )
    assert [row["prompt"] for row in tables.demonstrations] == [
        "User: a\n\nAssistant: b\n\nUser: c",
        "User: a\n\nAssistant: x\n\nUser: c",
        "a",
    ]
    assert tables.accounts["raw_demonstrations"].dropped == {"duplicate_prompt": 1}


def test_one_prompt_is_known_in_every_format() -> None:
    """A transcript of HH and the same turns as messages; a post of TL;DR with its id, its prompt, and as a message."""

    def chats(number: int) -> list[dict[str, str]]:
        texts = (f"a {number}?", "b", "c")
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]

    def transcript(number: int, answer: str) -> str:
        return f"\n\nHuman: a {number}?\n\nAssistant: b \n\nHuman: c\n\nAssistant: {answer}"

    def post(number: int) -> dict[str, Any]:
        return {"id": f"t3_{number}", "subreddit": "s", "title": f"t {number}", "post": "p", "summary": "u"}

    def prompt(number: int) -> str:
        return f"SUBREDDIT: r/s\nTITLE: t {number}\nPOST: p\nTL;DR:"

    numbers = range(30)
    tables = build(
        source("hh", [{side: transcript(i, side) for side in ("chosen", "rejected")} for i in numbers]),
        source("chats", [{"messages": [*chats(i), {"role": "assistant", "content": "d"}]} for i in numbers]),
        source("posts", [post(i) for i in numbers]),
        source("prompts", [pair(i, prompt=prompt(i)) for i in numbers]),
        source("messages", [{"prompt": [{"role": "user", "content": prompt(i)}], "response": "r"} for i in numbers]),
    )
    assert Counter(row["source"] for row in tables.demonstrations) == {"chats": 30, "posts": 30}
    assert tables.accounts["raw_demonstrations"].dropped == {"duplicate_prompt": 30}
    known = {row["source"]: {} for row in (*tables.demonstrations, *tables.preferences)}
    for row in (*tables.demonstrations, *tables.preferences):
        known[row["source"]][row["prompt_id"]] = row["split"]
    assert known["hh"] == known["chats"] and known["posts"] == known["prompts"]
    assert tables.preferences[0]["prompt"] == "\n\nHuman: a 0?\n\nAssistant: b \n\nHuman: c\n\nAssistant:"
    assert any(text.startswith("Human: a ") for text in tables.pretraining)


def test_a_source_with_a_weight_has_examples() -> None:
    with pytest.raises(
        UserError, match=r"^b has a weight and no example: leave it out, or see why its rows are dropped\.$"
    ):
        build(source("a", [pair(1)], weight=1), source("b", [pair(1, chosen=" ")], weight=1))


def splits_of(tables: RawTables, name: str) -> Counter[str]:
    return Counter(row["split"] for row in (*tables.preferences, *tables.demonstrations) if row["source"] == name)


def test_a_sources_own_test_split_is_the_test_split() -> None:
    own = [pair(i) for i in range(200)]
    held_out = [pair(i) for i in range(190, 220)]
    tables = build(source("train", own, side="train"), source("test", held_out, side="test"), gold_fraction=0.2)
    test = {row["prompt"] for row in tables.preferences if row["split"] == "test"}
    assert test == {f"prompt {i}" for i in range(190, 220)}
    found = splits_of(tables, "train")
    assert found["test"] == 20 and found["train"] / found["validation"] == pytest.approx(2.5, rel=0.4)
    assert found["gold_train"] + found["gold_test"] > 20
    assert set(splits_of(tables, "test")) == {"test"}


def test_prompts_alone_are_evaluated_on() -> None:
    alone = [{"prompt": f"prompt {i}"} for i in range(150)]
    tables = build(source("a", [pair(i) for i in range(100, 300)]), source("p", alone), gold_fraction=0.2)
    rows = [row for row in (*tables.demonstrations, *tables.preferences) if int(row["prompt"].split()[1]) < 150]
    found = Counter(row["split"] for row in rows)
    assert set(found) == {"validation", "test"} and found["test"] / found["validation"] == pytest.approx(1.5, rel=0.4)
    assert Counter(row["response"] == "" for row in tables.demonstrations)[True] == 100
    tables = build(source("p", alone, side="test"))
    assert splits_of(tables, "p") == {"test": 150} and tables.pretraining == []
    with pytest.raises(
        UserError, match=r"^p holds prompts alone, on which nothing is trained: set its as to test, or leave"
    ):
        build(source("p", alone, side="train"))


def taken(tables: RawTables) -> list[int]:
    return [one["taken"] for one in tables.notes["sources"]]


def test_sources_mix_by_weight_as_far_as_the_scarcest_allows() -> None:
    first, second, third = (
        [pair(f"{name}{i}") for i in range(count)] for name, count in (("a", 90), ("b", 30), ("c", 7))
    )
    for weights, expected in (((1, 1), [30, 30]), ((2, 1), [60, 30]), ((0.3, 0.1), [90, 30]), ((9, 1), [90, 10])):
        a, b = weights
        tables = build(source("a", first, weight=a), source("b", second, weight=b), source("c", third))
        assert taken(tables) == [*expected, 7]
        left = 120 - sum(expected)
        assert tables.accounts["raw_preferences"].dropped == ({"left_out_by_mixing": left} if left else {})
    assert taken(build(source("a", first, count=5), source("c", third, count=9))) == [5, 7]


def test_what_is_taken_hangs_on_the_seed_and_not_on_the_order() -> None:
    rows = [pair(i) for i in range(90)]
    first = build(source("a", rows, count=20)).preferences
    again = build(source("a", rows[::-1], count=20)).preferences
    assert {row["pair_id"] for row in first} == {row["pair_id"] for row in again}
    assert [row["prompt"] for row in first] == [row["prompt"] for row in again][::-1]
    other = build(source("a", rows, count=20), seed=1).preferences
    assert {row["pair_id"] for row in first} != {row["pair_id"] for row in other}


def test_thumbs_are_paired_before_they_are_mixed() -> None:
    rows = [
        {"prompt": f"p{i}", "completion": f"{label}{i}", "label": label} for label in (True, False) for i in range(9)
    ]
    tables = build(source("a", rows, count=4))
    assert told(tables) == [("a", "thumbs", 18, {}, 9, 4)]


def thumb(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_thumbs_in_no_pair_are_labels() -> None:
    rows = [thumb("p", "a", True), thumb("p", "b", False), thumb("P ", "c", False), thumb("q", "d", True)]
    tables = build(source("a", rows), source("b", [thumb("p", "c", False)]))
    found = [[row[key] for key in ("prompt", "completion", "label", "source")] for row in tables.labels]
    # White space at the ends of a prompt is no part of it.
    assert found == [["P", " c", False, "a"], ["q", " d", True, "a"], ["p", " c", False, "b"]]
    assert [row["chosen"] for row in tables.preferences] == [" a"]
    assert len({row["example_id"] for row in tables.labels}) == 3
    split = {row["prompt"]: row["split"] for row in (*tables.labels, *tables.preferences)}
    assert split["p"] == tables.preferences[0]["split"]
    # What pleased is a demonstration, in a pair or not, where there are no others.
    assert [row["response"] for row in tables.demonstrations] == [" a", " d"]


def test_a_label_that_comes_twice_has_a_name_of_its_own() -> None:
    tables = build(source("a", [thumb("q", "d", True)] * 2 + [thumb("q", "d", False)]))
    first, second, other = (row["example_id"] for row in tables.labels)
    assert second == f"{first}-2" and other.endswith("-down") and first.endswith("-up")


def test_no_thumb_of_a_prompt_of_the_gold_judge_is_learned_from() -> None:
    rows = [one for i in range(40) for one in (thumb(f"p{i}", "a", True), thumb(f"p{i}", "b", False))]
    more = [thumb(f"p{i}", "c", True) for i in range(50)]
    tables = build(source("a", rows), source("b", more), gold_fraction=0.5)
    gold = {row["prompt"] for row in tables.preferences if row["split"].startswith("gold_")}
    assert 10 < len(gold) < 30
    assert {row["prompt"] for row in tables.labels if row["split"].startswith("gold_")} == gold


def test_single_thumbs_are_taken_as_the_pairs_are() -> None:
    rows = [one for i in range(8) for one in (thumb(f"p{i}", "a", True), thumb(f"p{i}", "b", False))]
    rows += [thumb(f"q{i}", "c", i % 2 == 0) for i in range(20)]
    tables = build(source("a", rows, count=2))
    assert len(tables.preferences) == 2 and len(tables.labels) == 5, "a quarter of each"
    assert tables.accounts["raw_labels"].as_dict() == {"read": 20, "kept": 5, "dropped": {"left_out_by_mixing": 15}}
    assert tables.notes["sources"][0]["single_thumbs_taken"] == 5
    # Without any pair they are what is counted and weighed.
    assert len(build(source("a", rows[16:], count=7)).labels) == 7
    tables = build(source("a", rows[16:], weight=1.0), source("b", [pair(i) for i in range(5)], weight=1.0))
    assert (len(tables.labels), len(tables.preferences)) == (5, 5)


def test_ties_are_counted_or_prefer_neither() -> None:
    rows = [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": winner} for winner in ("tie", "a")]
    tables = build(source("a", rows))
    assert told(tables) == [("a", "winner", 2, {"tie": 1}, 1, 1)]
    tables = build(source("a", rows), ties="both")
    assert [(row["chosen"], row["rejected"]) for row in tables.preferences] == [
        (" x", " y"),
        (" y", " x"),
        (" x", " y"),
    ]
    assert len({row["pair_id"] for row in tables.preferences}) == 3
