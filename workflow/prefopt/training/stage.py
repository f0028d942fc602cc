"""What every training stage does around its loop: arguments, identity of the run, publishing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from prefopt.files import stable_hash
from prefopt.fingerprint import fingerprint
from prefopt.lm.models import save_model, tokenizer_hash, weights_hash
from prefopt.recipes import to_dict
from prefopt.tables import package_versions
from prefopt.training.checkpoint import RunFolder
from prefopt.training.loop import write_metrics
from prefopt.usage import Usage, default_device

# Checkpoint (weights and at most two optimizer moments), best weights, the model published and spare room.
_COPIES_OF_THE_WEIGHTS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every training stage takes."""
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="folder of the model that is made")
    parser.add_argument("--metrics", required=True, type=Path, help="JSON-lines file of metrics that is made")


def describe_run(module: str, recipe: Any, inputs: dict[str, str]) -> dict[str, Any]:
    """Everything that determines a training run's result.

    Args:
        module: the stage's module, whose code (and what it imports) is part of the identity.
        recipe: the stage's recipe.
        inputs: content hash of each input table and weights hash of each input model.
    """
    return {
        "stage": module,
        "recipe": to_dict(recipe),
        "inputs": inputs,
        "code": fingerprint(module),
        "device": default_device().type,
    }


def open_run(work: Path, identity: dict[str, Any], *models: nn.Module) -> RunFolder:
    """The run folder for these models, sized by their weights."""
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    return RunFolder(work, identity, _COPIES_OF_THE_WEIGHTS * weights)


def publish(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
    metrics: list[dict[str, Any]],
    usage: Usage,
    run: RunFolder,
    **facts: Any,
) -> None:
    """Writes metrics and model, each whole or not at all, and then drops the run's checkpoints."""
    manifest = {
        "identity": identity,
        "identity_hash": stable_hash(identity),
        "used": usage.report(),
        "versions": package_versions(),
        **facts,
    }
    write_metrics(args.metrics, metrics)
    save_model(args.out, model, tokenizer, manifest)
    run.delete()


def model_hashes(name: str, path: str | Path) -> dict[str, str]:
    """A model's part of a run's inputs: the hashes of its weights and of its tokenizer."""
    return {f"{name}_weights": weights_hash(path), f"{name}_tokenizer": tokenizer_hash(path)}
