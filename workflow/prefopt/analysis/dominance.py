"""The stage `dominance`: how much more reward one method's frontier gives than another's at the same KL.

A frontier is made of the best of many checkpoints, and the best of many is partly the luckiest. So its vertices are
selected on one half of the prompts and measured on the other, then the other way round, and the two are averaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from prefopt.analysis.frontier import Measured, of_seed, read_evaluations, upper_frontier
from prefopt.analysis.statistics import mean_over_seeds
from prefopt.analysis.texts import write_csv
from prefopt.experiment.recipes import from_json

_GRID = 201
# A frontier that ends at a smaller KL is the reference policy alone.
_SMALLEST_RANGE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class DominanceRecipe:
    """Methods, intervals, and the KLs at which the difference is also given."""

    methods: tuple[str, ...]  # each pair is compared once, the earlier with the later
    seeds: tuple[int, ...]  # of what was trained and sampled
    confidence: float
    bootstrap: int
    seed: int
    at_kl: tuple[float, ...]


def weights_of_resamples(prompts: int, recipe: DominanceRecipe) -> tuple[np.ndarray, np.ndarray]:
    """How much each prompt counts in each half, for the prompts as they are and for each resample.

    Args:
        prompts: how many there are.
        recipe: number of resamples and seed.

    Returns:
        Two arrays, float64 [1 + bootstrap, prompts], whose rows add up to 1. Prompts are resampled within their
        half, so that none is in both, and jointly for all runs, so that what is hard in a prompt cancels.
    """
    rng = np.random.default_rng(recipe.seed)
    halves = np.array_split(rng.permutation(prompts), 2)
    weights = np.zeros((2, 1 + recipe.bootstrap, prompts))
    for half, members in enumerate(halves):
        weights[half, 0, members] = 1
        drawn = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=recipe.bootstrap)
        weights[half, 1:, members] = drawn.T
    weights /= weights.sum(axis=2, keepdims=True)
    return weights[0], weights[1]


def curves(
    measured: Measured, chosen: np.ndarray, weights: tuple[np.ndarray, np.ndarray], grid: np.ndarray
) -> np.ndarray:
    """A method's frontier on a grid of KLs, cross-fitted, for each resample.

    Args:
        measured: all checkpoints.
        chosen: bool [checkpoints], those of the method; among them the reference policy, step 0.
        weights: see `weights_of_resamples`.
        grid: float [points], KLs.

    Returns:
        float64 [1 + bootstrap, points]. Between two vertices the frontier is the line that mixing the two policies
        attains; beyond the last it stays level. The measured vertices are joined as they are: taking their majorant
        again would choose the lucky ones.
    """
    means = [(w @ measured.reward[:, chosen], w @ measured.kl[:, chosen]) for w in weights]
    result = np.zeros((len(weights[0]), len(grid)))
    for selecting, measuring in ((0, 1), (1, 0)):
        for i in range(len(result)):
            reward, kl = means[selecting][0][i], means[selecting][1][i]
            vertices = upper_frontier(kl, reward)
            there, gained = means[measuring][1][i][vertices], means[measuring][0][i][vertices]
            order = np.argsort(there, kind="stable")
            result[i] += 0.5 * np.interp(grid, there[order], gained[order])
    return result


def frontier_end(measured: Measured, chosen: np.ndarray) -> float:
    """The KL at which a method's frontier on all prompts ends."""
    kl, reward = measured.kl[:, chosen].mean(axis=0), measured.reward[:, chosen].mean(axis=0)
    return float(kl[upper_frontier(kl, reward)[-1]])


