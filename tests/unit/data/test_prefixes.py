"""Prompts of a review's first tokens."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefopt.data import prefixes
from prefopt.data.prepare import encode_all
from prefopt.data.raw.splits import position
from prefopt.data.synthetic.review_world import write_review
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer, save_model, tokenizer_hash
from prefopt.store.tables import read_table, write_table
from prefopt.training.pretrain import PretrainRecipe, new_model, train_tokenizer

RECIPE = prefixes.PrefixesRecipe(min_prefix=2, max_prefix=8, max_length=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import random

    texts = [write_review(random.Random(i)) for i in range(50)]
    tokenizer = train_tokenizer(texts, 350)
    shape: dict[str, Any] = {"vocab_size": 350, "hidden_size": 8, "intermediate_size": 8, "layers": 1, "heads": 1}
    rest: dict[str, Any] = dict.fromkeys(PretrainRecipe.__dataclass_fields__, 0) | shape
    path = tmp_path_factory.mktemp("base") / "base"
    recipe = PretrainRecipe(**{**rest, "max_positions": 32, "initializer_range": 0.02})
    save_model(path, new_model(recipe, tokenizer), tokenizer, {})
    return path


def review(name: str, text: str, **values: Any) -> dict[str, Any]:
    return {"review_id": name, "text": text, "label": 1, "split": "train", **values}


def test_prompt_and_response_are_the_review_and_an_uncut_one_ends(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    text = "the plot was superb . what a dull hero !"
    rows, dropped, cut = prefixes.split_reviews(tokenizer, [review("a", text), review("b", text * 3)], RECIPE)
    short, long = rows
    assert short["prompt"] + short["response"] == text
    assert short["response_ids"][-1] == tokenizer.eos_token_id
    assert len(long["prompt_ids"]) + len(long["response_ids"]) == 24
    assert tokenizer.eos_token_id not in long["response_ids"]
    assert cut == 1 and not dropped
    assert 2 <= len(short["prompt_ids"]) <= 8


def test_a_review_of_exactly_its_prefix_or_the_greatest_length(model: Path) -> None:
    """Nothing would be left to write after the one; the other is whole, its end included."""
    tokenizer = load_tokenizer(model)
    text = "the plot was superb . what a dull hero !"
    tokens = len(encode_all(tokenizer, [text])[0])
    recipe = prefixes.PrefixesRecipe(min_prefix=tokens, max_prefix=tokens, max_length=99)
    assert prefixes.split_reviews(tokenizer, [review("a", text)], recipe) == ([], {"too_short": 1}, 0)
    for longest, cut in ((tokens + 1, 0), (tokens, 1)):
        recipe = prefixes.PrefixesRecipe(min_prefix=2, max_prefix=2, max_length=longest)
        ((row,), dropped, found) = prefixes.split_reviews(tokenizer, [review("a", text)], recipe)
        assert (found, dropped) == (cut, {}) and len(row["response_ids"]) == longest - 2
        assert (row["response_ids"][-1] == tokenizer.eos_token_id) is (cut == 0)


def test_a_review_of_either_label_keeps_its_split_and_its_own_prefix(model: Path) -> None:
    text = "the plot was superb . what a dull hero ! the plot was dull ."
    rows = [review(f"r{i}", text, label=i % 2, split=("train", "test")[i // 2 % 2]) for i in range(20)]
    kept, dropped, _ = prefixes.split_reviews(load_tokenizer(model), rows, RECIPE)
    assert not dropped and [(row["prompt_id"], row["split"]) for row in kept] == [
        (row["review_id"], row["split"]) for row in rows
    ]
    assert [len(row["prompt_ids"]) for row in kept] == [2 + int(position("prefix", f"r{i}") * 7) for i in range(20)]


def test_every_column_of_a_row_and_what_is_dropped(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    text = "the plot was superb . what a dull hero ! the plot was dull ."
    rows = [
        *(review("r", text, split="validation", label=0), review("special", text), review("none", text, label=-1)),
        *(review("s", "the"), review("special2", "a"), review("none2", text, label=-1)),
    ]
    recipe = prefixes.PrefixesRecipe(min_prefix=3, max_prefix=3, max_length=8)
    kept, dropped, cut = prefixes.split_reviews(tokenizer, rows, recipe, {"special", "special2"})
    ids = encode_all(tokenizer, [text])[0]
    assert kept == [
        {
            **{"prompt_id": "r", "prompt": tokenizer.decode(ids[:3]), "response": tokenizer.decode(ids[3:8])},
            **{"split": "validation", "facts": "", "prompt_ids": ids[:3], "response_ids": ids[3:8]},
        }
    ]
    # A review that holds a special token is counted as such, however short it is.
    assert dropped == {"unlabelled": 2, "special_token_in_text": 2, "too_short": 1} and cut == 1
    assert text.startswith(kept[0]["prompt"] + kept[0]["response"])


def test_the_length_of_a_prefix_is_its_reviews_own() -> None:
    recipe = prefixes.PrefixesRecipe(min_prefix=3, max_prefix=9, max_length=99)
    for name in ("a", "b", "review-12"):
        assert prefixes.prefix_length(name, recipe) == 3 + int(position("prefix", name) * 7)
    fixed = prefixes.PrefixesRecipe(min_prefix=4, max_prefix=4, max_length=99)
    assert {prefixes.prefix_length(f"r{i}", fixed) for i in range(50)} == {4}


def test_every_length_of_prefix_is_about_as_frequent() -> None:
    counts = Counter(prefixes.prefix_length(f"review-{i}", RECIPE) for i in range(7000))
    assert sorted(counts) == [2, 3, 4, 5, 6, 7, 8]
    assert all(880 < count < 1120 for count in counts.values())


def test_short_and_unlabelled_reviews_are_dropped_and_counted(model: Path) -> None:
    rows = [review("a", "the"), review("b", "the plot was superb . the plot was dull .", label=-1)]
    kept, dropped, _ = prefixes.split_reviews(load_tokenizer(model), rows, RECIPE)
    assert kept == [] and dropped == {"too_short": 1, "unlabelled": 1}


def test_the_stage_accounts_for_every_review(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "the plot was superb . the plot was dull ."
    rows = [review(split, text, split=split) for split in ("train", "validation", "test")]
    account = {"read": 4, "kept": 3, "dropped": {"duplicate_text": 1}}
    facts = {"account": account, "recipe": {"source": "embedded"}}
    write_table(tmp_path / "reviews.parquet", "raw_reviews", [*rows, review("s", "a")], **facts)
    values = {"min_prefix": 2, "max_prefix": 8, "max_length": 24}
    arguments = {"task": "imdb", "reviews": tmp_path / "reviews.parquet", "model": model}
    arguments |= {name: tmp_path / "out" / f"{name}.parquet" for name in ("demonstrations", "prompts")}
    arguments["summary"] = tmp_path / "out" / "summary.json"
    prefixes.run(argparse.Namespace(**arguments, recipe=json.dumps(values)))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["raw"] == account
    assert (summary["task"], summary["synthetic"]) == ("imdb", True)
    assert summary["warnings"] == [
        "1 of 4 records of reviews (25%) are lost: they have nothing left after the prefix; lower "
        "tasks.imdb.lengths.max_prefix."
    ]
    assert summary["warnings"][0] in caplog.text
    assert summary["reviews"]["read"] == 4 == summary["reviews"]["kept"] + sum(summary["reviews"]["dropped"].values())
    prompts = read_table(tmp_path / "out" / "prompts.parquet", "prompts", tokenizer_hash=tokenizer_hash(model))
    assert set(prompts["split"]) == {"train", "validation", "test"}
    demonstrations = read_table(
        *(tmp_path / "out" / "demonstrations.parquet", "demonstrations"),
        **{"tokenizer_hash": tokenizer_hash(model), "recipe": values, "summary": summary["reviews"]},
        reviews=read_table(tmp_path / "reviews.parquet", "raw_reviews").attrs["manifest"]["content_hash"],
    )
    # A prompt's reference is what the review goes on with.
    assert prompts["reference"].tolist() == demonstrations["response"].tolist()
    assert (prompts["prompt"] + prompts["reference"]).tolist() == [text] * 3
    shared = ["prompt_id", "prompt", "split", "facts"]
    assert prompts[shared].equals(demonstrations[shared])
    assert [ids.tolist() for ids in prompts["prompt_ids"]] == [ids.tolist() for ids in demonstrations["prompt_ids"]]
    assert prompts.attrs["manifest"]["summary"] == summary["reviews"]
    assert summary["reviews"] == {
        **{"read": 4, "kept": 3, "dropped": {"too_short": 1}, "responses_cut": 0},
        "splits": {"test": 1, "train": 1, "validation": 1},
    }
    # As long as the model's positions is not too long, and real records are no synthetic ones.
    real = {**facts, "recipe": {"source": "files"}}
    write_table(tmp_path / "reviews.parquet", "raw_reviews", rows, **real)
    prefixes.run(argparse.Namespace(**arguments, recipe=json.dumps({**values, "max_length": 32})))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["synthetic"], summary["warnings"]) == (False, [])
    with pytest.raises(UserError, match=r"max_length is 33, but the model in .* has 32 positions"):
        prefixes.run(argparse.Namespace(**arguments, recipe=json.dumps({**values, "max_length": 33})))
    with pytest.raises(UserError, match=r"max_length is 99, but the model in .* has 32 positions"):
        prefixes.run(argparse.Namespace(**arguments, recipe=json.dumps({**values, "max_length": 99})))
