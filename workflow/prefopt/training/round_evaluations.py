"""A run of a sweep that is trained in rounds: true reward and exact KL of the policy after each, from the reference policy on."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from prefopt.experiment.recipes import from_dict, from_json, to_dict
from prefopt.lm.models import check_tokenizer, load_policy, load_scorer, tokenizer_hash, weights_hash
from prefopt.rewards.learned import score_rows
from prefopt.rewards.true_reward import load_true_reward, reward_hash
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_table, split_of, write_table
from prefopt.training.by_step import EvaluationsByStep
from prefopt.training.evaluation import EvaluationRecipe, evaluate_policy
from prefopt.training.stage import model_hashes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `round_evaluations`."""
    parser.add_argument("--model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--rounds", required=True, type=Path, nargs="+", help="the policy after each round, in order")
    parser.add_argument("--run", required=True, help="name of the run in the table")
    parser.add_argument("--prompts", required=True, type=Path, help="prompts table")
    parser.add_argument("--true-reward-model", type=Path, help="model or n-grams that are the true reward")
    parser.add_argument("--reward-model", type=Path, help="the learned reward, which is told too")
    parser.add_argument("--recipe", required=True, help="see `training.by_step.EvaluationsByStep`, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="evaluations table that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the evaluations of all rounds; a step is a round, and the reference policy is before the first."""
    values = from_json(EvaluationsByStep, args.recipe)
    recipe = from_dict(EvaluationRecipe, values.evaluation)
    prompts = read_table(args.prompts, "prompts", tokenizer_hash=tokenizer_hash(args.model))
    test = split_of(prompts, "test", args.prompts).head(recipe.prompts)
    device = default_device()
    usage = Usage("round_evaluations", device, torch.float32, models=2)
    reference, tokenizer = load_policy(args.model, device=device)
    reward = load_true_reward(folder=args.true_reward_model, device=device, **values.reward)
    learned = None
    for folder in [*args.rounds, *([] if args.reward_model is None else [args.reward_model])]:
        check_tokenizer(folder, args.model)
    if args.reward_model is not None:
        scorer = load_scorer(args.reward_model, device=device)
        learned = functools.partial(score_rows, scorer, token_budget=recipe.token_budget, dtype=recipe.dtype)
    rows: list[dict[str, Any]] = []
    for step, folder in enumerate([args.model, *args.rounds]):
        policy = reference if step == 0 else load_policy(folder, device=device)[0]
        rows += values.rows(
            args.run, step, evaluate_policy(policy, reference, tokenizer, test, reward, recipe, learned)
        )
        usage.add(len(test) * recipe.samples_per_prompt, 0)
    write_table(
        args.out,
        "evaluations",
        rows,
        recipe=to_dict(values),
        prompts=prompts.attrs["manifest"]["content_hash"],
        rounds=[model_hashes("policy", folder) for folder in args.rounds],
        reference_weights=weights_hash(args.model),
        reward_weights=reward_hash(args.true_reward_model),
        learned_reward_weights=reward_hash(args.reward_model),
        used=usage.report(),
    )
