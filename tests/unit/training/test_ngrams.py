"""The true reward by n-grams: what is written gives what was fitted, and its report is of held-out reviews."""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.data.synthetic.review_world import label, write_review
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer, tokenizer_hash
from prefopt.rewards.true_reward import load_true_reward, reward_hash
from prefopt.store.tables import read_manifest, read_table, write_table
from prefopt.training import ngrams
from tiny_task import Task

CPU = torch.device("cpu")
RECIPE = '{"max_length": 12}'


def reward(path: Path, texts: list[str]) -> list[float]:
    made = load_true_reward(kind="ngrams", folder=path, max_length=1, batch_size=1, device=CPU)(texts)
    assert made.dtype == torch.float32
    return [float(value) for value in made]


def reviews(folder: Path, count: int, *, one_label: bool = False) -> Path:
    rows = [
        {"review_id": f"r{i}", "text": text, "label": 1 if one_label else label(text), "split": split}
        for i in range(count)
        for text, split in [(write_review(random.Random(i)), ("train", "train", "test")[i % 3])]
    ]
    write_table(folder / "reviews.parquet", "raw_reviews", rows)
    return folder / "reviews.parquet"


def fit(task: Task, folder: Path, source: Path) -> Path:
    out = folder / "ngrams.parquet"
    ngrams.run(
        argparse.Namespace(model=task.model, reviews=source, recipe=RECIPE, table=folder / "classifier.csv", out=out)
    )
    return out


def test_a_reward_by_hand(tmp_path: Path) -> None:
    """Logistic regression on tf-idf of the words and pairs that are known: (1 + ln count) idf, to length 1."""
    rows = {"ngram": ["good", "bad", "not good"], "idf": [1.0, 2.0, 3.0], "weight": [2.0, -4.0, -6.0]}
    write_table(tmp_path / "ngrams.parquet", "ngrams", pd.DataFrame(rows), intercept=0.5)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    twice, pair = 1 + math.log(2), np.array([1.0, 3.0]) / math.sqrt(10)
    both = np.array([twice * 1.0, 2.0]) / math.hypot(twice, 2.0)
    expected = [sigmoid(0.5), sigmoid(2.5), sigmoid(0.5 + 2 * pair[0] - 6 * pair[1]), sigmoid(0.5 + both @ [2, -4])]
    texts = ["", "a Good film", "not good", "good, good and bad"]
    assert reward(tmp_path / "ngrams.parquet", texts) == pytest.approx(expected, abs=1e-6)


def test_what_is_fitted_is_told_of_held_out_reviews(task: Task, tmp_path: Path) -> None:
    source = reviews(tmp_path, 240)
    out = fit(task, tmp_path, source)
    rows = read_table(source, "raw_reviews")
    test = rows[rows["split"] == "test"]
    given = np.array(reward(out, test["text"].tolist()))
    labels = test["label"].to_numpy()
    told = pd.read_csv(tmp_path / "classifier.csv")
    whole = told[(told["bin"] == "all") & (told["texts"] == "reviews")].iloc[0]
    assert whole["n"] == len(test) == 80
    assert whole["accuracy"] == pytest.approx(((given > 0.5) == labels).mean())
    assert whole["brier"] == pytest.approx(((given - labels) ** 2).mean(), abs=1e-6)
    assert whole["accuracy"] > 0.8, "the reviews are written by words"
    excerpts = told[(told["bin"] == "all") & (told["texts"] == "excerpts")].iloc[0]
    assert excerpts["accuracy"] < whole["accuracy"], "twelve tokens say less"
    manifest = read_manifest(out)
    assert manifest["held_out"]["reviews"] == pytest.approx({key: whole[key] for key in ("n", "accuracy", "brier")})
    assert manifest["held_out"].keys() == {"reviews", "excerpts"} and manifest["recipe"] == {"max_length": 12}
    assert manifest["reviews"] == rows.attrs["manifest"]["content_hash"]
    assert manifest["tokenizer_hash"] == tokenizer_hash(task.model)
    assert set(read_table(out, "ngrams")["ngram"].str.count(" ")) == {0, 1}, "words and pairs of them"
    # The same again is the same table.
    (tmp_path / "again").mkdir()
    assert reward_hash(fit(task, tmp_path / "again", source)) == reward_hash(out) is not None


def test_an_excerpt_is_a_texts_first_tokens(task: Task) -> None:
    texts = pd.DataFrame({"text": ["my dog ate the red shoe and i feel sad", "sad"]})
    whole, cut = ngrams.whole_and_excerpts(texts, task.model, 4)
    tokenizer = load_tokenizer(task.model)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:4] for text in texts["text"]]
    assert whole == texts["text"].tolist() and cut == [tokenizer.decode(one) for one in ids]


def test_reviews_of_one_label_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="all reviews to train on have one label"):
        fit(task, tmp_path, reviews(tmp_path, 30, one_label=True))


def test_reviews_without_a_common_word_are_refused(task: Task, tmp_path: Path) -> None:
    splits = ["train"] * 4 + ["test"]
    rows = [{"review_id": f"r{i}", "text": f"word{i}", "label": i % 2, "split": s} for i, s in enumerate(splits)]
    write_table(tmp_path / "reviews.parquet", "raw_reviews", rows)
    with pytest.raises(UserError, match="no word stands in 3 texts"):
        fit(task, tmp_path, tmp_path / "reviews.parquet")


def test_a_reward_of_no_table_is_refused() -> None:
    with pytest.raises(UserError, match="of the kind 'ngrams'; give what it is"):
        load_true_reward(kind="ngrams", folder=None, max_length=1, batch_size=1, device=CPU)
