"""What every training stage does around its loop: arguments, identity of the run, publishing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.experiment.recipes import from_dict, to_dict
from prefopt.lm.adapter import AdapterRecipe, add_adapter, merged
from prefopt.lm.chat import keep_end_tokens
from prefopt.lm.models import save_model, tokenizer_hash, weights_hash
from prefopt.lm.sharding import place, recompute_activations, whole_weights
from prefopt.runtime import collectives, processes
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.files import stable_hash
from prefopt.store.fingerprint import fingerprint
from prefopt.store.tables import package_versions
from prefopt.training.checkpoint import RunFolder
from prefopt.training.loop import write_metrics
from prefopt.training.recipe import TrainingRecipe

# Checkpoint (weights and at most two optimizer moments), best weights, the model published and spare room.
_COPIES_OF_THE_WEIGHTS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every training stage takes."""
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model that is made")
    parser.add_argument("--metrics", required=True, type=Path, help="JSON-lines file of metrics that is made")


def prepared(model: PreTrainedModel, recipe: TrainingRecipe) -> PreTrainedModel:
    """Makes a model ready to be trained: with the recipe's adapter, on this process's device or sharded over all.

    Args:
        model: as `place` takes it; it is changed in place.
        recipe: adapter, activation checkpointing and dtype.
    """
    if recipe.adapter is not None:
        add_adapter(model, from_dict(AdapterRecipe, recipe.adapter), recipe.seed)
    if recipe.activation_checkpointing:
        recompute_activations(model)
    return place(model, recipe.dtype)


def describe_run(module: str, recipe: Any, inputs: dict[str, str]) -> dict[str, Any]:
    """Everything that determines a training run's result.

    Args:
        module: the stage's module, whose code (and what it imports) is part of the identity.
        recipe: the stage's recipe; how often it saves is left out.
        inputs: content hash of each input table and weights hash of each input model.
    """
    values = to_dict(recipe)
    for part in (values, values.get("trainer", {})):
        part.pop("checkpoint_every", None)
    return {
        "stage": module,
        "recipe": values,
        "inputs": inputs,
        "code": fingerprint(module),
        "device": default_device().type,
    }


def open_run(work: Path, identity: dict[str, Any], *models: nn.Module) -> RunFolder:
    """The run folder for these models, sized by those of their weights that are trained."""
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in trained)
    return RunFolder(work, identity, _COPIES_OF_THE_WEIGHTS * weights)


def publish(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
    metrics: list[dict[str, Any]],
    usage: Usage,
    run: RunFolder,
    **facts: Any,
) -> None:
    """Writes metrics and model, each whole or not at all, and then drops the run's checkpoints.

    An adapter is merged into the weights, so that a published model is always one that needs none.
    """
    manifest = {
        "identity": identity,
        "identity_hash": stable_hash(identity),
        "used": usage.report(),
        "versions": package_versions(),
        **facts,
    }
    weights = whole_weights(model)
    if processes.is_main():
        adapter = identity["recipe"].get("adapter")
        if adapter is not None:
            bare = type(model)(model.config)
            if model.can_generate():  # a scorer has none
                bare.generation_config = model.generation_config
            model = merged(bare, weights, from_dict(AdapterRecipe, adapter))
            weights = whole_weights(model)
        keep_end_tokens(model, tokenizer)
        write_metrics(args.metrics, metrics)
        save_model(args.out, model, tokenizer, manifest, weights)
    collectives.barrier()
    run.delete()


def model_hashes(name: str, path: str | Path) -> dict[str, str]:
    """A model's part of a run's inputs: the hashes of its weights and of its tokenizer."""
    return {f"{name}_weights": weights_hash(path), f"{name}_tokenizer": tokenizer_hash(path)}
