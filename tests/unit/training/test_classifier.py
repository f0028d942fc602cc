"""The classifier of sentiment, its report, and its use as the true reward."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.data.synthetic.review_world import label, write_review
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.lm.models import load_tokenizer, new_classifier, save_model
from prefopt.rewards import true_reward
from prefopt.rewards.true_reward import load_classifier, load_true_reward, positive_index, positive_probabilities
from prefopt.store.tables import read_table, write_table
from prefopt.training import classifier
from prefopt.training.stage import model_hashes
from tiny_task import Task, recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reviews(task: Task) -> Path:
    texts = [write_review(random.Random(i)) for i in range(60)]
    splits = ["train"] * 30 + ["validation"] * 10 + ["test"] * 20
    rows = [
        {"review_id": f"r{i}", "text": text, "label": label(text), "split": split}
        for i, (text, split) in enumerate(zip(texts, splits, strict=True))
    ]
    path = task.folder / "reviews.parquet"
    write_table(path, "raw_reviews", rows)
    return path


@pytest.fixture(scope="module")
def trained(task: Task, reviews: Path) -> Path:
    out = task.folder / "classifier"
    paths = {"work": task.folder / "work", "metrics": task.folder / "classifier.jsonl", "out": out}
    text = recipe(epochs=1, batch_size=16, max_length=40, token_budget=2000)
    table = task.folder / "classifier.csv"
    classifier.run(argparse.Namespace(model=task.model, reviews=reviews, recipe=text, table=table, **paths))
    return out


def test_the_reported_accuracy_is_that_of_the_published_model(task: Task, reviews: Path, trained: Path) -> None:
    table = pd.read_csv(task.folder / "classifier.csv")
    over_all = table[(table["bin"] == "all") & (table["texts"] == "reviews")].iloc[0]
    rows = read_table(reviews, "raw_reviews")
    test = rows[rows["split"] == "test"]
    model, tokenizer = load_classifier(trained)
    correct = 0
    brier = 0.0
    for text, wanted in zip(test["text"], test["label"], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"][:40]])
        probability = model(input_ids=ids).logits.softmax(dim=-1)[0, 1].item()
        correct += (probability > 0.5) == wanted
        brier += (probability - wanted) ** 2 / 20
    assert over_all["n"] == 20 and over_all["accuracy"] == correct / 20
    assert over_all["brier"] == pytest.approx(brier, abs=1e-5)
    bins = table[(table["bin"] != "all") & (table["texts"] == "reviews")]
    assert bins["n"].sum() == 20
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["identity"]["inputs"] == {
        "reviews": rows.attrs["manifest"]["content_hash"],
        **model_hashes("model", task.model),
    }
    assert manifest["held_out"]["reviews"] == pytest.approx(over_all[["n", "accuracy", "brier"]].to_dict())
    ece = ((bins["mean_predicted"] - bins["share_positive"]).abs() * bins["n"]).sum() / 20
    assert over_all["calibration_error"] == pytest.approx(ece)


def test_calibration_by_hand() -> None:
    rows = classifier.calibration(np.array([0.95, 0.85, 0.15, 0.95]), np.array([1, 0, 0, 1]), "reviews")
    over_all = rows[0]
    assert over_all["accuracy"] == 0.75
    assert over_all["brier"] == pytest.approx((0.05**2 * 2 + 0.85**2 + 0.15**2) / 4)
    assert over_all["calibration_error"] == pytest.approx((2 * 0.05 + 0.85 + 0.15) / 4)
    assert [(row["bin"], row["n"]) for row in rows[1:]] == [("0.1 to 0.2", 1), ("0.8 to 0.9", 1), ("0.9 to 1", 2)]


def test_probabilities_do_not_depend_on_the_batch(trained: Path) -> None:
    model, tokenizer = load_classifier(trained)
    texts = [write_review(random.Random(i)) for i in range(5)] + ["my dog", ""]
    together = positive_probabilities(model, tokenizer, texts, max_length=40, batch_size=4)
    alone = [positive_probabilities(model, tokenizer, [text], 40, 1).item() for text in texts]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)
    reward = load_true_reward(kind="classifier", folder=trained, max_length=40, batch_size=4, device=CPU)
    assert torch.equal(reward(texts), together)


def test_probabilities_are_those_of_each_text_alone_cut_at_its_end(task: Task, tmp_path: Path) -> None:
    """Against a forward pass without padding, of a classifier whose first label is the positive one."""
    model, tokenizer = new_classifier(task.model, 0, ("POSITIVE", "NEGATIVE"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that texts differ visibly
    save_model(tmp_path / "turned", model, tokenizer, {})
    texts = ["my dog ate the red shoe and i feel sad", "sad", "", "the shop", "i feel sad", "my dog ate the red shoe"]
    for longest, size in ((6, 2), (3, 4), (50, 100)):
        reward = load_true_reward(
            kind="classifier", folder=tmp_path / "turned", max_length=longest, batch_size=size, device=CPU
        )
        found = reward(texts)
        expected = []
        for text in texts:
            ids = tokenizer(text)["input_ids"][:longest] or [tokenizer.eos_token_id]
            with torch.no_grad():
                expected.append(model(input_ids=torch.tensor([ids])).logits.softmax(dim=-1)[0, 0].item())
        assert found.dtype == torch.float32 and not found.requires_grad
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
        assert len({round(p, 4) for p in expected}) >= 4


def test_texts_are_read_in_batches_of_like_length(task: Task) -> None:
    model, tokenizer = new_classifier(task.model, 0, ("NEGATIVE", "POSITIVE"))
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    texts = ["my dog ate the red shoe", "sad", "i feel sad", "dog", "my red dog"]
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    together = positive_probabilities(model, tokenizer, texts, max_length=40, batch_size=2)
    assert shapes == [(2, lengths[1]), (2, lengths[3]), (1, lengths[4])]
    # A classifier without a padding token can read one text at once.
    model.config.pad_token_id = None
    alone = positive_probabilities(model, tokenizer, texts, max_length=40, batch_size=1)
    assert alone.tolist() == pytest.approx(together.tolist(), abs=1e-6)


class Summing(torch.nn.Module):
    """A classifier that reads every token that the mask lets it, on either side: the log-odds are the sum of ids / 100."""

    config = SimpleNamespace(id2label={0: "NEGATIVE", 1: "POSITIVE"}, pad_token_id=7)

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        odds = (input_ids * attention_mask).sum(dim=1) * self.scale
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(odds), odds], dim=1))


def test_padding_is_masked(task: Task) -> None:
    """A causal model never looks ahead to it, and one that does would."""
    tokenizer = load_tokenizer(task.model)
    texts = ["my dog ate the red shoe", "sad", "i feel sad"]
    found = positive_probabilities(Summing(), tokenizer, texts, max_length=40, batch_size=3)
    sums = [sum(tokenizer(text)["input_ids"]) for text in texts]
    assert found.tolist() == pytest.approx([1 / (1 + np.exp(-total / 100)) for total in sums], abs=1e-6)


class OfShapes(torch.nn.Module):
    """A classifier on a device that only knows shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Embedding(300, 2, device="meta")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        assert input_ids.device == attention_mask.device == self.head.weight.device
        return SimpleNamespace(logits=(self.head(input_ids) * attention_mask.unsqueeze(-1)).sum(dim=1))


