from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from prefopt.data.formats.tldr import (
    parse_comparison,
    parse_demonstration,
    parse_post,
    parse_preference,
    raw_tables,
    tldr_prompt,
)
from prefopt.data.raw.parsing import RawTables, Unusable
from prefopt.data.raw.record import Malformed
from prefopt.data.raw.splits import content_hash
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


def written(number: int, gap: str = "\n\n", end: str = "") -> str:
    """A post in the task's format, with some white space between its parts and at its end."""
    return f"SUBREDDIT: r/cats{gap}TITLE: title {number}{gap}POST: café {number} is\n\n closed{gap}TL;DR:{end}"


WHITE = {
    "as published": lambda text: text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
    "U+2028": lambda text: text.replace("\n", "\u2028"),
    "one newline": lambda text: text.replace("\n\n", "\n"),
    "three newlines": lambda text: text.replace("\n\n", "\n\n\n"),
    "trailing spaces": lambda text: text.replace("\n\n", " \n \n") + " ",
    "one line": lambda text: " ".join(text.split()),
    "no-break spaces": lambda text: text.replace(" ", "\xa0"),
    "zero width": lambda text: "\ufeff" + text.replace("i", "i\u200b") + "\u200b",
    "NFD": lambda text: unicodedata.normalize("NFD", text),
}


@pytest.mark.parametrize("variant", WHITE)
def test_a_prompt_of_ones_own_is_the_post_that_it_is_written_from(variant: str) -> None:
    """Whatever white space it has, it is in one split with the published record, and named by its id."""
    posts = [post(number, post=f"café {number} is\n\n closed") for number in range(40)]
    own = [{"prompt": WHITE[variant](written(number)), "chosen": "a", "rejected": "b"} for number in range(40)]
    for gold_fraction in (0.0, 0.5):
        tables = build(posts=posts, preferences=own, gold_fraction=gold_fraction)
        assert [row["prompt_id"] for row in tables.preferences] == [f"t3_{number}" for number in range(40)]
        splits = {row["prompt_id"]: row["split"] for row in tables.demonstrations}
        assert (len(splits) == 40) is (gold_fraction == 0.0)
        for row in tables.preferences:
            assert splits.get(row["prompt_id"], row["split"]) == row["split"]
            assert row["prompt_id"] in splits or row["split"].startswith("gold_")


@pytest.mark.parametrize("variant", WHITE)
def test_variants_of_ones_own_prompts_are_one_prompt(variant: str) -> None:
    rows = [{"prompt": f"Summarize\n\ncafé {number}.", "response": "r"} for number in range(30)]
    others = [{"prompt": WHITE[variant](row["prompt"]), "chosen": "a", "rejected": "b"} for row in rows]
    tables = build(demonstrations=rows, preferences=others)
    for row, pair in zip(tables.demonstrations, tables.preferences, strict=True):
        assert (row["prompt_id"], row["split"]) == (pair["prompt_id"], pair["split"])
    again = build(demonstrations=[*rows, *({**row, "response": "s"} for row in others)])
    assert again.accounts["raw_demonstrations"].as_dict() == {
        **{"read": 60, "kept": 30, "dropped": {"duplicate_post": 30}},
    }


def test_equal_texts_under_other_titles_are_two_posts() -> None:
    rows = [post(1, id=None), post(2, id=None, post="post 1"), post(3, id=None, title="title 1")]
    assert len({row["prompt_id"] for row in build(posts=rows).demonstrations}) == 3


def test_a_post_without_an_id_is_found_by_its_text_in_other_white_space() -> None:
    crlf = comparison(1, post="caf\u00e9\r\n1", title="title\u00a01")
    del crlf["info"]["id"]
    tables = build(posts=[post(1, post="cafe\u0301\n\n1 ")], comparisons=[crlf])
    assert tables.preferences[0]["prompt_id"] == "t3_1"
    assert tables.preferences[0]["prompt"] == tldr_prompt("cats", "title\xa01", "café\n1")


@pytest.mark.parametrize(
    "end",
    [
        "\n\nTL;DR:",
        "\nTL;DR:",
        "\nTL;DR: ",
        "\n\n\nTL;DR:\n",
        " TL;DR:",
        "\r\n\r\nTL;DR:\r\n",
        "\n\nTL;DR:\u200b",
        "\xa0TL;DR:\xa0",
    ],
)
def test_the_last_line_is_the_one_that_no_cut_removes(end: str) -> None:
    parsed = parse_demonstration({"prompt": f"A text.\r\nOf two lines.{end}", "response": "r"}).post
    extra = "\n" if end.startswith("\n\n\n") else ""
    assert parsed.prompt == f"A text.\nOf two lines.{extra}\n\nTL;DR:"
    assert parsed.document == f"A text.\nOf two lines.{extra}"


def test_other_last_lines_are_left_alone_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    prompts = ("Summarize: x", "x\n\nTL;DR", "TL;DR: x", "x\n\ntl;dr:")
    rows = [{"prompt": prompt, "response": "r"} for prompt in prompts]
    for row in rows:
        parsed = parse_demonstration(row).post
        assert parsed.prompt == parsed.document == row["prompt"]
    build(posts=[post(1)])
    assert caplog.messages == []
    build(demonstrations=rows, posts=[post(1)])
    assert caplog.messages == [
        "warning: 4 of 5 prompts do not end with 'TL;DR:': one that is too long may lose its last line."
    ]


@pytest.mark.parametrize("gap", ["\n\n", "\n", " \n", " "])
def test_text_to_pretrain_on_is_without_the_format_in_whatever_white_space(gap: str) -> None:
    """A title that quotes the format's marks does not mislead it where lines tell them apart."""
    prompt = f"SUBREDDIT: r/cats{gap}TITLE: my POST: a cat{gap}POST: It sat.{gap}TL;DR:"
    document = parse_demonstration({"prompt": prompt, "response": "r"}).post.document
    assert document == ("my\n\na cat POST: It sat." if gap == " " else "my POST: a cat\n\nIt sat.")


@pytest.mark.parametrize("text", ["\u200b", "\xa0\n", "\ufeff \u2028"])
def test_text_that_shows_nothing_is_none(text: str) -> None:
    with pytest.raises(Unusable, match=r"^no_post$"):
        parse_post(post(1, post=text))
    with pytest.raises(Unusable, match=r"^no_post$"):
        parse_demonstration({"prompt": f"{text}\n\nTL;DR:", "response": "r"})
    with pytest.raises(Unusable, match=r"^empty_text$"):
        parse_preference({"prompt": "p", "chosen": "a", "rejected": text})


@pytest.mark.parametrize(("given", "post_id"), [(" t3_1\r\n", "t3_1"), ("", None), (" ", None), (None, None)])
def test_an_id_is_a_name_without_white_space_around_it(given: str | None, post_id: str | None) -> None:
    assert parse_post(post(1, id=given)).post.post_id == post_id


def test_a_text_of_nothing_but_marks_is_read_at_once() -> None:
    """No pattern here backtracks: a megabyte of what it looks for takes no longer than another."""
    for text in ("\n" * 10**6 + "x", "SUBREDDIT: r/" + "\n\nTITLE: \n\nPOST: " * 50_000, " \r\n" * 300_000 + "x"):
        assert parse_demonstration({"prompt": text, "response": "r"}).post.known_by
