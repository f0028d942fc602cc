"""The ground-truth reward of section 6.1: how positive a text is, by a rule, by n-grams or by a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.synthetic import review_world
from prefopt.errors import UserError
from prefopt.lm import models
from prefopt.store import provenance

# Texts, each a prompt with its completion -> float32 [n] in [0, 1].
TrueReward = Callable[[Sequence[str]], Tensor]

_POSITIVE = ("positive", "pos")


def load_true_reward(
    *,
    kind: Literal["rule", "ngrams", "classifier"],
    folder: Path | None,
    max_length: int,
    batch_size: int,
    device: torch.device,
) -> TrueReward:
    """The true reward.

    Args:
        kind: the synthetic reviews' rule, or P(positive) by n-grams or by a classifier.
        folder: the classifier's model folder, or the table of n-grams.
        max_length: tokens that the classifier reads; a longer text is cut at its end.
        batch_size: texts that it reads at once.
        device: where it runs.

    Raises:
        UserError: there is no classifier in the folder, or none of its labels is known to mean positive.
    """
    if kind == "rule":
        return lambda texts: torch.tensor([review_world.true_reward(text) for text in texts])
    if folder is None:
        raise UserError(f"The true reward is of the kind {kind!r}; give what it is by --true-reward-model.")
    if kind == "ngrams":
        # scikit-learn takes most of a second, which no other reward is to pay.
        from prefopt.rewards.ngrams import load_ngrams

        return load_ngrams(folder)
    model, tokenizer = load_classifier(folder)
    model.to(device)
    return lambda texts: positive_probabilities(model, tokenizer, texts, max_length, batch_size)


def reward_hash(path: Path | None) -> str | None:
    """What tells a true reward from another: the hash of a model's weights, or of a table's rows; None without one."""
    if path is None:
        return None
    return models.weights_hash(path) if path.is_dir() else provenance.content(path)


def load_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier in evaluation mode of whose labels one is known to be positive, and its tokenizer.

    Raises:
        UserError: the folder holds none.
    """
    try:
        model, tokenizer = models.load_classifier(folder)
        positive_index(model)
    except UserError as error:
        raise UserError(f"{folder} holds no classifier that can be the true reward: {error}") from error
    return model, tokenizer


def positive_index(model: PreTrainedModel) -> int:
    """Which output of a classifier means positive, by the names in its config.

    Of two labels without names the second does, as is the custom; of three it might be neutral.

    Raises:
        UserError: none is known to, or the outputs are not the logits of classes of which one holds.
    """
    names = {int(index): str(name).lower() for index, name in model.config.id2label.items()}
    kind = getattr(model.config, "problem_type", None)
    positive = [index for index, name in names.items() if name in _POSITIVE]
    if not positive and sorted(names.values()) == ["label_0", "label_1"]:
        positive = [index for index, name in names.items() if name == "label_1"]
    if len(positive) != 1 or len(names) < 2:
        raise UserError(
            f"The classifier's labels are {', '.join(map(str, model.config.id2label.values()))}; one must be POSITIVE or "
            f"LABEL_1 of two labels: set id2label in its config.json."
        )
    if kind in ("regression", "multi_label_classification"):
        raise UserError(f"The classifier's problem_type is {kind}, whose outputs are no probabilities of one label.")
    return positive[0]


@torch.no_grad()
def positive_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_size: int,
) -> Tensor:
    """P(positive) of each text, float32 [n] on the CPU; texts of like length are read together."""
    device = next(model.parameters()).device
    label = positive_index(model)
    pad = tokenizer.pad_token or tokenizer.eos_token
    # An empty text still has a probability: that of the padding token alone.
    encoded = tokenizer([text or pad for text in texts], truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    probabilities = torch.empty(len(encoded))
    pad_id = model.config.pad_token_id if model.config.pad_token_id is not None else tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(encoded[batch[-1]])
        ids = torch.full((len(batch), longest), pad_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[row, : len(encoded[i])] = 1
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        probabilities[batch] = logits.softmax(dim=-1)[:, label].cpu()
    return probabilities
