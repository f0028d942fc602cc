from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from prefopt.data.raw import RawTables, Unusable
from prefopt.data.sources import Malformed
from prefopt.data.splits import content_hash
from prefopt.data.tldr import (
    parse_comparison,
    parse_demonstration,
    parse_post,
    parse_preference,
    raw_tables,
    tldr_prompt,
)
from prefopt.errors import UserError

SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


def post(number: int, **values: Any) -> dict[str, Any]:
    row = {"id": f"t3_{number}", "subreddit": "cats", "title": f"title {number}", "post": f"post {number}"}
    return {**row, "summary": f"summary {number}", **values}


def comparison(number: int, choice: Any = 0, **info: Any) -> dict[str, Any]:
    about = post(number)
    del about["summary"]
    summaries = [{"text": f" {side} {number}", "policy": side, "note": ""} for side in ("zero", "one")]
    return {"info": {**about, **info}, "summaries": summaries, "choice": choice, "extra": {"confidence": 3}}


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def named(rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"rows.jsonl:{number}", row) for number, row in enumerate(rows, start=1)]


def build(*, gold_fraction: float = 0.0, max_malformed: int = 0, **rows: Iterable[Any]) -> RawTables:
    records = {kind: named(content) for kind, content in rows.items()}
    return raw_tables(records, splits=SHARES, gold_fraction=gold_fraction, max_malformed=max_malformed)


def test_a_post() -> None:
    parsed = parse_post(post(1, post="\n line\n\nline \n", title=" t ", subreddit="r/AskReddit", summary="  s. "))
    assert parsed.post.prompt == "SUBREDDIT: r/AskReddit\n\nTITLE: t\n\nPOST: line\n\nline\n\nTL;DR:"
    assert parsed.post.document == "t\n\nline\n\nline"
    assert (parsed.post.post_id, parsed.response) == ("t3_1", " s.")


