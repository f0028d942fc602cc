"""Transcripts of Anthropic HH, nasty ones among them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from prefopt.data.formats.hh import Pair, parse_pair, raw_tables
from prefopt.data.raw.parsing import Unusable
from prefopt.data.raw.record import Malformed
from prefopt.data.raw.sources import read_rows
from prefopt.data.raw.splits import content_hash
from prefopt.errors import UserError

DATA = Path(__file__).parents[5] / "shared" / "data" / "hh_helpful_base.jsonl.gz"
SPLITS = {"train": 0.6, "validation": 0.2, "test": 0.2}
ASK = "\n\nHuman: How do I boil an egg?\n\nAssistant:"


def test_the_prompt_is_shared_and_ends_with_the_assistants_name() -> None:
    pair = parse_pair({"chosen": f"{ASK} Seven minutes.", "rejected": f"{ASK} No idea.\n"})
    assert pair == Pair(ASK, " Seven minutes.", " No idea.")
    assert pair.turns == 1


def test_earlier_turns_belong_to_the_prompt() -> None:
    start = f"{ASK} Soft or hard?\n\nHuman: Hard.\n\nAssistant:"
    pair = parse_pair({"chosen": f"{start} Ten minutes.", "rejected": f"{start} Three."})
    assert pair.prompt == start and pair.turns == 2


def test_a_transcript_that_lost_its_first_empty_line_is_read() -> None:
    pair = parse_pair({"chosen": f"{ASK.strip()} Yes.", "rejected": f"{ASK} No."})
    assert pair.prompt == ASK


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{ASK} Same.", f"{ASK} Same. ", "equal"),
        (f"{ASK} Same.", f"{ASK}  Same.", "equal"),
        (f"{ASK} a\n\nHuman: x\n\nAssistant: b", f"{ASK} c\n\nHuman: x\n\nAssistant: d", "differ_before_last_turn"),
        # The rejected one is shorter than the chosen one's prompt.
        (f"{ASK} a\n\nHuman: x\n\nAssistant: b", f"{ASK} c", "differ_before_last_turn"),
        ("\n\nHuman: hello", "\n\nHuman: hello there", "no_assistant_turn"),
        (f"{ASK} a\n\nHuman: thanks", f"{ASK} b\n\nHuman: thanks", "ends_with_human"),
        (f"{ASK}", f"{ASK} b", "empty_last_turn"),
        (f"{ASK} a", f"{ASK}   \n", "empty_last_turn"),
        # What is quoted after an empty line reads as a turn, so the transcripts differ before the last.
        (f"{ASK} It says:\n\nHuman: no\n\nAssistant: yes", f"{ASK} ok", "differ_before_last_turn"),
    ],
)
def test_unusable_pairs_have_a_reason(chosen: str, rejected: str, reason: str) -> None:
    with pytest.raises(Unusable, match=f"^{reason}$"):
        parse_pair({"chosen": chosen, "rejected": rejected})


def test_a_name_within_a_line_is_no_turn() -> None:
    text = ' He wrote "Human: yes"\nAssistant: is a word.'
    assert parse_pair({"chosen": f"{ASK}{text}", "rejected": f"{ASK} b"}).chosen == text


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"{ASK} a"},
        {"chosen": 1, "rejected": "x"},
        {"chosen": "a", "rejected": "b"},
        {"chosen": f" {ASK} a", "rejected": f" {ASK} b"},
    ],
)
def test_malformed_records(row: dict[str, object]) -> None:
    with pytest.raises(Malformed):
        parse_pair(row)
    with pytest.raises(UserError, match=r"^f:1: .*raise data\.max_malformed, now 0\.$"):
        raw_tables([("f:1", row)], splits=SPLITS, gold_fraction=0.0, max_malformed=0)


def test_every_pair_is_accounted_for_and_evaluation_is_on_single_turns() -> None:
    rows = []
    for i in range(200):
        start = f"\n\nHuman: question {i}\n\nAssistant:"
        if i % 2:
            start += " what?\n\nHuman: again\n\nAssistant:"
        rows.append((f"f:{i}", {"chosen": f"{start} good", "rejected": f"{start} bad"}))
    rows += [("f:a", rows[0][1]), ("f:b", {"chosen": f"{ASK} x", "rejected": f"{ASK} x"})]
    tables = raw_tables(rows, splits=SPLITS, gold_fraction=0.25, max_malformed=0)
    for name, content in (("raw_preferences", tables.preferences), ("raw_demonstrations", tables.demonstrations)):
        account = tables.accounts[name]
        assert account.kept == len(content) and account.read == account.kept + account.dropped.total()
    assert tables.accounts["raw_preferences"].dropped == {"equal": 1, "duplicate_pair": 1}
    assert tables.accounts["raw_demonstrations"].read == 201
    more = [row for row in tables.preferences if row["split"] in ("validation", "test") and "again" in row["prompt"]]
    gold = [row for row in tables.preferences if row["split"].startswith("gold_")]
    reasons = {"more_than_one_turn": len(more), "reserved_for_gold": len(gold), "duplicate_prompt": 1}
    assert more and tables.accounts["raw_demonstrations"].dropped == reasons
    held_out = [row for row in tables.demonstrations if row["split"] != "train"]
    assert held_out and all(row["prompt"].count("\n\nHuman:") == 1 for row in held_out)
    splits = {row["prompt_id"]: row["split"] for row in tables.preferences}
    assert {row["split"] for row in tables.preferences} == {"train", "validation", "test", "gold_train", "gold_test"}
    assert all(splits[row["prompt_id"]] == row["split"] for row in tables.demonstrations)
    # Training demonstrations have any number of turns; the text to pretrain on is of the training split alone.
    training = [row for row in tables.preferences if row["split"] == "train"]
    trained = [row for row in tables.demonstrations if row["split"] == "train"]
    assert {row["prompt"].count("\n\nHuman:") for row in trained} == {1, 2} and len(trained) == len(training)
    assert tables.pretraining == [f"{row['prompt'].strip()} good" for row in training]
    assert all(row["response"] == " good" for row in tables.demonstrations)


@pytest.mark.parametrize("variant", ["CRLF", "spaces", "zero width", "NFD"])
def test_a_prompt_in_other_white_space_is_the_same_prompt(variant: str) -> None:
    change = {
        "CRLF": lambda text: text.replace("\n", "\r\n"),
        "spaces": lambda text: text.replace("? ", "?\xa0 \n"),
        "zero width": lambda text: text.replace("q", "\u200bq"),
        "NFD": lambda text: unicodedata.normalize("NFD", text),
    }[variant]
    rows = []
    for i in range(100):
        prompt = f"\n\nHuman: Où? question {i}\n\nAssistant:"
        pair = {"chosen": f"{prompt} good", "rejected": f"{prompt} bad"}
        rows += [(f"f:{i}", pair), (f"g:{i}", {name: change(text) + " or so" for name, text in pair.items()})]
    tables = raw_tables(rows, splits=SPLITS, gold_fraction=0.25, max_malformed=0)
    assert len(tables.preferences) == 200
    for first, second in zip(tables.preferences[::2], tables.preferences[1::2], strict=True):
        assert (first["prompt_id"], first["split"]) == (second["prompt_id"], second["split"])
        assert second["prompt"].endswith("\n\nAssistant:") and "\r" not in second["prompt"]
    gold = sum(row["split"].startswith("gold_") for row in tables.preferences[::2])
    dropped = tables.accounts["raw_demonstrations"].dropped
    assert 0 < gold < 100 and dropped == {"reserved_for_gold": 2 * gold, "duplicate_prompt": 100 - gold}
    # A prompt of one form keeps the name that it had.
    (alone,) = raw_tables(rows[:1], splits=SPLITS, gold_fraction=0.0, max_malformed=0).preferences
    assert alone["prompt_id"] == content_hash("\n\nHuman: Où? question 0\n\nAssistant:")


def test_a_copy_in_other_white_space_is_a_duplicate_and_other_completions_are_not() -> None:
    pairs = [("a b", "c"), ("a  b\r\n", "c\u200b"), ("a b", "c d"), ("ab", "c"), ("a", "b c"), ("c", "a b")]
    rows = [(f"f:{i}", {"chosen": f"{ASK} {x}", "rejected": f"{ASK} {y}"}) for i, (x, y) in enumerate(pairs)]
    tables = raw_tables(rows, splits=SPLITS, gold_fraction=0.0, max_malformed=0)
    assert [(row["chosen"], row["rejected"]) for row in tables.preferences] == [
        *((" a b", " c"), (" a b", " c d"), (" a", " b c"), (" c", " a b")),
    ]
    assert tables.accounts["raw_preferences"].as_dict() == {"read": 6, "kept": 4, "dropped": {"duplicate_pair": 2}}


def test_a_turn_that_shows_nothing_is_empty() -> None:
    with pytest.raises(Unusable, match=r"^empty_last_turn$"):
        parse_pair({"chosen": f"{ASK} a", "rejected": f"{ASK} \u200b"})


@pytest.mark.skipif(not DATA.is_file(), reason="the real records (../shared/data) are not here")
def test_real_records() -> None:
    tables = raw_tables(read_rows([DATA]), splits=SPLITS, gold_fraction=0.3, max_malformed=0)
    account = tables.accounts["raw_preferences"]
    assert account.read == 1678 == len(tables.preferences) + account.dropped.total()
    assert account.dropped == {"differ_before_last_turn": 5, "empty_last_turn": 3}
    turns = Counter(row["prompt"].count("\n\nHuman:") for row in tables.preferences)
    assert turns[1] > 400 and max(turns) > 3
    for row in tables.preferences:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in row["chosen"] + row["rejected"]
