"""The optimal frontier against an exact solution."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from prefopt.analysis import optimal_frontier as module
from prefopt.analysis.optimal_frontier import OptimalFrontierRecipe, ceiling_table, optimum
from prefopt.errors import UserError
from prefopt.store.tables import write_table

RECIPE = OptimalFrontierRecipe(largest_beta=4.0, smallest_beta=0.1, betas=12, min_effective_samples=20.0)
# A reference policy over eight completions, and their rewards.
PROBABILITIES = np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])
REWARDS = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.7, 0.8, 1.0])


def exact(beta: float) -> tuple[float, float, float]:
    """Value, reward and KL of pi proportional to pi_ref * exp(r / beta), by enumeration."""
    weights = PROBABILITIES * np.exp(REWARDS / beta)
    normalizer = weights.sum()
    policy = weights / normalizer
    return beta * np.log(normalizer), policy @ REWARDS, policy @ np.log(policy / PROBABILITIES)


def draw(prompts: int, samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(REWARDS, size=(prompts, samples), p=PROBABILITIES)


@pytest.mark.parametrize("beta", [2.0, 0.5, 0.2, 0.1])
def test_the_estimate_is_the_exact_solution_of_an_enumerable_model(beta: float) -> None:
    found = optimum(draw(400, 2000, 0), np.array([beta]))
    value, reward, kl = exact(beta)
    for estimate, expected in ((found.value, value), (found.reward, reward), (found.kl, kl)):
        error = estimate.std() / np.sqrt(len(estimate))
        assert estimate.mean() == pytest.approx(expected, abs=4 * error + 2e-4)
    # The effective share of the samples is 1 / (1 + chi squared).
    policy = PROBABILITIES * np.exp(REWARDS / beta)
    policy /= policy.sum()
    assert found.effective_samples.mean() == pytest.approx(2000 / (policy**2 / PROBABILITIES).sum(), rel=0.02)


def test_equal_weights_by_hand() -> None:
    found = optimum(np.array([[0.0, 1.0]]), np.array([1e6, 1 / np.log(3)]))
    assert found.reward[0].tolist() == pytest.approx([0.5, 0.75])
    assert found.effective_samples[0].tolist() == pytest.approx([2.0, 1 / (0.75**2 + 0.25**2)])
    assert found.kl[0].tolist() == pytest.approx([0.0, 0.75 * np.log(1.5) + 0.25 * np.log(0.5)], abs=1e-6)


def test_the_frontier_rises_with_kl_and_is_cut_off_where_few_samples_carry_it() -> None:
    table = ceiling_table(draw(50, 200, 1), RECIPE)
    assert (np.diff(table["kl"]) > 0).all() and (np.diff(table["reward"]) > 0).all()
    assert (np.diff(table["effective_samples"]) < 0).all()
    assert table["reliable"].tolist() == (table["effective_samples"] >= 20).tolist()
    assert table["reliable"].iloc[0] and not table["reliable"].iloc[-1]


def test_a_table_by_hand() -> None:
    """Three prompts, two samples each; at a price of 1 / log 3 the better of 0 and 1 has three quarters."""
    rewards = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    beta = 1 / np.log(3)
    recipe = OptimalFrontierRecipe(largest_beta=1e6, smallest_beta=beta, betas=2, min_effective_samples=1.9)
    table = ceiling_table(rewards, recipe)
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    effective = [1 / (0.75**2 + 0.25**2), 2.0, 2.0]
    expected = {
        **{"beta": beta, "reward": (0.75 + 1 + 0) / 3, "reward_se": np.std([0.75, 1, 0], ddof=1) / 3**0.5},
        **{"kl": kl / 3, "kl_se": np.std([kl, 0, 0], ddof=1) / 3**0.5, "value": (beta * np.log(2) + 1) / 3},
        **{"effective_samples": sum(effective) / 3, "effective_samples_p10": 1.6 + 0.2 * 0.4},
        **{"samples": 2, "prompts": 3, "reliable": False},
    }
    assert list(table.columns) == list(expected)
    assert table.iloc[1].to_dict() == pytest.approx(expected)
    assert table["reliable"].tolist() == [True, False] and table["beta"].iloc[0] == pytest.approx(1e6)
    # As many effective samples as are asked for are enough.
    assert ceiling_table(rewards[1:], dataclasses.replace(recipe, min_effective_samples=2.0))["reliable"].all()


def test_rewards_lie_in_the_order_of_prompts_and_samples() -> None:
    rows = [("b", 1, 0.4), ("a", 0, 0.1), ("b", 0, 0.3), ("a", 1, 0.2)]
    scores = pd.DataFrame(rows, columns=["prompt_id", "sample_index", "reward"])
    prompts, rewards = module.reward_matrix(scores)
    assert prompts == ["a", "b"] and rewards.tolist() == [[0.1, 0.2], [0.3, 0.4]]
    # Those of a table are float32, in which sums of many small weights are not exact.
    assert module.reward_matrix(scores.astype({"reward": "float32"}))[1].dtype == np.float64


def test_the_stage_reads_scores_and_refuses_unequal_numbers(tmp_path: Path) -> None:
    key = [(f"p{p}", 1.0, i) for p in range(3) for i in range(30)]
    scores = pd.DataFrame(key, columns=["prompt_id", "temperature", "sample_index"])
    scores["reward"] = draw(3, 30, 2).ravel()
    write_table(tmp_path / "scores.parquet", "scores", scores)
    recipe = json.dumps({"largest_beta": 4.0, "smallest_beta": 0.1, "betas": 12, "min_effective_samples": 20.0})
    args = argparse.Namespace(scores=[tmp_path / "scores.parquet"], recipe=recipe, out=tmp_path / "ceiling.csv")
    module.run(args)
    table = pd.read_csv(args.out)
    assert len(table) == 12 and (table["samples"] == 30).all() and (table["prompts"] == 3).all()
    write_table(tmp_path / "scores.parquet", "scores", scores.iloc[1:])
    with pytest.raises(UserError, match="The prompts have 29 to 30 samples"):
        module.run(args)
