"""KTO on completions with a label each: no pairs, and an estimate of the KL that a whole batch shares."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import tokenizer_hash
from prefopt.objectives import kto
from prefopt.runtime import processes
from prefopt.store.tables import read_table, split_of
from prefopt.training import by_step, stage
from prefopt.training.fine_tuning import fine_tune
from prefopt.training.loop import BatchMean, Examples
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import CACHED, read_reference, rows_of

logger = logging.getLogger(__name__)

# Between which the desirable examples' weight in all is to lie, in units of the others' (the paper's equation 8).
BALANCE = (1.0, 4 / 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTORecipe(TrainingRecipe):
    """How a policy learns from single labels; see `objectives.kto`."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


def label_examples(labels: pd.DataFrame, reference: pd.DataFrame, recipe: KTORecipe) -> Examples:
    """Labelled completions with KTO's loss.

    Args:
        labels: rows of the labels table.
        reference: the same examples' rows of the reference_label_logprobs table, in the same order.
        recipe: beta and weights.
    """
    desirable = torch.tensor(labels["label"].to_numpy(bool))
    completions, mismatched = (
        (rows_of(labels, [side]), torch.tensor(reference[f"{side}_logp"].to_numpy())) for side in CACHED["labels"].sides
    )

    def log_ratios(model: nn.Module, indices: Sequence[int], of_mismatched: bool = False) -> Tensor:
        rows, cached = mismatched if of_mismatched else completions
        sums = completion_logprobs(model, [rows[i] for i in indices]).sums
        return sums - cached[list(indices)].to(sums.device)

    def losses(model: nn.Module, indices: Sequence[int], mean: float) -> tuple[Tensor, dict[str, Tensor]]:
        ratios = log_ratios(model, indices)
        losses, margins = kto(
            *(ratios, desirable[list(indices)].to(ratios.device), mean, recipe.beta),
            *(recipe.desirable_weight, recipe.undesirable_weight),
        )
        return losses, {
            "kl": torch.full_like(margins, max(0.0, mean)),
            "kto_margin": margins,
            # A margin of exactly zero, as before the first step, says nothing about the example.
            "kto_accuracy": (margins > 0).float() + 0.5 * (margins == 0).float(),
        }

    estimate = BatchMean(
        "log-ratio of the mismatched completion",
        mismatched[0],
        lambda model, indices: log_ratios(model, indices, of_mismatched=True),
    )
    return Examples(labels["example_id"].tolist(), completions[0], [1.0] * len(labels), losses, estimate)


def balance_warning(labels: pd.DataFrame, recipe: KTORecipe) -> str | None:
    """A sentence where one label's examples outweigh the other's beyond what the paper recommends.

    Args:
        labels: of the training split.
        recipe: the weights.
    """
    desirable = int(labels["label"].sum())
    undesirable = len(labels) - desirable
    low, high = BALANCE
    if not desirable or not undesirable:
        return f"all {len(labels)} training examples have one label, and nothing to be told from."
    ratio = recipe.desirable_weight * desirable / (recipe.undesirable_weight * undesirable)
    if low - 1e-9 <= ratio <= high + 1e-9:
        return None
    wanted = (recipe.undesirable_weight * undesirable / desirable * bound for bound in BALANCE)
    return (
        f"{desirable} desirable examples of weight {recipe.desirable_weight:g} to {undesirable} undesirable ones of weight "
        f"{recipe.undesirable_weight:g} are {ratio:.2f} to 1, where KTO's authors recommend {low:.2f} to {high:.2f}: with "
        f"desirable_weight from {' to '.join(f'{bound:.2f}' for bound in wanted)} they are."
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `kto`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the policy at the start, which is the reference")
    parser.add_argument("--data", required=True, type=Path, help="labels table")
    parser.add_argument("--reference", required=True, type=Path, help="reference_label_logprobs table")
    by_step.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains a policy from the one that it starts with and publishes it."""
    recipe = from_json(KTORecipe, args.recipe)
    labels = read_table(args.data, "labels", tokenizer_hash=tokenizer_hash(args.model))
    reference = read_reference(args.reference, args.model, labels)

    def examples(split: str) -> Examples:
        rows = split_of(labels, split, args.data)
        return label_examples(rows, reference.loc[rows.index], recipe)

    training, validation = examples("train"), examples("validation")
    warning = balance_warning(split_of(labels, "train", args.data), recipe)
    if warning and processes.is_main():
        logger.warning("warning: %s", warning)
    inputs = {"data": labels.attrs["manifest"]["content_hash"], **stage.model_hashes("reference", args.model)}
    fine_tune(args, __name__, "kto", recipe, training, validation, inputs)
