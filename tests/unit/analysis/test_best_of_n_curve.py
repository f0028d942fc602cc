from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest

from prefopt.analysis.best_of_n_curve import (
    CurveRecipe,
    best_of_n_flops,
    best_of_n_weights,
    curve_table,
    distinct_texts,
)
from prefopt.errors import UserError
from prefopt.flops import Shape
from prefopt.generation.subsets import SubsetsRecipe, chosen_candidates, subset_weights

RECIPE = CurveRecipe(task="tldr", n=(1, 2, 3), subsets=None, confidence=0.95, seed=0)
POLICY, REWARD_MODEL = Shape(10, 2, 4, 6), Shape(10, 2, 4, 1)


@pytest.mark.parametrize("rewards", [[0.3, -1.0, 2.0, 0.5, 0.4], [1.0, 1.0, 0.0, 2.0, 2.0], [1.0] * 4])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_weights_are_the_shares_of_all_subsets(rewards: list[float], n: int) -> None:
    expected = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        best = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == best]
        for i in winners:
            expected[i] += 1 / len(winners) / len(subsets)
    assert best_of_n_weights(rewards, n) == pytest.approx(expected, abs=1e-12)


def test_weights_by_hand() -> None:
    # Of the three pairs from three candidates, the best is in two and the second best is the best of one.
    assert best_of_n_weights([5.0, 7.0, 6.0], 2).tolist() == pytest.approx([0, 2 / 3, 1 / 3])


def tables(outcomes: dict[str, str], rewards: dict[str, list[float]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Candidates and verdicts of prompts; an outcome is a letter a candidate: w, l, t or i."""
    names = {"w": "win", "l": "loss", "t": "tie", "i": "invalid"}
    keys = [(prompt, 1.0, i) for prompt, letters in outcomes.items() for i in range(len(letters))]
    frame = pd.DataFrame(keys, columns=["prompt_id", "temperature", "sample_index"])
    candidates = frame.assign(
        split="test", tokens=4, reward=[reward for prompt in outcomes for reward in rewards[prompt]]
    )
    verdicts = frame.assign(
        outcome=[names[letter] for letters in outcomes.values() for letter in letters], judge="oracle", split="test"
    )
    return candidates, verdicts


def test_the_curve_by_hand() -> None:
    candidates, verdicts = tables({"a": "wlt", "b": "llw"}, {"a": [3.0, 2.0, 1.0], "b": [3.0, 2.0, 1.0]})
    table = curve_table(candidates, verdicts, {"a": 5, "b": 5}, POLICY, REWARD_MODEL, (1, 2, 3), RECIPE)
    # Prompt a: mean of 1, 0, 1/2; then 2/3 of the first and 1/3 of the second; then the first. b: 1/3, 0, 0.
    assert table["win_rate"].tolist() == pytest.approx([(1 / 2 + 1 / 3) / 2, (2 / 3 + 0) / 2, 1 / 2])
    assert table["reward"].tolist() == pytest.approx([2, 8 / 3, 3])
    assert table["generated_tokens"].tolist() == [4, 8, 12]
    assert table["n"].tolist() == [1, 2, 3]
    assert set(table["confidence"]) == {0.95} and set(table["prompts"]) == {2}
    assert (table["ci_low"] < table["win_rate"]).all() and (table["win_rate"] < table["ci_high"]).all()


def test_different_texts_are_counted_by_temperature() -> None:
    rows = [(1.0, "a", "x"), (1.0, "a", "y"), (1.0, "b", "x"), (1.0, "b", "x"), (0.5, "a", "x"), (0.5, "a", "x")]
    samples = pd.DataFrame(rows, columns=["temperature", "prompt_id", "text"]).assign(split="test")
    other = samples.assign(split="validation", text=[str(i) for i in range(6)])
    assert distinct_texts(pd.concat([samples, other])).to_dict() == {0.5: 1.0, 1.0: 1.5}


def test_an_invalid_verdict_is_left_out_of_the_win_rate() -> None:
    candidates, verdicts = tables({"a": "wil"}, {"a": [1.0, 2.0, 3.0]})
    table = curve_table(candidates, verdicts, {"a": 5}, POLICY, REWARD_MODEL, (1, 2), RECIPE)
    # Two: of the pairs the last is the best twice, the invalid one once, the first never.
    assert table["win_rate"].tolist() == pytest.approx([1 / 2, 0])


def test_too_few_candidates_are_named() -> None:
    candidates, verdicts = tables({"a": "wl"}, {"a": [1.0, 2.0]})
    with pytest.raises(UserError, match="prompt 'a' has 2 candidates, the best of 3 needs 3"):
        curve_table(candidates, verdicts, {"a": 5}, POLICY, REWARD_MODEL, (3,), RECIPE)


def test_flops_by_hand() -> None:
    # The prompt: 2 tokens, 3 pairs. A completion of 2 tokens: the policy reads 1 token (3 pairs), the scorer 2 (7).
    prompt = 2 * 10 * 2 + 4 * 2 * 4 * 3
    sampling = 2 * 10 * 1 + 4 * 2 * 4 * 3 + 2 * 6
    scoring = 2 * 10 * 2 + 4 * 2 * 4 * 7 + 2 * 1
    assert best_of_n_flops(2, [2, 2, 2], 1, POLICY, REWARD_MODEL) == prompt + 2 * 6 + sampling
    assert best_of_n_flops(2, [2, 2, 2], 2, POLICY, REWARD_MODEL) == 2 * prompt + 2 * 6 + 2 * (sampling + scoring)


def test_seeded_subsets_tend_to_all_subsets_and_judge_few() -> None:
    rewards = {"a": [3.0, 2.0, 1.0, 5.0, 4.0, 0.0], "b": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    candidates, verdicts = tables({"a": "wlwlwl", "b": "llwlww"}, rewards)
    arguments = ({"a": 5, "b": 5}, POLICY, REWARD_MODEL, (1, 3))
    exact = curve_table(candidates, verdicts, *arguments, RECIPE)
    many = dataclasses.replace(RECIPE, subsets=4000)
    close = curve_table(candidates, verdicts, *arguments, many)
    assert close["win_rate"].tolist() == pytest.approx(exact["win_rate"].tolist(), abs=0.03)
    assert close["reward"].tolist() == pytest.approx(exact["reward"].tolist(), abs=0.08)
    # One subset of each size: at most two candidates a prompt need a verdict, and these are enough.
    recipe = SubsetsRecipe(n=(1, 3), subsets=1, seed=RECIPE.seed)
    chosen = chosen_candidates(candidates, recipe)
    assert len(chosen) <= 4
    few = verdicts.merge(chosen[["prompt_id", "temperature", "sample_index"]])
    one = dataclasses.replace(RECIPE, subsets=1)
    assert (
        curve_table(candidates, few, *arguments, one)["win_rate"].tolist()
        == curve_table(candidates, verdicts, *arguments, one)["win_rate"].tolist()
    )
    with pytest.raises(UserError, match="has no verdict"):
        curve_table(candidates, few.iloc[:1], *arguments, one)


def test_a_subsets_weights_are_shares_of_draws() -> None:
    weights = subset_weights([1.0, 3.0, 2.0], 3, 5, 0, ("p", 1.0))
    assert weights.tolist() == pytest.approx([0, 1, 0])
    assert subset_weights([1.0, 3.0, 2.0], 1, 9, 0, ("p", 1.0)).sum() == pytest.approx(1)
    with pytest.raises(UserError, match="needs 4"):
        subset_weights([1.0, 3.0, 2.0], 4, 1, 0, ("p", 1.0))
