"""The ground-truth reward of section 6.1: how positive a text is, by a rule or by a classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data import review_world
from prefopt.errors import UserError
from prefopt.lm.models import load_tokenizer

# Texts, each a prompt with its completion -> float32 [n] in [0, 1].
TrueReward = Callable[[Sequence[str]], Tensor]

_POSITIVE = ("positive", "pos", "label_1")


def load_true_reward(
    *, kind: Literal["rule", "classifier"], folder: Path | None, max_length: int, batch_size: int, device: torch.device
) -> TrueReward:
    """The true reward.

    Args:
        kind: the synthetic reviews' rule, or a classifier's P(positive).
        folder: the classifier's model folder.
        max_length: tokens that the classifier reads; a longer text is cut at its end.
        batch_size: texts that it reads at once.
        device: where it runs.

    Raises:
        UserError: there is no classifier in the folder, or none of its labels is known to mean positive.
    """
    if kind == "rule":
        return lambda texts: torch.tensor([review_world.true_reward(text) for text in texts])
    if folder is None:
        raise UserError("The true reward is a classifier; give its folder by --true-reward-model.")
    model, tokenizer = load_classifier(folder)
    model.to(device)
    return lambda texts: positive_probabilities(model, tokenizer, texts, max_length, batch_size)


def load_classifier(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier of two labels in evaluation mode, and its tokenizer."""
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no classifier ({str(error).splitlines()[0]}): name another folder.") from error
    tokenizer = load_tokenizer(folder)
    positive_index(model)
    return model.eval(), tokenizer


def positive_index(model: PreTrainedModel) -> int:
    """Which output of a classifier means positive, by the names in its config.

    Raises:
        UserError: none is named so.
    """
    for index, name in model.config.id2label.items():
        if name.lower() in _POSITIVE:
            return int(index)
    raise UserError(
        f"The classifier's labels are {', '.join(model.config.id2label.values())}; one must be POSITIVE or LABEL_1: "
        f"set id2label in its config.json."
    )


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
