"""The optimal frontier of the KL-constrained problem, from many samples of the reference policy.

At a price beta for a nat, max over pi of E[r] - beta * KL(pi || pi_ref) is solved by pi = pi_ref * exp(r / beta) / Z
(equation 4 of the paper), and its value is beta * log E_ref[exp(r / beta)]. So for every policy whatever, every prompt
and every beta,

    E_pi[r] - beta * KL(pi || pi_ref) <= beta * log E_ref[exp(r / beta)].

Samples of the reference policy alone estimate the right side, and reweighted they are samples of the optimal policy.
The estimate is from below where few samples carry the weight, so it is cut off where the effective sample size is
small: on the embedded writer's own distribution the value is too low by 0.002 at most while that size is 20 or more,
with 256 samples up to a KL of about 2 nats, with 1,024 to 3 and with 4,096 to 4.5.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from prefopt.analysis.texts import write_csv
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimalFrontierRecipe:
    """The prices of a nat, and the effective sample size below which the estimate is not relied on."""

    largest_beta: float
    smallest_beta: float
    betas: int
    min_effective_samples: float


class Optimum(NamedTuple):
    """The optimal policy of each prompt at each beta; float64 [prompts, betas] each."""

    value: np.ndarray  # beta * log E_ref[exp(r / beta)]
    reward: np.ndarray
    kl: np.ndarray  # nats
    effective_samples: np.ndarray  # 1 / sum of squared weights


def optimum(rewards: np.ndarray, betas: np.ndarray) -> Optimum:
    """Reweights samples of the reference policy.

    Args:
        rewards: float [prompts, m], of m samples of the reference policy for each prompt.
        betas: float [betas], each > 0, in units of reward per nat.
    """
    columns = []
    best = rewards.max(axis=1, keepdims=True)
    for beta in betas:
        weights = np.exp((rewards - best) / beta)
        mean = weights.mean(axis=1, keepdims=True)
        value = (best + beta * np.log(mean))[:, 0]
        weights /= mean * rewards.shape[1]
        reward = (weights * rewards).sum(axis=1)
        # KL = sum of w log(m w) = (reward - value) / beta, as log(m w) is (r - value) / beta.
        columns.append((value, reward, (reward - value) / beta, 1 / (weights**2).sum(axis=1)))
    return Optimum(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))


def beta_range(recipe: OptimalFrontierRecipe) -> np.ndarray:
    """The recipe's prices, from large (near the reference policy) to small."""
    return np.geomspace(recipe.largest_beta, recipe.smallest_beta, recipe.betas)


def reward_matrix(scores: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Prompts, and the rewards of their samples, float64 [prompts, m].

    Args:
        scores: scores table of as many samples for each prompt.

    Raises:
        UserError: the prompts have different numbers of samples.
    """
    counts = scores.groupby("prompt_id").size()
    if counts.nunique() != 1:
        raise UserError(f"The prompts have {counts.min()} to {counts.max()} samples: sample each as often.")
    wide = scores.pivot(index="prompt_id", columns="sample_index", values="reward")
    return list(wide.index), wide.to_numpy(dtype=np.float64)


def ceiling_table(rewards: np.ndarray, recipe: OptimalFrontierRecipe) -> pd.DataFrame:
    """A row per beta: mean reward and KL of the optimal policy, standard errors over prompts, and what carries them."""
    betas = beta_range(recipe)
    found = optimum(rewards, betas)
    root = np.sqrt(len(rewards))
    effective = found.effective_samples.mean(axis=0)
    return pd.DataFrame(
        {
            "beta": betas,
            "reward": found.reward.mean(axis=0),
            "reward_se": found.reward.std(axis=0, ddof=1) / root,
            "kl": found.kl.mean(axis=0),
            "kl_se": found.kl.std(axis=0, ddof=1) / root,
            "value": found.value.mean(axis=0),
            "effective_samples": effective,
            "effective_samples_p10": np.percentile(found.effective_samples, 10, axis=0),
            "samples": rewards.shape[1],
            "prompts": len(rewards),
            "reliable": effective >= recipe.min_effective_samples,
        }
    )


def over_seeds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The mean of the seeds' optimal frontiers; what one seed cannot rely on, all cannot."""
    if len(tables) == 1:
        return tables[0]
    groups = pd.concat(tables).groupby(level=0)
    mean = groups.mean(numeric_only=True).assign(reliable=groups["reliable"].all())
    for name in ("reward", "kl"):
        mean[f"{name}_se"] = np.sqrt(mean[f"{name}_se"] ** 2 + groups[name].var() / len(tables))
    return mean[tables[0].columns].astype({"samples": int, "prompts": int})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `optimal_frontier`."""
    parser.add_argument(
        "--scores",
        required=True,
        type=Path,
        nargs="+",
        help="scores tables of many samples of the reference, one a seed",
    )
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the optimal frontier."""
    recipe = from_json(OptimalFrontierRecipe, args.recipe)
    every = [reward_matrix(read_table(path, "scores"))[1] for path in args.scores]
    write_csv(args.out, over_seeds([ceiling_table(rewards, recipe) for rewards in every]))
