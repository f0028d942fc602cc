"""Direct preference optimization: one classification-like loss on pairs, no reference model in memory."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, tokenizer_hash
from prefopt.objectives import dpo_loss, ipo_loss
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table
from prefopt.training import by_step, stage
from prefopt.training.loop import Examples, steps_of, train
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import preference_rows, read_reference
from prefopt.training.sft import split_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPORecipe(TrainingRecipe):
    """`sigmoid` is the paper's loss; with `label_smoothing` > 0 it is conservative DPO."""

    loss: Literal["sigmoid", "ipo"]
    beta: float
    label_smoothing: float


def preference_examples(pairs: pd.DataFrame, reference: pd.DataFrame, recipe: DPORecipe) -> Examples:
    """Preference pairs with their cached reference log-probabilities and DPO's (or IPO's) loss.

    Args:
        pairs: rows of the preferences table.
        reference: the same pairs' rows of the reference_logprobs table, in the same order.
        recipe: loss, beta and label smoothing.
    """
    rows = preference_rows(pairs)
    cached = torch.tensor(reference[["chosen_logp", "rejected_logp"]].to_numpy())

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        result = completion_logprobs(model, [rows[i] for i in indices])
        chosen, rejected = result.sums.view(-1, 2).unbind(dim=1)
        reference_chosen, reference_rejected = cached[list(indices)].to(chosen.device).unbind(dim=1)
        logps = (chosen, rejected, reference_chosen, reference_rejected)
        if recipe.loss == "sigmoid":
            loss, chosen_reward, rejected_reward = dpo_loss(*logps, recipe.beta, recipe.label_smoothing)
        else:
            chosen_lengths, rejected_lengths = result.lengths.view(-1, 2).to(chosen.device).unbind(dim=1)
            loss, chosen_reward, rejected_reward = ipo_loss(*logps, chosen_lengths, rejected_lengths, recipe.beta)
        margin = chosen_reward - rejected_reward
        return loss, {
            "chosen_reward": chosen_reward,
            "rejected_reward": rejected_reward,
            "margin": margin,
            # A margin of exactly zero, as before the first step, says nothing about the pair.
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            "chosen_logp": chosen.detach(),
            "rejected_logp": rejected.detach(),
        }

    return Examples(pairs["pair_id"].tolist(), rows, [1.0] * len(rows), losses)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `dpo`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the reference policy, also the start")
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument("--reference", required=True, type=Path, help="reference_logprobs table")
    by_step.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains a DPO policy from the reference policy and publishes it."""
    recipe = from_json(DPORecipe, args.recipe)
    pairs = read_table(args.data, "preferences", tokenizer_hash=tokenizer_hash(args.model))
    reference = read_reference(args.reference, args.model, pairs)
    reference.index = pairs.index

    def examples(split: str) -> Examples:
        rows = split_of(pairs, split, args.data)
        return preference_examples(rows, reference.loc[rows.index], recipe)

    training, validation = examples("train"), examples("validation")
    torch.manual_seed(recipe.seed)
    policy, tokenizer = load_policy(args.model)
    model = stage.prepared(policy, recipe)
    usage = Usage("dpo", default_device(), torch.float32)
    identity = stage.describe_run(
        __name__,
        recipe,
        {"data": pairs.attrs["manifest"]["content_hash"], **stage.model_hashes("reference", args.model)},
    )
    with stage.open_run(args.work, identity, model) as folder:
        sampler = by_step.step_sampler(args, model, tokenizer, folder, steps_of(training, recipe))
        metrics = train("dpo", model, training, validation, recipe, folder, usage, hook=sampler)
        if sampler is not None:
            sampler.publish()
        stage.publish(args, model, tokenizer, identity, metrics, usage, folder)
