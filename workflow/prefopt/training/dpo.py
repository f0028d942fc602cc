"""Direct preference optimization: one classification-like loss on pairs, no reference model in memory.

On request the policy is also sampled while it trains, for its win rate over training steps (Fig. 3, right).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.generation.sample import SampleRecipe, chosen_prompts, sample_rows
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.models import load_policy, tokenizer_hash
from prefopt.lm.precision import DTYPES
from prefopt.lm.sharding import gathered
from prefopt.objectives import dpo_loss, ipo_loss
from prefopt.runtime import collectives, processes
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table, write_table
from prefopt.training import stage
from prefopt.training.checkpoint import RunFolder
from prefopt.training.loop import Examples, train
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByStepRecipe:
    """Sampling during training."""

    points: int  # evenly spaced, after the reference policy itself
    sampling: dict[str, Any]  # see `SampleRecipe`


def sampled_steps(total_steps: int, points: int) -> list[int]:
    """Numbers of steps after which the policy is sampled, 0 and the last among them."""
    return sorted({round(total_steps * i / points) for i in range(points + 1)})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `dpo`."""
    stage.add_arguments(parser)
    parser.add_argument("--model", required=True, type=Path, help="the reference policy, also the start")
    parser.add_argument("--data", required=True, type=Path, help="preferences table")
    parser.add_argument("--reference", required=True, type=Path, help="reference_logprobs table")
    parser.add_argument("--by-step", help="sampling during training, a JSON object; without it there is none")
    parser.add_argument("--prompts", type=Path, help="prompts table, for --by-step")
    parser.add_argument("--samples", type=Path, help="samples table that is made, for --by-step")


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
        if args.by_step is None:
            metrics = train("dpo", model, training, validation, recipe, folder, usage)
        else:
            values = from_json(ByStepRecipe, args.by_step)
            table = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
            steps = sampled_steps(recipe.epochs * math.ceil(len(training.ids) / recipe.batch_size), values.points)
            sampler = _StepSampler(model, tokenizer, table, from_dict(SampleRecipe, values.sampling), folder, steps)
            metrics = train("dpo", model, training, validation, recipe, folder, usage, hook=sampler)
            if processes.is_main():
                sampler.publish(args.samples, to_dict(values))
        stage.publish(args, model, tokenizer, identity, metrics, usage, folder)


class _StepSampler:
    """Samples the policy after the steps named; each step's rows lie in the run folder, so that none is drawn again."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        table: pd.DataFrame,
        recipe: SampleRecipe,
        folder: RunFolder,
        steps: Sequence[int],
    ) -> None:
        self._model, self._tokenizer, self._recipe = model, tokenizer, recipe
        self._prompts, self._hash = chosen_prompts(table, recipe), table.attrs["manifest"]["content_hash"]
        self._folder, self._steps = folder, steps
        self._usage = Usage("sample dpo by step", default_device(), DTYPES[recipe.dtype])

    def __call__(self, step: int) -> None:
        if step not in self._steps:
            return
        with gathered(self._model):
            if processes.is_main():
                arguments = (self._model, self._tokenizer, self._prompts, f"dpo_step_{step}", self._recipe, self._usage)
                write_table(self._path(step), "samples", sample_rows(*arguments))
        collectives.barrier()

    def publish(self, path: Path, recipe: dict[str, Any]) -> None:
        """Writes the rows of all steps as one table; their method is "dpo_step_" and the step."""
        tables = [read_table(self._path(step), "samples") for step in self._steps]
        rows = pd.concat(tables, ignore_index=True)
        write_table(path, "samples", rows, prompts=self._hash, recipe=recipe, used=self._usage.report())

    def _path(self, step: int) -> Path:
        return self._folder.path / f"samples_{step:06d}.parquet"
