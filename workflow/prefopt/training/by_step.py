"""Samples of a policy while it trains, for its win rate over training steps (Fig. 3, right)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.generation.sample import SampleRecipe, chosen_prompts, sample_rows
from prefopt.lm.models import tokenizer_hash
from prefopt.lm.precision import DTYPES
from prefopt.lm.sharding import gathered
from prefopt.runtime import collectives, processes
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table, write_table
from prefopt.training.checkpoint import RunFolder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByStepRecipe:
    """Sampling during training."""

    points: int  # evenly spaced, after the reference policy itself
    sampling: dict[str, Any]  # see `SampleRecipe`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a trainer that can be sampled."""
    parser.add_argument("--by-step", help="sampling during training, a JSON object; without it there is none")
    parser.add_argument("--run", help="name of the run in the samples table, for --by-step")
    parser.add_argument("--sampled-prompts", type=Path, help="prompts table, for --by-step")
    parser.add_argument("--samples", type=Path, help="samples table that is made, for --by-step")


def sampled_steps(total_steps: int, points: int) -> list[int]:
    """Numbers of steps after which the policy is sampled, 0 and the last among them."""
    return sorted({round(total_steps * i / points) for i in range(points + 1)})


def step_sampler(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    total_steps: int,
) -> StepSampler | None:
    """What samples a policy while it trains; None where that is not asked for.

    Args:
        args: of the stage, see `add_arguments`.
        model: the policy that is trained.
        tokenizer: its own.
        folder: of the run.
        total_steps: optimizer steps of the training, or updates of PPO.
    """
    if args.by_step is None:
        return None
    values = from_json(ByStepRecipe, args.by_step)
    table = read_table(args.sampled_prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    return StepSampler(args, model, tokenizer, table, values, folder, sampled_steps(total_steps, values.points))


class StepSampler:
    """Samples the policy after the steps named; each step's rows lie in the run folder, so that none is drawn again."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        table: pd.DataFrame,
        values: ByStepRecipe,
        folder: RunFolder,
        steps: Sequence[int],
    ) -> None:
        self._model, self._tokenizer, self._values = model, tokenizer, values
        self._recipe = from_dict(SampleRecipe, values.sampling)
        self._prompts, self._hash = chosen_prompts(table, self._recipe), table.attrs["manifest"]["content_hash"]
        self._style = table.attrs["manifest"].get("style", "plain")
        self._run, self._out, self._folder, self._steps = args.run, args.samples, folder, steps
        self._usage = Usage(f"sample {args.run} by step", default_device(), DTYPES[self._recipe.dtype])

    def __call__(self, step: int) -> None:
        if step not in self._steps:
            return
        with gathered(self._model):
            if processes.is_main():
                name = f"{self._run}_step_{step}"
                how = (self._recipe, self._usage, None, self._style)
                rows = sample_rows(self._model, self._tokenizer, self._prompts, name, *how)
                write_table(self._path(step), "samples", rows)
        collectives.barrier()

    def publish(self) -> None:
        """Writes the rows of all steps as one table; each step is a run of its own, the run's name with "_step_N"."""
        if not processes.is_main():
            return
        rows = pd.concat([read_table(self._path(step), "samples") for step in self._steps], ignore_index=True)
        recipe, used = to_dict(self._values), self._usage.report()
        write_table(self._out, "samples", rows, prompts=self._hash, recipe=recipe, used=used)

    def _path(self, step: int) -> Path:
        return self._folder.path / f"samples_{step:06d}.parquet"
