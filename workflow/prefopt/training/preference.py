"""Preference optimization on fixed pairs: a classification-like loss each, no other model in memory."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import tokenizer_hash
from prefopt.objectives import OBJECTIVES, Pairs
from prefopt.store.tables import read_table, split_of
from prefopt.training import by_step, stage
from prefopt.training.fine_tuning import fine_tune
from prefopt.training.loop import Examples
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import preference_rows, read_reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(TrainingRecipe):
    """How a policy learns from pairs."""

    objective: str  # key of `objectives.OBJECTIVES`
    values: dict[str, Any]  # what its loss takes beside the pairs


def preference_examples(pairs: pd.DataFrame, reference: pd.DataFrame | None, recipe: PreferenceRecipe) -> Examples:
    """Preference pairs with the recipe's objective.

    Args:
        pairs: rows of the preferences table.
        reference: the same pairs' rows of the reference_logprobs table, in the same order; None for an objective that has
            no reference policy.
        recipe: objective and its values.
    """
    rows = preference_rows(pairs)
    objective = OBJECTIVES[recipe.objective]
    cached = None if reference is None else torch.tensor(reference[["chosen_logp", "rejected_logp"]].to_numpy())
    per_token = objective.mean_over == "chosen_tokens"

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        result = completion_logprobs(model, [rows[i] for i in indices])
        chosen, rejected = result.sums.view(-1, 2).unbind(dim=1)
        lengths = result.lengths.view(-1, 2).to(chosen.device).unbind(dim=1)
        references = (None, None) if cached is None else cached[list(indices)].to(chosen.device).unbind(dim=1)
        made = objective.loss(Pairs(chosen, rejected, *references, *lengths), **recipe.values)
        figures = {"chosen_logp": chosen.detach(), "rejected_logp": rejected.detach()}
        if made.chosen_reward is not None and made.rejected_reward is not None:
            margin = made.chosen_reward - made.rejected_reward
            figures |= {
                "chosen_reward": made.chosen_reward,
                "rejected_reward": made.rejected_reward,
                "margin": margin,
                # A margin of exactly zero, as before the first step, says nothing about the pair.
                "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
            }
        return made.losses, figures

    weights = [float(len(row.completions[0])) if per_token else 1.0 for row in rows]
    return Examples(pairs["pair_id"].tolist(), rows, weights, losses)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `preference`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the policy at the start")
    parser.add_argument("--reference-model", type=Path, help="the reference policy, where it is another than --model")
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument(
        "--reference", type=Path, help="reference_logprobs table, for an objective that has a reference"
    )
    by_step.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Trains a policy from the one that it starts with and publishes it."""
    recipe = from_json(PreferenceRecipe, args.recipe)
    pairs = read_table(args.data, "preferences", tokenizer_hash=tokenizer_hash(args.model))
    fixed = args.reference_model or args.model
    reference = None if args.reference is None else read_reference(args.reference, fixed, pairs)

    def examples(split: str) -> Examples:
        rows = split_of(pairs, split, args.data)
        return preference_examples(rows, None if reference is None else reference.loc[rows.index], recipe)

    training, validation = examples("train"), examples("validation")
    inputs = {"data": pairs.attrs["manifest"]["content_hash"], **stage.model_hashes("reference", fixed)}
    inputs |= {} if fixed == args.model else stage.model_hashes("policy", args.model)
    fine_tune(args, __name__, recipe.objective, recipe, training, validation, inputs)