def dominance_table(measured: Measured, recipe: DominanceRecipe) -> pd.DataFrame:
    """A row per pair of methods.

    Columns: method and other; kl_from and kl_to, the range that both frontiers cover; mean_difference of the reward
    over it, method less other, with its interval; area, that times the range; smallest_difference and
    largest_difference; share_above, the share of the range in which the method's frontier is higher;
    difference_at_K with its interval for each K of the recipe; seeds, how many. Numbers are NaN where there is no common
    range. Of one seed an interval is the bootstrap's over prompts; of several each method's frontier is the mean of its
    seeds', and the interval holds the spread between them too (see `statistics.mean_over_seeds`).
    """
    weights = weights_of_resamples(len(measured.prompts), recipe)
    every = [of_seed(measured, seed) for seed in recipe.seeds]
    methods = [method for method in recipe.methods if (measured.checkpoints["method"] == method).any()]
    of_method = {method: [(one.checkpoints["method"] == method).to_numpy() for one in every] for method in methods}
    ends = {
        method: min(frontier_end(one, chosen) for one, chosen in zip(every, of_method[method], strict=True))
        for method in methods
    }
    rows = []
    for method, other in itertools.combinations(methods, 2):
        end = min(ends[method], ends[other])
        row: dict[str, object] = {"method": method, "other": other, "seeds": len(recipe.seeds)}
        if end >= _SMALLEST_RANGE:
            grid = np.linspace(0, end, _GRID)
            at = np.array([kl for kl in recipe.at_kl if kl <= end])
            points = np.concatenate([grid, at])
            first, second = (
                np.array(
                    [curves(one, chosen, weights, points) for one, chosen in zip(every, of_method[name], strict=True)]
                )
                for name in (method, other)
            )
            difference = first - second
            row |= dict(_summary(difference[:, :, :_GRID], end, len(measured.prompts), recipe))
            for i, kl in enumerate(at):
                values = difference[:, :, _GRID + i]
                row |= dict(_with_interval(f"difference_at_{kl:g}", values, len(measured.prompts), recipe))
        rows.append(row)
    names = ["mean_difference", "area"]
    at_kl = [f"difference_at_{kl:g}" for kl in recipe.at_kl]
    shape = ["smallest_difference", "largest_difference", "share_above"]
    columns = ["method", "other", "seeds", "kl_from", "kl_to", *_columns(names), *shape, *_columns(at_kl)]
    return pd.DataFrame(rows).reindex(columns=columns)


def _summary(difference: np.ndarray, end: float, prompts: int, recipe: DominanceRecipe) -> Iterator[tuple[str, float]]:
    """Figures of differences [seeds, 1 + bootstrap, points]."""
    mean = np.trapezoid(difference, dx=1 / (_GRID - 1), axis=2)
    over_seeds = difference[:, 0].mean(axis=0)
    yield from (("kl_from", 0.0), ("kl_to", end))
    yield from _with_interval("mean_difference", mean, prompts, recipe)
    yield from _with_interval("area", mean * end, prompts, recipe)
    yield from (("smallest_difference", float(over_seeds.min())), ("largest_difference", float(over_seeds.max())))
    # The reference policy is common to both, so the frontiers meet there.
    yield "share_above", float((over_seeds[1:] > 0).mean())


def _with_interval(name: str, values: np.ndarray, prompts: int, recipe: DominanceRecipe) -> Iterator[tuple[str, float]]:
    """A figure and its interval from its values [seeds, 1 + bootstrap]."""
    mean = values.mean(axis=0)
    low, high = np.quantile(mean[1:], [(1 - recipe.confidence) / 2, (1 + recipe.confidence) / 2])
    if len(values) > 1:
        interval = mean_over_seeds(values[:, 0].tolist(), float(mean[1:].std()), prompts, recipe.confidence).interval
        low, high = interval.low, interval.high
    yield from ((name, float(mean[0])), (f"{name}_low", float(low)), (f"{name}_high", float(high)))


def _columns(names: list[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_low", f"{name}_high")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `dominance`."""
    parser.add_argument("--evaluations", required=True, type=Path, nargs="+", help="evaluations of each run")
    parser.add_argument("--recipe", required=True, help="the stage's resolved values, a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="CSV that is made")


def run(args: argparse.Namespace) -> None:
    """Writes the table of pairs."""
    recipe = from_json(DominanceRecipe, args.recipe)
    write_csv(args.out, dominance_table(read_evaluations(args.evaluations, recipe.seeds), recipe))
