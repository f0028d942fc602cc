"""The true reward of real reviews: a classifier of their sentiment, and how far its probabilities can be trusted."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.analysis.statistics import score_interval
from prefopt.data.formats.reviews import UNLABELLED
from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.models import new_classifier
from prefopt.rewards.true_reward import positive_probabilities
from prefopt.runtime import processes
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.files import write_text
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, split_of
from prefopt.training import stage
from prefopt.training.loop import Examples, train
from prefopt.training.recipe import TrainingRecipe

# The shortest excerpt, in tokens, and the bins of the reliability table.
_SHORTEST = 8
_BINS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(TrainingRecipe):
    """`max_length`: tokens that the classifier reads at most."""

    max_length: int


def excerpt_lengths(lengths: Sequence[int], seed: int) -> list[int]:
    """A random number of a text's first tokens for each text: completions are cut and unfinished, reviews are not."""
    rng = random.Random(seed)
    return [rng.randint(min(_SHORTEST, length), length) for length in lengths]


def review_examples(reviews: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, recipe: ClassifierRecipe) -> Examples:
    """Each review twice, as far as it is read and as an excerpt, with the cross-entropy of its label."""
    whole = _ids(tokenizer, reviews["text"].tolist(), recipe.max_length)
    cut = [ids[:n] for ids, n in zip(whole, excerpt_lengths([len(ids) for ids in whole], recipe.seed), strict=True)]
    texts = [ids for pair in zip(whole, cut, strict=True) for ids in pair]
    names = [f"{name}{part}" for name in reviews["review_id"] for part in ("", " (excerpt)")]
    labels = torch.tensor(reviews["label"].tolist()).repeat_interleave(2)
    pad_id = tokenizer.eos_token_id

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        device = next(model.parameters()).device
        parts = [torch.tensor(texts[i]) for i in indices]
        ids = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(part) for part in parts])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        wanted = labels[list(indices)].to(device)
        accuracy = (logits.argmax(dim=-1) == wanted).float()
        return F.cross_entropy(logits, wanted, reduction="none"), {"accuracy": accuracy.detach()}

    return Examples(names, [Row(ids, ()) for ids in texts], [1.0] * len(texts), losses)


def calibration(probabilities: np.ndarray, labels: np.ndarray, texts: str) -> list[dict[str, object]]:
    """Accuracy and calibration of predicted probabilities.

    Args:
        probabilities: float [n], P(positive).
        labels: int [n], 1 or 0.
        texts: what was read, for the column of this name.

    Returns:
        A row over all (bin "all": accuracy with Wilson's 95% interval, Brier score, expected calibration error), and
        one for each tenth of predicted probability that has texts.
    """
    correct = (probabilities > 0.5) == (labels == 1)
    interval = score_interval(correct.astype(float).tolist())
    bins = np.minimum((probabilities * _BINS).astype(int), _BINS - 1)
    rows: list[dict[str, object]] = []
    error = 0.0
    for number in range(_BINS):
        inside = bins == number
        if inside.any():
            predicted, positive = float(probabilities[inside].mean()), float(labels[inside].mean())
            error += inside.mean() * abs(predicted - positive)
            name = f"{number / _BINS:g} to {(number + 1) / _BINS:g}"
            row = {"bin": name, "n": int(inside.sum()), "mean_predicted": predicted, "share_positive": positive}
            rows.append({"texts": texts, **row})
    over_all = {
        "bin": "all",
        "n": len(labels),
        "mean_predicted": float(probabilities.mean()),
        "share_positive": float(labels.mean()),
        "accuracy": float(correct.mean()),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
        "brier": float(((probabilities - labels) ** 2).mean()),
        "calibration_error": error,
    }
    return [{"texts": texts, **over_all}, *rows]


def report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reviews: pd.DataFrame, recipe: ClassifierRecipe
) -> pd.DataFrame:
    """`calibration` on reviews, as far as they are read and as excerpts."""
    labels = reviews["label"].to_numpy()
    whole = _ids(tokenizer, reviews["text"].tolist(), recipe.max_length)
    lengths = excerpt_lengths([len(ids) for ids in whole], recipe.seed)
    excerpts = tokenizer.batch_decode(
        [ids[:n] for ids, n in zip(whole, lengths, strict=True)], clean_up_tokenization_spaces=False
    )
    rows = []
    for name, texts in (("reviews", reviews["text"].tolist()), ("excerpts", excerpts)):
        probabilities = positive_probabilities(model, tokenizer, texts, recipe.max_length, recipe.batch_size)
        what = f"P(positive) of {name}"
        require_finite(probabilities, reviews["review_id"], what, "look at these reviews and at the metrics")
        rows += calibration(probabilities.double().numpy(), labels, name)
    return pd.DataFrame(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `classifier`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="language model to start from")
    parser.add_argument("--reviews", required=True, type=Path, help="raw_reviews table")
    parser.add_argument("--table", required=True, type=Path, help="CSV file of accuracy and calibration that is made")


def run(args: argparse.Namespace) -> None:
    """Trains the classifier, measures it on the test reviews, and publishes it."""
    recipe = from_json(ClassifierRecipe, args.recipe)
    table = read_table(args.reviews, "raw_reviews")
    reviews = table[table["label"] != UNLABELLED]
    classifier, tokenizer = new_classifier(args.model, recipe.seed, ("NEGATIVE", "POSITIVE"))
    model = stage.prepared(classifier, recipe)
    training, validation = (
        review_examples(split_of(reviews, split, args.reviews), tokenizer, recipe) for split in ("train", "validation")
    )
    usage = Usage("classifier", default_device(), recipe.dtype)
    identity = stage.describe_run(
        __name__,
        recipe,
        {"reviews": table.attrs["manifest"]["content_hash"], **stage.model_hashes("model", args.model)},
    )
    with stage.open_run(args.work, identity, model) as folder:
        metrics = train("classifier", model, training, validation, recipe, folder, usage)
        measured = report(model, tokenizer, split_of(reviews, "test", args.reviews), recipe)
        if processes.is_main():
            write_text(args.table, measured.to_csv(index=False))
        over_all = measured[measured["bin"] == "all"].set_index("texts")
        stage.publish(
            *(args, model, tokenizer, identity, metrics, usage, folder),
            held_out={name: over_all.loc[name, ["n", "accuracy", "brier"]].to_dict() for name in over_all.index},
        )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids
