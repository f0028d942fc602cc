"""What is taken of a policy while it trains: its samples (Fig. 3, right), or in a sweep their reward and KL (Fig. 2)."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.generation.sample import SampleRecipe, chosen_prompts, sample_rows
from prefopt.lm.models import load_policy, tokenizer_hash
from prefopt.lm.sharding import gathered
from prefopt.rewards.true_reward import TrueReward, load_true_reward, reward_hash
from prefopt.runtime import collectives, processes
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_manifest, read_table, split_of, write_table
from prefopt.training.checkpoint import RunFolder
from prefopt.training.evaluation import EvaluationRecipe, evaluate_policy
from prefopt.training.rollouts import Reward

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesByStep:
    """Sampling during training."""

    points: int  # evenly spaced, after the reference policy itself
    sampling: dict[str, Any]  # see `SampleRecipe`


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationsByStep:
    """Evaluation of a run of a sweep during training."""

    points: int  # evenly spaced, after the reference policy itself
    method: str  # whose frontier it is of, see `experiment.runs.group`
    seed: int  # of the training
    conservativeness: float | None  # DPO's or KTO's beta, PPO's target KL, unlikelihood's alpha; None has none
    evaluation: dict[str, Any]  # see `EvaluationRecipe`
    reward: dict[str, Any]  # kind, max_length and batch_size of the true reward

    def rows(self, run: str, step: int, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the evaluations table: what was found of a run's policy after a step, whose means are logged."""
        means = (float(np.mean([row[key] for row in found])) for key in ("reward", "kl"))
        logger.info("%s: step %d, true reward %.3f, KL %.2f nats", run, step, *means)
        conservativeness = math.nan if self.conservativeness is None else self.conservativeness
        named = {"run": run, "method": self.method, "seed": self.seed}
        return [{**named, "step": step, "conservativeness": conservativeness, **row} for row in found]


def add_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Arguments of a stage that can look at a policy step by step, or must."""
    parser.add_argument("--by-step", required=required, help="what is taken, a JSON object; without it nothing is")
    parser.add_argument("--run", required=required, help="name of the run in the table that is made of it")
    parser.add_argument("--sampled-prompts", required=required, type=Path, help="prompts table, for --by-step")
    parser.add_argument("--samples", type=Path, help="samples table that is made, for --by-step")
    parser.add_argument("--evaluations", type=Path, help="evaluations table that is made in its place")
    parser.add_argument("--true-reward-model", type=Path, help="model or n-grams that are the true reward")


def steps_between(total_steps: int, points: int) -> list[int]:
    """Numbers of steps after which the policy is looked at, 0 and the last among them."""
    return sorted({round(total_steps * i / points) for i in range(points + 1)})


def inputs_of(args: argparse.Namespace) -> dict[str, str]:
    """What determines the table that is made, by name: a run that was cut short goes on with equal ones alone."""
    if args.by_step is None:
        return {}
    reward = reward_hash(args.true_reward_model)
    return {
        "by_step": args.by_step,
        "sampled_prompts": read_manifest(args.sampled_prompts)["content_hash"],
        **({} if reward is None else {"true_reward": reward}),
    }


def watcher(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    total_steps: int,
    reference: nn.Module | None = None,
    true_reward: TrueReward | None = None,
    learned: Reward | None = None,
) -> Watcher | None:
    """What looks at a policy while it trains; None where that is not asked for.

    Args:
        args: of the stage, see `add_arguments`.
        model: the policy that is trained.
        tokenizer: its own.
        folder: of the run.
        total_steps: optimizer steps of the training, or updates of PPO.
        reference: the reference policy, where the trainer has it in memory; else it is the model of `--model`.
        true_reward: the true reward, where the trainer has it.
        learned: the reward that the policy learns from, where that is a reward model's.
    """
    if args.by_step is None:
        return None
    what = taken(args, tokenizer, reference, true_reward, learned)
    return Watcher(model, folder, steps_between(total_steps, what.points), what)


@dataclasses.dataclass(frozen=True)
class Taken:
    """What is taken of a policy."""

    points: int  # evenly spaced, after the reference policy itself
    dtype: str  # of the forward passes
    table: str  # kind of the table that is made
    out: Path
    # Of a policy after a step; called in one process, in which all of the weights are.
    rows: Callable[[PreTrainedModel, int], list[dict[str, Any]]]
    facts: Callable[
        [dict[str, Any], Usage], dict[str, Any]
    ]  # of the table's manifest, by the training's identity and usage


def taken(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    reference: nn.Module | None = None,
    true_reward: TrueReward | None = None,
    learned: Reward | None = None,
) -> Taken:
    """What the stage is asked to take, samples or evaluations; see `watcher`."""
    prompts = read_table(args.sampled_prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    if args.evaluations is None:
        return _sampled(args, prompts, tokenizer)
    return _evaluated(args, prompts, tokenizer, reference, true_reward, learned)


def _sampled(args: argparse.Namespace, prompts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Taken:
    """Takes samples; each step is a run of its own, the run's name with "_step_N"."""
    values = from_json(SamplesByStep, args.by_step)
    recipe = from_dict(SampleRecipe, values.sampling)
    chosen, style = chosen_prompts(prompts, recipe), prompts.attrs["manifest"].get("style", "plain")
    usage = Usage(f"sample {args.run} by step", default_device(), recipe.dtype)

    def rows(model: PreTrainedModel, step: int) -> list[dict[str, Any]]:
        return sample_rows(model, tokenizer, chosen, f"{args.run}_step_{step}", recipe, usage, None, style)

    def facts(identity: dict[str, Any], training: Usage) -> dict[str, Any]:
        hashed = prompts.attrs["manifest"]["content_hash"]
        return {"prompts": hashed, "recipe": to_dict(values), "used": usage.report()}

    return Taken(values.points, recipe.dtype, "samples", args.samples, rows, facts)


def _evaluated(
    args: argparse.Namespace,
    prompts: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    reference: nn.Module | None,
    true_reward: TrueReward | None,
    learned: Reward | None,
) -> Taken:
    """Takes the true reward and the exact KL of samples, in memory."""
    if processes.count() > 1:
        raise UserError(
            "The policy of a sweep is evaluated as it trains in one process: start this stage without --processes."
        )
    values = from_json(EvaluationsByStep, args.by_step)
    recipe = from_dict(EvaluationRecipe, values.evaluation)
    test = split_of(prompts, "test", args.sampled_prompts).head(recipe.prompts)
    device = default_device()
    fixed = load_policy(args.model, device=device)[0] if reference is None else reference
    reward = true_reward or load_true_reward(folder=args.true_reward_model, device=device, **values.reward)

    def rows(model: PreTrainedModel, step: int) -> list[dict[str, Any]]:
        return values.rows(args.run, step, evaluate_policy(model, fixed, tokenizer, test, reward, recipe, learned))

    def facts(identity: dict[str, Any], training: Usage) -> dict[str, Any]:
        return {"identity": identity, "recipe": to_dict(values), "used": training.report()}

    return Taken(values.points, recipe.dtype, "evaluations", args.evaluations, rows, facts)


class Watcher:
    """Rows of a policy after the steps named; each step's lie in the run folder, so that none is made again.

    Args:
        model: the policy.
        folder: of the run.
        steps: numbers of steps.
        taken: what is taken of it.
    """

    def __init__(self, model: PreTrainedModel, folder: RunFolder, steps: Sequence[int], taken: Taken) -> None:
        self._model, self._folder, self._steps, self._taken = model, folder, steps, taken

    def __call__(self, step: int) -> None:
        if step not in self._steps:
            return
        with gathered(self._model):
            if processes.is_main():
                write_table(self._path(step), self._taken.table, self._taken.rows(self._model, step))
        collectives.barrier()

    def publish(self, identity: dict[str, Any], usage: Usage) -> None:
        """Writes the rows of all steps as one table."""
        if not processes.is_main():
            return
        name = self._taken.table
        rows = pd.concat([read_table(self._path(step), name) for step in self._steps], ignore_index=True)
        write_table(self._taken.out, name, rows, **self._taken.facts(identity, usage))

    def _path(self, step: int) -> Path:
        return self._folder.path / f"{self._taken.table}_{step:06d}.parquet"
