"""Tokenizer, documents and order of pretraining."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.lm.models import load_policy
from prefopt.store.tables import write_table
from prefopt.training import loop, pretrain
from prefopt.training.pretrain import (
    PretrainRecipe,
    documents_to_ids,
    recipe_hash,
    short_documents_first,
    train_tokenizer,
)
from tiny_task import SHAPE, WORDS, recipe


def test_some_short_documents_come_first_and_nothing_else_moves() -> None:
    documents = [[1] * length for length in (9, 3, 8, 2, 7, 3)]
    ordered = short_documents_first(documents, short_tokens=3, first=2)
    assert [len(ids) for ids in ordered] == [3, 2, 9, 8, 7, 3]
    assert short_documents_first(documents, short_tokens=0, first=2) == documents


def test_a_long_document_is_cut_into_pieces_that_fit_after_one_eos() -> None:
    tokenizer = train_tokenizer(["a b c d e f"] * 3, vocab_size=260)
    whole = tokenizer("a b c d")["input_ids"]
    pieces = list(documents_to_ids(["a b c d", "a"], tokenizer, max_positions=4))
    assert [token for piece in pieces[:-1] for token in piece] == [*whole, tokenizer.eos_token_id]
    assert all(1 <= len(piece) <= 3 for piece in pieces)
    assert pieces[-1] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]


def test_any_text_can_be_encoded() -> None:
    tokenizer = train_tokenizer(["plain words only"], vocab_size=300)
    assert tokenizer.decode(tokenizer("naïve 日本 <|endoftext")["input_ids"]) == "naïve 日本 <|endoftext"


def test_the_stage_trains_tokenizer_and_model_and_says_of_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def train(*values: Any, shuffle: bool) -> list[dict[str, Any]]:
        asked.append(shuffle)
        return loop.train(*values, shuffle=shuffle)

    monkeypatch.setattr(pretrain, "train", train)
    texts = [{"text": " ".join(WORDS[start : start + 6])} for start in range(12)]
    text_hash = write_table(tmp_path / "text.parquet", "pretraining", texts)["content_hash"]
    paths = {"work": tmp_path / "work", "out": tmp_path / "model", "metrics": tmp_path / "metrics.jsonl"}
    given = recipe(**SHAPE, epochs=1)
    pretrain.run(argparse.Namespace(text=tmp_path / "text.parquet", **paths, recipe=given))
    assert asked == [False], "documents are taken in the order that `short_documents_first` gives them"
    manifest = json.loads((paths["out"] / "manifest.json").read_text())
    # One document of twelve is held out, and each is one piece.
    assert (manifest["used"]["stage"], manifest["used"]["examples"]) == ("pretrain", 11)
    assert manifest["identity"]["inputs"] == {"text": text_hash}
    assert manifest["recipe_hash"] == recipe_hash(from_json(PretrainRecipe, given), text_hash)
    metrics = [json.loads(line) for line in paths["metrics"].read_text().splitlines()]
    assert [(row["step"], row["split"]) for row in metrics] == [
        *((0, "validation"), (1, "train"), (2, "train"), (3, "train"), (3, "validation"))
    ]
    model, tokenizer = load_policy(paths["out"])
    layer = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16  # attention, feed-forward, norms
    assert manifest["parameters"] == len(tokenizer) * 16 + 2 * layer + 16
    assert (model.config.num_hidden_layers, model.config.tie_word_embeddings) == (2, True)


def test_one_document_is_not_enough(tmp_path: Path) -> None:
    write_table(tmp_path / "text.parquet", "pretraining", [{"text": "alone"}])
    paths = {"work": tmp_path / "work", "out": tmp_path / "model", "metrics": tmp_path / "metrics.jsonl"}
    with pytest.raises(UserError, match=r"text.parquet has 1 documents: pretraining needs at least two"):
        pretrain.run(argparse.Namespace(text=tmp_path / "text.parquet", **paths, recipe=recipe(**SHAPE)))


def test_the_hash_of_a_recipe_leaves_out_what_changes_rounding_at_most() -> None:
    plain = from_json(PretrainRecipe, recipe(**SHAPE))
    unimportant = {"token_budget": 7, "checkpoint_every": 7, "evaluate_every": 7, "activation_checkpointing": True}
    same = from_json(PretrainRecipe, recipe(**SHAPE, **unimportant))
    assert recipe_hash(same, "t") == recipe_hash(plain, "t")
    others = [dataclasses.replace(plain, seed=1), dataclasses.replace(plain, layers=3)]
    assert len({recipe_hash(plain, "t"), recipe_hash(plain, "u"), *(recipe_hash(one, "t") for one in others)}) == 4
