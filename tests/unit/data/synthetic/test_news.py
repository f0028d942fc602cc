"""News, real and embedded."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.data.formats import cnn_dailymail
from prefopt.data.raw.record import Malformed
from prefopt.data.raw.sources import read_rows
from prefopt.data.raw.splits import content_hash, position
from prefopt.data.synthetic import news, world
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer

DATA = Path(__file__).parents[5] / "shared" / "data" / "cnn_dailymail.jsonl.gz"
SHIPPED = Path(__file__).parents[4] / "workflow" / "models" / "tldr_base"
VALUES = {"seed": 0, "validation_prompts": 5, "test_prompts": 30}


def test_articles_become_prompts_once_each() -> None:
    rows = [
        ("f:1", {"article": " A dog barked. It was loud. ", "highlights": "Dog barks"}),
        ("f:2", {"article": "A dog barked. It was loud.", "highlights": "again"}),
        ("f:3", {"article": "Nothing", "highlights": " "}),
        ("f:4", Malformed("no JSON")),
    ]
    tables = cnn_dailymail.raw_tables(rows, validation_share=0.2, max_malformed=1)
    (row,) = tables.demonstrations
    prompt = "SUBREDDIT: r/news\n\nTITLE: A dog barked.\n\nPOST: A dog barked. It was loud.\n\nTL;DR:"
    assert (row["prompt"], row["response"]) == (prompt, " Dog barks")
    account = tables.accounts["raw_demonstrations"].as_dict()
    assert account == {"read": 4, "kept": 1, "dropped": {"duplicate_article": 1, "empty_text": 1, "malformed": 1}}
    assert tables.preferences == [] and tables.pretraining == [] and row["facts"] == ""
    statement = "Real records, not synthetic; nothing is trained on them."
    assert tables.notes == {"synthetic": False, "statement": statement}
    with pytest.raises(UserError, match=r"^f:1: the field 'article' is missing; "):
        cnn_dailymail.raw_tables([("f:1", {})], validation_share=0.2, max_malformed=0)


def test_an_article_in_other_white_space_is_the_same_article() -> None:
    texts = ["One caf\u00e9.\n\nTwo.", "One caf\u00e9.\r\nTwo.", "One cafe\u0301. Two.\xa0", "One.Two."]
    rows = [(f"f:{i}", {"article": text, "highlights": "short"}) for i, text in enumerate(texts)]
    tables = cnn_dailymail.raw_tables(rows, validation_share=0.2, max_malformed=0)
    names = [content_hash(text) for text in (texts[0], "One caf\u00e9.\nTwo.", "One cafe\u0301. Two.")]
    assert [row["prompt_id"] for row in tables.demonstrations] == [min(names), content_hash("One.Two.")]
    assert tables.demonstrations[0]["prompt"] == cnn_dailymail.news_prompt(texts[0])
    (copy,) = cnn_dailymail.raw_tables(rows[1:2], validation_share=0.2, max_malformed=0).demonstrations
    assert copy["prompt"] == "SUBREDDIT: r/news\n\nTITLE: One caf\u00e9.\n\nPOST: One caf\u00e9.\nTwo.\n\nTL;DR:"
    assert tables.accounts["raw_demonstrations"].dropped == {"duplicate_article": 2}


def test_the_title_is_the_first_sentence_and_no_longer_than_a_line() -> None:
    for article, title in (
        ("Who? I. You.", "Who?"),
        ("No end", "No end"),
        ("Line!\nTwo.", "Line!"),
        ("x" * 300, "x" * 120),
    ):
        assert cnn_dailymail.news_prompt(f" {article}\n").splitlines()[2] == f"TITLE: {title}"


def test_a_share_of_the_articles_is_for_validation() -> None:
    rows = [(f"f:{i}", {"article": f"article {i}", "highlights": "short"}) for i in range(400)]
    found = cnn_dailymail.raw_tables(rows, validation_share=0.2, max_malformed=0).demonstrations
    assert [row["split"] for row in found] == [
        "validation" if position("split", content_hash(f"article {i}")) < 0.2 else "test" for i in range(400)
    ]


def test_embedded_articles_tell_the_facts_in_other_words() -> None:
    tables = news.generate(VALUES)
    assert len(tables.demonstrations) == 35
    assert tables.demonstrations == news.generate(VALUES).demonstrations
    assert {name: account.as_dict() for name, account in tables.accounts.items()} == {
        "raw_demonstrations": {"read": 35, "kept": 35, "dropped": {}},
        "raw_preferences": {"read": 0, "kept": 0, "dropped": {}},
        "pretraining": {"read": 0, "kept": 0, "dropped": {}},
    }
    assert tables.notes["synthetic"] is True
    for row in tables.demonstrations:
        assert world.quality(row["facts"], row["response"]).well_formed
        # What a summary says must be found in the article.
        for slot in ("cause", "feeling"):
            last_word = next(clause for clause in [world_facts(row)[slot]]).split()[-1]
            assert last_word in row["prompt"]
        assert row["prompt"].startswith("SUBREDDIT: r/news") and row["prompt"].endswith("\n\nTL;DR:")


def world_facts(row: dict[str, str]) -> dict[str, str]:
    import json

    facts: dict[str, str] = json.loads(row["facts"])
    return facts


def test_the_shipped_base_reads_every_article_whole() -> None:
    tokenizer = load_tokenizer(SHIPPED)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in news.generate(VALUES).demonstrations]
    assert max(lengths) <= 192


@pytest.mark.skipif(not DATA.is_file(), reason="the real records (../shared/data) are not here")
def test_real_records() -> None:
    tables = cnn_dailymail.raw_tables(read_rows([DATA]), validation_share=0.2, max_malformed=0)
    account = tables.accounts["raw_demonstrations"]
    assert account.read == 709 == len(tables.demonstrations) + account.dropped.total()
    splits = [row["split"] for row in tables.demonstrations]
    assert set(splits) == {"validation", "test"} and 90 < splits.count("validation") < 190
