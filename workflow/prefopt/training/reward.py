"""The reward model: Bradley-Terry on preference pairs, the score read at the completion's EOS."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from torch import Tensor, nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.models import new_scorer, tokenizer_hash
from prefopt.objectives import bradley_terry_loss
from prefopt.rewards.learned import raw_scores, score_rows
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.finite import require_finite
from prefopt.store.tables import read_table, split_of
from prefopt.training import stage
from prefopt.training.loop import Examples, evaluate, train
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import preference_rows, rows_of

# References enough to know their mean reward; the standard error is a hundredth of the rewards' spread.
_REFERENCES_FOR_OFFSET = 1024


def preference_examples(pairs: pd.DataFrame) -> Examples:
    """Preference pairs with the Bradley-Terry loss; `accuracy` counts an equal score as half."""
    rows = preference_rows(pairs)

    def losses(model: nn.Module, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = raw_scores(model, [rows[i] for i in indices]).view(-1, 2).unbind(dim=1)
        margin = (chosen - rejected).detach()
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
        return bradley_terry_loss(chosen, rejected), {"margin": margin, "accuracy": accuracy}

    return Examples(pairs["pair_id"].tolist(), rows, [1.0] * len(rows), losses)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `reward`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="language model to start from")
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument("--demonstrations", required=True, type=Path, help="their mean reward becomes zero")


def run(args: argparse.Namespace) -> None:
    """Trains a reward model and publishes it, normalised so that reference completions average zero."""
    recipe = from_json(TrainingRecipe, args.recipe)
    expected = {"tokenizer_hash": tokenizer_hash(args.model)}
    pairs = read_table(args.data, "preferences", **expected)
    demonstrations = read_table(args.demonstrations, "demonstrations", **expected)
    held_out = "validation" if (pairs["split"] == "validation").any() else "test"
    training = preference_examples(split_of(pairs, "train", args.data))
    validation = preference_examples(split_of(pairs, held_out, args.data))
    scorer, tokenizer = new_scorer(args.model, seed=recipe.seed)
    model = stage.prepared(scorer, recipe)
    usage = Usage("reward", default_device(), recipe.dtype)
    identity = stage.describe_run(
        __name__,
        recipe,
        {
            "data": pairs.attrs["manifest"]["content_hash"],
            "demonstrations": demonstrations.attrs["manifest"]["content_hash"],
            **stage.model_hashes("model", args.model),
        },
    )
    with stage.open_run(args.work, identity, model) as folder:
        metrics = train("reward", model, training, validation, recipe, folder, usage, better=("accuracy", 1))
        references = split_of(demonstrations, "train", args.demonstrations).head(_REFERENCES_FOR_OFFSET)
        model.config.reward_offset = float(_mean_reference_score(model, references, recipe))
        stage.publish(
            *(args, model, tokenizer, identity, metrics, usage, folder),
            held_out_split=held_out,
            held_out=evaluate(model, validation, recipe, "reward", f" in the split {held_out!r}"),
            held_out_pairs=len(validation.ids),
            reward_offset=model.config.reward_offset,
        )


def _mean_reference_score(model: nn.Module, references: pd.DataFrame, recipe: TrainingRecipe) -> Tensor:
    scores = score_rows(model, rows_of(references, ["response"]), recipe.token_budget, recipe.dtype)
    require_finite(scores, references["prompt_id"], "The score of a reference completion", "look at these rows")
    return scores.mean()
