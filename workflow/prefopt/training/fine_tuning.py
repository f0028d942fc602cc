"""Fine-tuning a policy on fixed examples: what SFT and every objective on pairs do alike once they have their examples."""

from __future__ import annotations

import argparse

import torch

from prefopt.lm.models import load_policy
from prefopt.runtime.usage import Usage, default_device
from prefopt.training import by_step, stage
from prefopt.training.loop import Examples, steps_of, train
from prefopt.training.recipe import TrainingRecipe


def fine_tune(
    args: argparse.Namespace,
    module: str,
    name: str,
    recipe: TrainingRecipe,
    training: Examples,
    validation: Examples,
    inputs: dict[str, str],
) -> None:
    """Trains the policy of `--model`, looks at it by steps where that is asked for, and publishes it.

    Args:
        args: of the stage.
        module: of the stage, see `stage.describe_run`.
        name: of what is done, in progress lines and in what was used.
        recipe: see `TrainingRecipe`.
        training: what to learn from.
        validation: what to evaluate on.
        inputs: what determines the result, by name: hashes of tables and models.
    """
    torch.manual_seed(recipe.seed)
    policy, tokenizer = load_policy(args.model)
    model = stage.prepared(policy, recipe)
    # The reference policy is there beside the one that is trained where that is evaluated.
    usage = Usage(name, default_device(), recipe.dtype, models=2 if args.by_step and args.evaluations else 1)
    identity = stage.describe_run(module, recipe, inputs | by_step.inputs_of(args))
    with stage.open_run(args.work, identity, model) as folder:
        watcher = by_step.watcher(args, model, tokenizer, folder, steps_of(training, recipe))
        metrics = train(name, model, training, validation, recipe, folder, usage, hook=watcher)
        if watcher is not None:
            watcher.publish(identity, usage)
        stage.publish(args, model, tokenizer, identity, metrics, usage, folder)
