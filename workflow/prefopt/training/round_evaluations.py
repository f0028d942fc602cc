"""What is taken of a run that is trained in rounds after each, from the reference policy on: samples, or reward and KL."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from prefopt.experiment.recipes import from_dict, from_json
from prefopt.lm.models import check_tokenizer, load_policy, load_scorer, weights_hash
from prefopt.rewards.learned import score_rows
from prefopt.rewards.true_reward import reward_hash
from prefopt.runtime.usage import Usage, default_device
from prefopt.store.tables import read_manifest, write_table
from prefopt.training import by_step
from prefopt.training.evaluation import EvaluationRecipe
from prefopt.training.stage import model_hashes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `round_evaluations`."""
    parser.add_argument("--model", required=True, type=Path, help="the reference policy")
    parser.add_argument("--rounds", required=True, type=Path, nargs="+", help="the policy after each round, in order")
    parser.add_argument("--reward-model", type=Path, help="the learned reward, which evaluations tell too")
    by_step.add_arguments(parser, required=True)


def run(args: argparse.Namespace) -> None:
    """Writes the table of all rounds; a step is a round, and the reference policy is before the first."""
    device, folders = default_device(), [args.model, *args.rounds]
    reference, tokenizer = load_policy(args.model, device=device)
    learned = None
    for folder in [*args.rounds, *([] if args.reward_model is None else [args.reward_model])]:
        check_tokenizer(folder, args.model)
    if args.reward_model is not None:
        recipe = from_dict(EvaluationRecipe, from_json(by_step.EvaluationsByStep, args.by_step).evaluation)
        scorer = load_scorer(args.reward_model, device=device)
        learned = functools.partial(score_rows, scorer, token_budget=recipe.token_budget, dtype=recipe.dtype)
    taken = by_step.taken(args, tokenizer, reference, learned=learned)
    usage = Usage("round_evaluations", device, taken.dtype, models=2)
    rows: list[dict[str, Any]] = []
    for step, folder in enumerate(folders):
        rows += taken.rows(reference if step == 0 else load_policy(folder, device=device)[0], step)
    usage.add(len(rows), 0)
    identity = {
        "prompts": read_manifest(args.sampled_prompts)["content_hash"],
        "rounds": [model_hashes("policy", folder) for folder in args.rounds],
        "reference_weights": weights_hash(args.model),
        "reward_weights": reward_hash(args.true_reward_model),
        "learned_reward_weights": reward_hash(args.reward_model),
    }
    write_table(taken.out, taken.table, rows, **taken.facts(identity, usage))