@pytest.mark.parametrize(("choice", "chosen", "rejected"), [(0, " zero 1", " one 1"), (1, " one 1", " zero 1")])
def test_the_choice_is_the_index_of_the_chosen(choice: int, chosen: str, rejected: str) -> None:
    pair = parse_comparison(comparison(1, choice))
    assert (pair.chosen, pair.rejected, pair.source) == (chosen, rejected, "comparisons")
    assert pair.post.prompt == tldr_prompt("cats", "title 1", "post 1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (comparison(1, post=None), "no_post"),
        (comparison(1, post=" \n"), "no_post"),
        (without(comparison(1), "info") | {"info": {"id": "x", "article": "news", "title": "t"}}, "no_post"),
        (comparison(1) | {"summaries": [{"text": " a"}, {"text": " "}]}, "empty_text"),
        (comparison(1) | {"summaries": [{"text": " a"}, {"text": "a\n"}]}, "equal_texts"),
    ],
)
def test_unusable_comparisons(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        parse_comparison(row)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (without(comparison(1), "choice"), "the field 'choice' is missing"),
        (comparison(1, 2), "'choice' is 2, which is neither 0 nor 1"),
        (comparison(1, -1), "'choice' is -1"),
        (comparison(1, True), "'choice' is True"),
        (comparison(1, "1"), "'choice' is '1'"),
        (comparison(1, None), "'choice' is None"),
        (without(comparison(1), "info"), "the field 'info' is missing"),
        (comparison(1) | {"info": "t3_1"}, "'info' is 't3_1', which is not an object"),
        (comparison(1) | {"info": {"id": "t3_1", "title": "t"}}, "the field 'post' is missing"),
        (comparison(1, title=None), "'title' is None, which is not text"),
        (comparison(1, post=["p"]), "'post' is .*, which is not text"),
        (comparison(1, id=17), "'id' is 17, which is not text"),
        (comparison(1) | {"summaries": [{"text": "a"}]}, "'summaries' is .*, which is not a list of two objects"),
        (comparison(1) | {"summaries": ["a", "b"]}, "'summaries' is .*, which is not a list of two objects"),
        (comparison(1) | {"summaries": [{"text": "a"}, {"policy": "p"}]}, "the field 'text' is missing"),
        (comparison(1, post="\ud83d cut"), "'post' holds half a character at position 0"),
    ],
)
def test_malformed_comparisons(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(Malformed, match=problem):
        parse_comparison(row)


def test_malformed_and_unusable_posts_and_rows_of_ones_own() -> None:
    for field in ("summary", "title", "subreddit", "post"):
        with pytest.raises(Malformed, match=f"the field '{field}' is missing"):
            parse_post(without(post(1), field))
    with pytest.raises(Unusable, match="empty_text"):
        parse_post(post(1, summary=""))
    with pytest.raises(Malformed, match="the field 'response' is missing"):
        parse_demonstration({"prompt": "p"})
    with pytest.raises(Malformed, match="'rejected' is None, which is not text"):
        parse_preference({"prompt": "p", "chosen": "c", "rejected": None})
    with pytest.raises(Unusable, match="no_post"):
        parse_demonstration({"prompt": " ", "response": "r"})
    with pytest.raises(Unusable, match="equal_texts"):
        parse_preference({"prompt": "p", "chosen": "c", "rejected": " c"})


def test_rows_of_ones_own() -> None:
    tables = build(
        demonstrations=[{"prompt": "Summarize: x ", "response": "y", "more": 1}],
        preferences=[{"prompt": "Summarize: x", "chosen": "a", "rejected": "b"}],
    )
    (demonstration,), (pair,) = tables.demonstrations, tables.preferences
    assert demonstration["prompt"] == pair["prompt"] == "Summarize: x"
    assert demonstration["prompt_id"] == pair["prompt_id"] == content_hash("Summarize: x")
    assert (demonstration["response"], demonstration["facts"]) == (" y", "")
    assert (pair["chosen"], pair["rejected"], pair["source"]) == (" a", " b", "preferences")
    assert demonstration["split"] == pair["split"]


def test_one_post_is_one_post_in_every_format() -> None:
    own = tldr_prompt("cats", "title 1", "post 1")
    tables = build(
        posts=[post(1)],
        comparisons=[comparison(1), without(comparison(1), "info") | {"info": without(post(1), "id", "summary")}],
        preferences=[{"prompt": own, "chosen": "a", "rejected": "b"}],
    )
    assert {row["prompt_id"] for row in tables.demonstrations + tables.preferences} == {"t3_1"}


def test_no_post_crosses_splits() -> None:
    comparisons = [comparison(number, number % 2) for number in range(100, 400) for _ in range(3)]
    tables = build(posts=[post(number) for number in range(300)], comparisons=comparisons, gold_fraction=0.4)
    splits = defaultdict(set)
    for row in tables.demonstrations + tables.preferences:
        splits[row["prompt_id"]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 400
    gold = {key for key, found in splits.items() if found <= {"gold_train", "gold_test"}}
    assert 90 < len(gold) < 150  # of 300 posts with pairs
    account = tables.accounts["raw_demonstrations"]
    assert account.dropped == {"reserved_for_gold": len(gold & {f"t3_{number}" for number in range(300)})}
    assert account.read == 300 == account.kept + account.dropped.total()
    assert tables.accounts["raw_preferences"].as_dict() == {"read": 900, "kept": 900, "dropped": {}}
    posts = tables.notes["posts"]
    assert posts["preferences"]["gold_train"] + posts["preferences"]["gold_test"] == len(gold)
    assert sum(posts["demonstrations"].values()) == len(tables.demonstrations)
    # All of a demonstration's posts that are not in the pairs stay, whatever the hash says of them.
    assert {f"t3_{number}" for number in range(100)} <= {row["prompt_id"] for row in tables.demonstrations}


def test_other_records_move_no_post() -> None:
    few = build(posts=[post(number) for number in range(50)])
    more = build(posts=[post(number) for number in reversed(range(100))], comparisons=[comparison(7)])
    splits = {row["prompt_id"]: row["split"] for row in more.demonstrations}
    assert all(splits[row["prompt_id"]] == row["split"] for row in few.demonstrations)


def test_a_pair_id_is_unique_and_does_not_depend_on_other_rows() -> None:
    rows = [comparison(1, 0), comparison(1, 1), comparison(2), comparison(1, 0), comparison(1, 0)]
    ids = [row["pair_id"] for row in build(comparisons=rows).preferences]
    assert len(set(ids)) == 5 and all(pair_id.startswith(("t3_1-", "t3_2-")) for pair_id in ids)
    assert [ids[3], ids[4]] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert {row["pair_id"] for row in build(comparisons=rows[::-1]).preferences} == set(ids)


def test_a_second_demonstration_of_a_post_is_dropped() -> None:
    tables = build(posts=[post(1), post(1, summary="other"), post(2)])
    assert [row["response"] for row in tables.demonstrations] == [" summary 1", " summary 2"]
    assert tables.accounts["raw_demonstrations"].as_dict() == {"read": 3, "kept": 2, "dropped": {"duplicate_post": 1}}


def test_pretraining_text_is_of_training_posts_alone() -> None:
    tables = build(
        posts=[post(number) for number in range(60)],
        comparisons=[comparison(number) for number in range(100, 160) for _ in range(2)],
        gold_fraction=0.5,
    )
    documents = tables.pretraining
    assert len(documents) == len(set(documents)) == tables.accounts["pretraining"].kept
    demonstrations = {row["prompt_id"][3:] for row in tables.demonstrations if row["split"] == "train"}
    pairs = {row["prompt_id"][3:] for row in tables.preferences if row["split"] == "train"}
    assert 0 < len(demonstrations) < 60 and 0 < len(pairs) < 60
    expected = {f"title {number}\n\npost {number}" for number in demonstrations | pairs}
    expected |= {f"summary {number}" for number in demonstrations}
    expected |= {f"{side} {number}" for number in pairs for side in ("zero", "one")}
    assert set(documents) == expected
    assert not any("TL;DR:" in text or "SUBREDDIT:" in text for text in documents)


def test_a_malformed_record_stops_with_file_and_line() -> None:
    rows = [post(1), without(post(2), "summary")]
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: the field 'summary' is missing; .*max_malformed, now 0\.$"):
        build(posts=rows)


def test_malformed_records_are_counted_up_to_the_limit_over_all_files() -> None:
    posts = [post(1), Malformed("the line is not JSON"), without(post(2), "title")]
    comparisons = [comparison(3, 2), comparison(4)]
    tables = build(posts=posts, comparisons=comparisons, max_malformed=3)
    assert tables.accounts["raw_demonstrations"].as_dict() == {"read": 3, "kept": 1, "dropped": {"malformed": 2}}
    assert tables.accounts["raw_preferences"].as_dict() == {"read": 2, "kept": 1, "dropped": {"malformed": 1}}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'choice' is 2.*now 2"):
        build(posts=posts, comparisons=comparisons, max_malformed=2)


def test_unusable_records_are_counted_and_do_not_stop() -> None:
    rows = [comparison(1), comparison(2, post=None), comparison(3, post=""), comparison(4)]
    rows[3]["summaries"][0]["text"] = rows[3]["summaries"][1]["text"]
    account = build(comparisons=rows).accounts["raw_preferences"]
    assert account.as_dict() == {"read": 4, "kept": 1, "dropped": {"equal_texts": 1, "no_post": 2}}
