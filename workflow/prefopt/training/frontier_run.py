"""One run of the sentiment frontier (section 6.1): a method at one conservativeness, evaluated as it trains.

The run's own checkpoints are evaluated in memory, so no model is written or loaded for any of them. What a run
leaves is the table of its evaluations.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.lm.chat import end_tokens
from prefopt.lm.models import check_tokenizer, load_policy, load_scorer, new_scorer, tokenizer_hash
from prefopt.lm.sharding import recompute_activations
from prefopt.rewards.true_reward import TrueReward, load_true_reward, reward_hash
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table, write_table
from prefopt.training import ppo, stage
from prefopt.training.checkpoint import RunFolder
from prefopt.training.evaluation import EvaluationRecipe, completed_texts, evaluate_policy
from prefopt.training.kto import KTORecipe, label_examples
from prefopt.training.loop import Examples, train, write_metrics
from prefopt.training.preference import PreferenceRecipe, preference_examples
from prefopt.training.recipe import TrainingRecipe
from prefopt.training.reference import read_reference
from prefopt.training.sft import SFTRecipe, split_of, table_examples

logger = logging.getLogger(__name__)

_TRAINERS: dict[str, type[Any]] = {
    "sft": SFTRecipe,
    "preference": PreferenceRecipe,
    "kto": KTORecipe,
    "ppo": ppo.PPORecipe,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierRunRecipe:
    """A run of the sweep."""

    run: str
    method: str  # whose frontier it is of, see `experiment.runs.group`
    kind: Literal["sft", "preference", "kto", "ppo"]  # of trainer
    learned_reward: bool  # PPO's reward is a reward model, else the true reward
    models: int  # in memory: a policy and the reference that it is compared with; PPO's value network and reward model
    conservativeness: float | None  # DPO's or KTO's beta, PPO's target KL, unlikelihood's alpha; None has none
    interval: int  # optimizer steps (of PPO: updates) between two checkpoints
    checkpoints: int  # evaluated after the reference policy itself, step 0
    trainer: dict[str, Any]  # values of the method's trainer
    evaluation: dict[str, Any]  # see `EvaluationRecipe`
    reward: dict[str, Any]  # kind, max_length and batch_size of the true reward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `frontier_run`."""
    parser.add_argument("--model", required=True, type=Path, help="the reference policy, also the start")
    parser.add_argument("--data", required=True, type=Path, help="preferences table, or labels table of KTO")
    parser.add_argument("--reference", required=True, type=Path, help="reference log-probabilities of that table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--reward-model", type=Path, help="the learned reward, for the method ppo")
    parser.add_argument(
        "--true-reward-model", type=Path, help="classifier that is the true reward, unless it is a rule"
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--work", required=True, type=Path, help="folder for checkpoints")
    parser.add_argument("--out", required=True, type=Path, help="evaluations table that is made")
    parser.add_argument("--metrics", required=True, type=Path, help="JSON-lines file of metrics that is made")


def run(args: argparse.Namespace) -> None:
    """Trains one policy of the sweep and writes the evaluations of its checkpoints."""
    recipe = from_json(FrontierRunRecipe, args.recipe)
    trainer = from_dict(_TRAINERS[recipe.kind], recipe.trainer)
    evaluation = from_dict(EvaluationRecipe, recipe.evaluation)
    prompts = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    device = default_device()
    true_reward = load_true_reward(folder=args.true_reward_model, device=device, **recipe.reward)
    policy, tokenizer = load_policy(args.model, device=device)
    reference, _ = load_policy(args.model, device=device)
    inputs = {
        "prompts": prompts.attrs["manifest"]["content_hash"],
        **stage.model_hashes("reference", args.model),
        **({"true_reward": hashed} if (hashed := reward_hash(args.true_reward_model)) else {}),
    }
    usage = Usage("frontier_run", device, torch.float32, models=recipe.models)
    torch.manual_seed(trainer.seed)

    if trainer.activation_checkpointing:
        recompute_activations(policy)
    learned = None
    if isinstance(trainer, ppo.PPORecipe):
        models, reward_inputs = _ppo_models(args, recipe, trainer, policy, reference, tokenizer, true_reward)
        inputs |= reward_inputs
        trained = [models.policy, models.value]
        learned = models.reward if recipe.learned_reward else None
    else:
        training, validation, data_inputs = _examples(args, recipe, trainer)
        inputs |= data_inputs
        trained = [policy]

    identity = stage.describe_run(__name__, recipe, inputs)
    test = split_of(prompts, "test", args.prompts).head(evaluation.prompts)
    with stage.open_run(args.work, identity, *trained) as folder:

        def evaluate(step: int) -> None:
            if step % recipe.interval:
                return
            rows = evaluate_policy(policy, reference, tokenizer, test, true_reward, evaluation, learned)
            named = {"run": recipe.run, "method": recipe.method, "seed": trainer.seed, "step": step}
            value = math.nan if recipe.conservativeness is None else recipe.conservativeness
            write_table(
                _evaluation_path(folder, step),
                "evaluations",
                [{**named, "conservativeness": value, **row} for row in rows],
            )
            reward, kl = (float(np.mean([row[key] for row in rows])) for key in ("reward", "kl"))
            logger.info("%s: step %d, true reward %.3f, KL %.2f nats", recipe.run, step, reward, kl)

        if isinstance(trainer, ppo.PPORecipe):
            pool = split_of(prompts, "train", args.prompts)
            ends = end_tokens(tokenizer, policy)
            metrics = ppo.train(models, pool, None, trainer, ends, folder, usage, hook=evaluate)
        else:
            metrics = train(
                *(recipe.run, policy, training, validation, trainer, folder, usage),
                total_steps=recipe.interval * recipe.checkpoints,
                hook=evaluate,
            )
        steps = range(0, recipe.interval * recipe.checkpoints + 1, recipe.interval)
        tables = [read_table(_evaluation_path(folder, step), "evaluations") for step in steps]
        write_metrics(args.metrics, metrics)
        write_table(
            args.out,
            "evaluations",
            pd.concat(tables, ignore_index=True),
            identity=identity,
            recipe=to_dict(recipe),
            used=usage.report(),
        )
        folder.delete()


def _evaluation_path(folder: RunFolder, step: int) -> Path:
    return folder.path / f"evaluation_{step:06d}.parquet"


def _examples(
    args: argparse.Namespace, recipe: FrontierRunRecipe, trainer: TrainingRecipe
) -> tuple[Examples, Examples, dict[str, str]]:
    """Training and validation examples of a method that learns from fixed pairs or labels, and their hash."""
    name = "labels" if isinstance(trainer, KTORecipe) else "preferences"
    data = read_table(args.data, name, tokenizer_hash=tokenizer_hash(args.model))
    reference = read_reference(args.reference, args.model, data)

    def examples(split: str) -> Examples:
        rows = split_of(data, split, args.data)
        if isinstance(trainer, PreferenceRecipe):
            return preference_examples(rows, reference.loc[rows.index], trainer)
        if isinstance(trainer, KTORecipe):
            return label_examples(rows, reference.loc[rows.index], trainer)
        return table_examples(rows, "pair_id", "chosen_ids")

    return examples("train"), examples("validation"), {"data": data.attrs["manifest"]["content_hash"]}


def _ppo_models(
    args: argparse.Namespace,
    recipe: FrontierRunRecipe,
    trainer: ppo.PPORecipe,
    policy: Any,
    reference: Any,
    tokenizer: Any,
    true_reward: TrueReward,
) -> tuple[ppo.Models, dict[str, str]]:
    """The four models of PPO: the learned reward with a value network from it, or the true reward with a new one."""
    device = default_device()
    if recipe.learned_reward and args.reward_model is None:
        raise UserError(f"{recipe.run}: {recipe.method} learns from a reward model; give --reward-model.")
    start = load_scorer(args.reward_model) if recipe.learned_reward else new_scorer(args.model, seed=trainer.seed)[0]
    if recipe.learned_reward:
        check_tokenizer(args.reward_model, args.model)
    value = start.to(device)
    if trainer.activation_checkpointing:
        recompute_activations(value)
    if recipe.learned_reward:
        learned = ppo.learned_reward(load_scorer(args.reward_model, device=device), trainer)
        return ppo.Models(policy, value, reference, learned), stage.model_hashes("reward", args.reward_model)

    def reward(rows: Any) -> torch.Tensor:
        return true_reward(completed_texts(tokenizer, rows)).view(len(rows), -1)

    return ppo.Models(policy, value, reference, reward, learned_reward=False), {}
