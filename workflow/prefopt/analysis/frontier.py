"""The stage `frontier`: reward and KL of every checkpoint of every run, and how far each is from what is possible."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from prefopt.analysis.optimal_frontier import Optimum, optimum, reward_matrix
from prefopt.analysis.texts import write_csv
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json
from prefopt.store.tables import read_csv, read_table

CHECKPOINT = ["run", "method", "seed", "conservativeness", "step"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrontierRecipe:
    """Seeds of what was trained and sampled."""

    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """Every checkpoint on every prompt.

    `checkpoints` has a row for each, with the columns `CHECKPOINT`, samples and tokens; `reward` and `kl` are
    float64 [prompts, checkpoints], means over a prompt's samples.
    """

    checkpoints: pd.DataFrame
    prompts: list[str]
    reward: np.ndarray
    kl: np.ndarray


def read_evaluations(paths: Sequence[Path], seeds: Sequence[int]) -> Measured:
    """The evaluations of all runs, which must be on the same prompts.

    Args:
        paths: evaluations tables, all runs of a seed together.
        seeds: of what was trained and sampled; a run's own seed, which its name tells, is not told from it.

    Raises:
        UserError: a run has other prompts than the first, or a checkpoint lacks some.
    """
    runs = len(paths) // len(seeds)
    tables = [read_table(path, "evaluations").assign(seed=seeds[i // runs]) for i, path in enumerate(paths)]
    for path, table in zip(paths, tables, strict=True):
        if set(table["prompt_id"]) != set(tables[0]["prompt_id"]):
            raise UserError(f"{path} was evaluated on other prompts than {paths[0]}: run it again.")
    rows = pd.concat(tables, ignore_index=True)
    grouped = rows.groupby(CHECKPOINT, sort=False, dropna=False)
    checkpoints = grouped.agg(samples=("reward", "size"), tokens=("tokens", "mean")).reset_index()
    rows["checkpoint"] = grouped.ngroup()
    means = rows.groupby(["prompt_id", "checkpoint"])[["reward", "kl"]].mean().unstack()
    if means.isna().to_numpy().any():
        raise UserError("A checkpoint was not evaluated on every prompt: run its run again.")
    reward, kl = (means[name].to_numpy(dtype=np.float64) for name in ("reward", "kl"))
    return Measured(checkpoints, list(means.index), reward, kl)


def of_seed(measured: Measured, seed: int) -> Measured:
    """The checkpoints of one seed."""
    chosen = (measured.checkpoints["seed"] == seed).to_numpy()
    checkpoints = measured.checkpoints[chosen].reset_index(drop=True)
    return Measured(checkpoints, measured.prompts, measured.reward[:, chosen], measured.kl[:, chosen])


def upper_frontier(kl: np.ndarray, reward: np.ndarray) -> list[int]:
    """The points of the least concave, non-decreasing majorant, from the smallest KL to the largest reward.

    All of it is attainable: a policy drawn by lot from two has the mean of their rewards, and as the KL is convex at
    most the mean of their KLs.

    Args:
        kl: float [points].
        reward: float [points].

    Returns:
        Indices of its vertices in the order of their KL.
    """
    hull: list[int] = []
    # Of several points at one KL the best comes first and the others fall below the line.
    for i in sorted(range(len(kl)), key=lambda i: (kl[i], -reward[i])):
        if hull and reward[i] <= reward[hull[-1]]:
            continue
        while len(hull) > 1 and _above(hull[-2], hull[-1], i, kl, reward):
            hull.pop()
        hull.append(i)
    return hull


def _above(a: int, b: int, c: int, kl: np.ndarray, reward: np.ndarray) -> bool:
    """Whether b lies on or below the line from a to c."""
    return bool((reward[b] - reward[a]) * (kl[c] - kl[a]) <= (reward[c] - reward[a]) * (kl[b] - kl[a]))


def frontier_table(measured: Measured) -> pd.DataFrame:
    """A row per run and checkpoint, with standard errors over prompts; `on_frontier` marks its method's in its seed."""
    root = np.sqrt(len(measured.prompts))
    table = measured.checkpoints.assign(
        reward=measured.reward.mean(axis=0),
        reward_se=measured.reward.std(axis=0, ddof=1) / root,
        kl=measured.kl.mean(axis=0),
        kl_se=measured.kl.std(axis=0, ddof=1) / root,
        prompts=len(measured.prompts),
        on_frontier=False,
    )
    for _, rows in table.groupby(["seed", "method"]):
        vertices = upper_frontier(rows["kl"].to_numpy(), rows["reward"].to_numpy())
        table.loc[rows.index[vertices], "on_frontier"] = True
    return table


def above_ceiling(measured: Measured, prompts: list[str], found: Optimum, betas: np.ndarray) -> pd.DataFrame:
    """How far each checkpoint's mean reward is above the largest that its mean KL allows; negative for any policy.

    At the price beta that the checkpoint's KL is worth, reward - beta * KL is compared with the optimal value on the
    same prompts. Beyond the KL of the smallest beta given nothing is known.

    Args:
        measured: the checkpoints.
        prompts: those of the optimum.
        found: the optimum at the betas that can be relied on.
        betas: float [betas], falling.

    Returns:
        Columns above_ceiling and above_ceiling_z, the former over its standard error; NaN where nothing is known.
    """
    rows = [measured.prompts.index(prompt) for prompt in prompts]
    reward, kl, value = measured.reward[rows], measured.kl[rows], found.value.mean(axis=0)
    result = []
    for k in range(reward.shape[1]):
        if len(betas) == 0 or kl[:, k].mean() > found.kl[:, -1].mean():
            result.append((np.nan, np.nan))
            continue
        price = int(np.argmin(value + betas * kl[:, k].mean()))
        gap = reward[:, k] - betas[price] * kl[:, k] - found.value[:, price]
        result.append((gap.mean(), gap.mean() / max(gap.std(ddof=1) / np.sqrt(len(gap)), 1e-12)))
    return pd.DataFrame(result, columns=["above_ceiling", "above_ceiling_z"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `frontier`."""
    parser.add_argument("--evaluations", required=True, type=Path, nargs="+", help="evaluations of each run")
    parser.add_argument(
        "--scores",
        required=True,
        type=Path,
        nargs="+",
        help="scores tables of the optimal frontier's samples, one a seed",
    )
    parser.add_argument("--ceiling", required=True, type=Path, help="CSV of the optimal frontier")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table of every checkpoint."""
    seeds = from_json(FrontierRecipe, args.recipe).seeds
    measured = read_evaluations(args.evaluations, seeds)
    ceiling = read_csv(args.ceiling)
    betas = ceiling.loc[ceiling["reliable"], "beta"].to_numpy()
    table = frontier_table(measured).assign(above_ceiling=np.nan, above_ceiling_z=np.nan)
    for seed, path in zip(seeds, args.scores, strict=True):
        prompts, rewards = reward_matrix(read_table(path, "scores"))
        if lacking := sorted(set(prompts) - set(measured.prompts)):
            raise UserError(f"The runs were not evaluated on the prompt {lacking[0]!r} of {path}: run them again.")
        if len(betas):
            above = above_ceiling(of_seed(measured, seed), prompts, optimum(rewards, betas), betas)
            table.loc[table["seed"] == seed, list(above.columns)] = above.to_numpy()
    write_csv(args.out, table)