def test_texts_are_read_where_the_model_is(task: Task, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = new_classifier(task.model, 0, ("NEGATIVE", "POSITIVE"))
    monkeypatch.setattr(true_reward, "load_classifier", lambda folder: (model, tokenizer))
    load_true_reward(kind="classifier", folder=task.model, max_length=40, batch_size=4, device=torch.device("meta"))
    assert model.device.type == "meta"
    values = from_json(classifier.ClassifierRecipe, recipe(max_length=10))
    examples = classifier.review_examples(read_table(reviews, "raw_reviews"), tokenizer, values)
    assert max(len(row.prompt) for row in examples.rows) == 10
    assert examples.losses(OfShapes(), [0, 1, 2])[0].device.type == "meta"


def test_excerpts_are_seeded_and_within_the_text() -> None:
    lengths = classifier.excerpt_lengths([3, 50, 50], seed=1)
    assert lengths == classifier.excerpt_lengths([3, 50, 50], seed=1)
    assert lengths[0] == 3 and all(8 <= n <= 50 for n in lengths[1:])


def test_a_classifier_of_unknown_labels_is_refused(trained: Path, tmp_path: Path) -> None:
    model, _ = load_classifier(trained)
    assert positive_index(model) == 1
    model.config.id2label = {0: "good", 1: "bad"}
    with pytest.raises(UserError, match="labels are good, bad; one must be POSITIVE or LABEL_1"):
        positive_index(model)
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path)
    with pytest.raises(UserError, match="give what it is by --true-reward-model"):
        load_true_reward(kind="classifier", folder=None, max_length=40, batch_size=4, device=CPU)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (["LABEL_0", "LABEL_1"], 1),
        (["POSITIVE", "NEGATIVE"], 0),
        (["negative", "neutral", "positive"], 2),
        (["neg", "pos"], 1),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (["LABEL_0", "Positive", "LABEL_2"], 1),
        (["LABEL_1", "other"], None),
        (["positive", "pos"], None),
        (["POSITIVE"], None),
        (["LABEL_1"], None),
    ],
)
def test_which_label_is_positive(labels: list[str], positive: int | None) -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(labels))))
    if positive is not None:
        assert positive_index(model) == positive
        for kind in ("multi_label_classification", "regression"):
            model.config.problem_type = kind
            with pytest.raises(UserError, match=f"problem_type is {kind}"):
                positive_index(model)
        model.config.problem_type = "single_label_classification"
        assert positive_index(model) == positive
    else:
        with pytest.raises(UserError, match=f"labels are {', '.join(labels)}; one must be POSITIVE or LABEL_1 of two"):
            positive_index(model)


def test_a_folder_of_three_labels_without_names_is_refused(task: Task, tmp_path: Path) -> None:
    model, tokenizer = new_classifier(task.model, 0, ("LABEL_0", "LABEL_1", "LABEL_2"))
    save_model(tmp_path / "three", model, tokenizer, {})
    with pytest.raises(UserError, match=r"three holds no classifier that can be the true reward: .* LABEL_2; one must"):
        load_true_reward(kind="classifier", folder=tmp_path / "three", max_length=40, batch_size=4, device=CPU)


def test_the_rule_is_the_embedded_reviews_own() -> None:
    reward = load_true_reward(kind="rule", folder=None, max_length=40, batch_size=4, device=CPU)
    assert reward(["superb plot", "dull"]).tolist() == pytest.approx(
        [1 / (1 + np.exp(-2 / 7)), 1 / (1 + np.exp(1 / 7))]
    )
