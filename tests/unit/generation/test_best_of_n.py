"""Best-of-N from a table of candidates."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from prefopt.errors import UserError
from prefopt.generation.best_of_n import best_of_n
from prefopt.generation.sample import SampleRecipe, chosen_prompts, prompt_seed
from prefopt.generation.score import _pieces


def candidate(prompt_id: str, temperature: float, index: int, **values: Any) -> dict[str, Any]:
    return {"prompt_id": prompt_id, "temperature": temperature, "sample_index": index, "method": "sft", **values}


CANDIDATES = pd.DataFrame(
    [candidate(p, t, i, text=f"{p}{t}{i}") for p in "ab" for t in (0.0, 0.5, 1.0) for i in range(1 if t == 0 else 4)]
)
REWARDS = {("a", 0.5): [0, 3, 1, 9], ("a", 1.0): [5, 5, 5, 5], ("b", 0.5): [-3, -2, -1, 0], ("b", 1.0): [1, 2, 3, 0]}
SCORES = pd.DataFrame(
    [
        {"prompt_id": p, "temperature": t, "sample_index": i, "reward": float(r)}
        for (p, t), rewards in REWARDS.items()
        for i, r in enumerate(rewards)
    ]
)
GREEDY = CANDIDATES[CANDIDATES["temperature"] == 0].assign(text="greedy")


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, {"a0.50", "a1.00", "b0.50", "b1.00"}),
        (3, {"a0.51", "a1.00", "b0.52", "b1.02"}),
        (4, {"a0.53", "a1.00", "b0.53", "b1.02"}),
    ],
)
def test_the_highest_reward_of_the_first_n_wins_and_ties_go_to_the_earlier(n: int, expected: set[str]) -> None:
    rows = best_of_n(CANDIDATES, SCORES, GREEDY, n, "best")
    above = rows[rows["temperature"] > 0]
    assert set(above["text"]) == expected
    assert set(rows["sample_index"]) == {0}
    assert set(rows["method"]) == {"best"}


def test_temperature_zero_is_the_greedy_completion() -> None:
    rows = best_of_n(CANDIDATES, SCORES, GREEDY, 4, "best")
    assert rows[rows["temperature"] == 0]["text"].tolist() == ["greedy", "greedy"]


def test_too_few_candidates_are_refused() -> None:
    with pytest.raises(UserError, match="best-of-5 needs 5"):
        best_of_n(CANDIDATES, SCORES, GREEDY, 5, "best")


def test_a_candidate_without_a_score_is_refused() -> None:
    with pytest.raises(UserError, match="without a score"):
        best_of_n(CANDIDATES, SCORES.iloc[1:], GREEDY, 4, "best")


def test_a_prompts_seed_depends_on_itself_alone() -> None:
    seeds = {prompt_seed(s, p, t) for s in (0, 1) for p in "ab" for t in (0.5, 1.0)}
    assert len(seeds) == 8
    assert prompt_seed(0, "a", 0.5) == prompt_seed(0, "a", 0.5) < 2**56


def test_prompts_are_chosen_by_split_and_number() -> None:
    splits = ["test", "train", "validation", "test", "validation", "test"]
    prompts = pd.DataFrame({"prompt_id": list("abcdef"), "split": splits})
    common = {
        "temperatures": (0.0,),
        "stop": (),
        "n": 1,
        "max_new_tokens": 1,
        "token_budget": 1,
        "dtype": "float32",
        "seed": 0,
    }
    recipe = SampleRecipe(**common, train_prompts=0, validation_prompts=1, test_prompts=2)
    assert chosen_prompts(prompts, recipe)["prompt_id"].tolist() == ["c", "a", "d"]


def test_rows_are_cut_within_the_budget() -> None:
    assert _pieces(10, [5, 5, 5, 5], 21) == [(0, 2), (2, 4)]
    assert _pieces(10, [50, 5], 21) == [(0, 1), (1, 2)]
    assert _pieces(10, [5], 100) == [(0, 1)]
