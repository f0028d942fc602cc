"""PPO's rollouts: figures by hand, and every number against transformers' own forward of one row at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.models import load_policy, new_scorer
from prefopt.store.tables import read_table
from prefopt.training import rollouts as module
from prefopt.training.rollouts import Models, PPORecipe, Rollouts, describe, normalized, roll_out
from test_reward_and_ppo import PPO
from tiny_task import Task

RECIPE = from_json(PPORecipe, json.dumps({**PPO, "missing_eos_reward": None}))


def by_hand(scores: list[float]) -> Rollouts:
    """Two completions, of three tokens and of one; what lies on padding must not count."""
    return Rollouts(
        rows=[Row((1,), ((2, 3, 4), (0,)))],
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        logps=torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]]),
        reference_logps=torch.tensor([[-2.0, -2.0, -4.0], [-0.25, -5.0, -7.0]]),
        values=torch.zeros(2, 3),
        scores=torch.tensor(scores),
        ended=torch.tensor([False, True]),
    )


def test_figures_of_completions_by_hand() -> None:
    assert describe(by_hand([1.0, 4.0])) == pytest.approx(
        {
            "reward": 2.5,
            "reward_variance": 2.25,
            "kl": (2.0 - 0.25) / 2,
            "entropy": 6.5 / 4,
            "tokens": 2.0,
            "ended": 0.5,
        }
    )


def test_scores_are_normalized_by_the_mean_and_spread_of_all_updates() -> None:
    # Scores 0 and 2 in the update before, 1 and 4 in this one: mean 7 / 4, variance 21 / 4 - 49 / 16.
    scores = normalized(by_hand([1.0, 4.0]), [(1.0, 1.0), (2.5, 2.25)]).scores
    spread = math.sqrt(21 / 4 - 49 / 16)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([(1 - 1.75) / spread, (4 - 1.75) / spread])


def test_equal_scores_are_normalized_to_zero() -> None:
    assert normalized(by_hand([3.0, 3.0]), [(3.0, 0.0)]).scores.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("budget", [10_000, 20])
@torch.no_grad()
def test_every_number_of_a_rollout_is_the_models_own(budget: int, task: Task) -> None:
    prompts = [ids.tolist() for ids in read_table(task.prompts, "prompts")["prompt_ids"].head(3)]
    policy, reference = (load_policy(task.model)[0] for _ in range(2))
    for parameter in policy.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    value = new_scorer(task.model, 1)[0]
    rewarded: list[Any] = []

    def reward(rows: Any) -> torch.Tensor:
        rewarded.extend(rows)
        return torch.arange(len(rows) * 3.0).view(len(rows), 3)

    recipe = dataclasses.replace(RECIPE, token_budget=budget, max_new_tokens=8)
    made = roll_out(Models(policy, value, reference, reward), prompts, recipe, [0], seeds=[5, 6, 7])
    assert made.rows == rewarded and [list(row.prompt) for row in made.rows] == prompts
    assert made.scores.tolist() == list(range(9))
    completions = [(row.prompt, completion) for row in made.rows for completion in row.completions]
    assert len(completions) == 9 and made.mask.sum(dim=1).tolist() == [len(c) for _, c in completions]
    assert made.ended.tolist() == [completion[-1] == 0 for _, completion in completions]
    for i, (prompt, completion) in enumerate(completions):
        ids = torch.tensor([[*prompt, *completion]])
        places = slice(len(prompt) - 1, ids.shape[1] - 1)
        for model, found in ((policy, made.logps), (reference, made.reference_logps)):
            logits = model(input_ids=ids).logits[0, places] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            torch.testing.assert_close(found[i, : len(completion)], expected, rtol=1e-4, atol=1e-4)
        expected = value.score(value.base_model(input_ids=ids).last_hidden_state[0, places]).squeeze(1)
        torch.testing.assert_close(made.values[i, : len(completion)], expected, rtol=1e-4, atol=1e-4)
        for padded in (made.logps, made.reference_logps, made.values):
            assert not padded[i, len(completion) :].any()
    alone = roll_out(Models(policy, value, reference, reward), prompts[1:2], recipe, [0], seeds=[6])
    assert alone.rows == made.rows[1:2]


def test_a_learned_reward_is_the_reward_models(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "score_rows", lambda *values: asked.append(values) or torch.zeros(1, 1))
    scorer, rows = torch.nn.Identity(), [Row((1,), ((2,),))]
    assert module.learned_reward(scorer, RECIPE)(rows).tolist() == [[0.0]]
    assert asked == [(scorer, rows, RECIPE.token_budget, RECIPE.dtype)]
