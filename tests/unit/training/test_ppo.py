"""What each update of PPO is given: seeds, weights of the penalty, rewards; and which policy is kept."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.flops import reading_flops, sampling_flops
from prefopt.lm.models import load_policy, new_scorer
from prefopt.lm.shape import shape_of
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_table
from prefopt.training import ppo
from prefopt.training.checkpoint import RunFolder
from test_reward_and_ppo import PPO
from tiny_task import Task

# Two prompts, which every update takes, and two short completions of each.
SMALL = {**PPO, "updates": 4, "prompts_per_update": 2, "samples_per_prompt": 2, "max_new_tokens": 3, "epochs": 1}
SMALL |= {"minibatches": 1, "evaluate_every": 1, "missing_eos_reward": None}


def recipe(**values: Any) -> ppo.PPORecipe:
    return from_json(ppo.PPORecipe, json.dumps({**SMALL, **values}))


def reward_of_tokens(rows: Any) -> torch.Tensor:
    """Spread wide, and other in every update, which samples other tokens."""
    return torch.tensor([[float(sum(completion)) for completion in row.completions] for row in rows])


@pytest.fixture
def models(task: Task) -> ppo.Models:
    policy, reference = (load_policy(task.model)[0] for _ in range(2))
    return ppo.Models(policy, new_scorer(task.model, 0)[0], reference, reward_of_tokens, learned_reward=False)


@pytest.fixture
def prompts(task: Task) -> pd.DataFrame:
    return read_table(task.prompts, "prompts").head(2)


def train(
    models: ppo.Models,
    prompts: pd.DataFrame,
    values: ppo.PPORecipe,
    folder: Path,
    validation: bool = False,
    hook: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    usage = Usage("test", torch.device("cpu"), "float32")
    with RunFolder(folder, {}, 0) as run:
        return ppo.train(models, prompts, prompts if validation else None, values, [0], run, usage, hook=hook)


class Seen:
    """Keeps what every update was given; the process dies where it would make the update `dies_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None = None) -> None:
        self.coefs: list[float] = []
        self.scores: list[list[float]] = []
        self.dies_at = dies_at
        self._update = ppo.update
        monkeypatch.setattr(ppo, "update", self)

    def __call__(
        self, models: Any, optimizer: Any, rollouts: ppo.Rollouts, values: Any, kl_coef: float, generator: Any
    ) -> dict[str, float]:
        if self.dies_at == len(self.coefs):
            self.dies_at = None
            raise KeyboardInterrupt
        self.coefs.append(kl_coef)
        self.scores.append(rollouts.scores.tolist())
        return self._update(models, optimizer, rollouts, values, kl_coef, generator)


@pytest.mark.parametrize("dies_at", [None, 2])
def test_an_adaptive_weight_is_the_last_ones_successor_also_after_a_restart(
    dies_at: int | None,
    task: Task,
    models: ppo.Models,
    prompts: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Seen(monkeypatch, dies_at)
    # The policy does not move far: the KL stays below 0.8 of the target, and the weight falls by a fifth of 4 / 8.
    values = recipe(kl_coef=0.5, kl_target=50.0, kl_horizon=8.0)
    if dies_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(models, prompts, values, tmp_path)
        fresh = dataclasses.replace(models, policy=load_policy(task.model)[0], value=new_scorer(task.model, 0)[0])
        metrics = train(fresh, prompts, values, tmp_path)
    else:
        metrics = train(models, prompts, values, tmp_path)
    expected = [0.5, 0.45, 0.405, 0.3645]
    assert seen.coefs == pytest.approx(expected)
    assert [row["kl_coef"] for row in metrics] == pytest.approx(expected)
    assert [row["next_kl_coef"] for row in metrics] == pytest.approx([*expected[1:], 0.32805])


def test_a_weight_without_a_target_stays(models: ppo.Models, prompts: pd.DataFrame, tmp_path: Path) -> None:
    metrics = train(models, prompts, recipe(updates=2), tmp_path)
    assert [(row["kl_coef"], row["next_kl_coef"]) for row in metrics] == [(0.05, 0.05)] * 2


@pytest.mark.parametrize("dies_at", [None, 2])
def test_rewards_are_normalized_by_all_updates_so_far_also_after_a_restart(
    dies_at: int | None,
    task: Task,
    models: ppo.Models,
    prompts: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = Seen(monkeypatch, dies_at)
    raw: list[list[float]] = []

    def reward(rows: Any) -> torch.Tensor:
        rewards = reward_of_tokens(rows)
        raw.append(rewards.flatten().tolist())
        return rewards

    watched = dataclasses.replace(models, reward=reward)
    values = recipe(normalize_rewards=True)
    if dies_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(watched, prompts, values, tmp_path)
        del raw[dies_at]  # the update that was not made is sampled again
        fresh = {"policy": load_policy(task.model)[0], "value": new_scorer(task.model, 0)[0]}
        watched = dataclasses.replace(watched, **fresh)
    metrics = train(watched, prompts, values, tmp_path)
    assert len(raw) == len(seen.scores) == 4
    for made, scores in enumerate(seen.scores, start=1):
        so_far = [reward for update in raw[:made] for reward in update]
        mean, spread = statistics.fmean(so_far), statistics.pstdev(so_far)
        assert scores == pytest.approx([(reward - mean) / spread for reward in raw[made - 1]], rel=1e-4, abs=1e-4)
    # What is reported is the reward itself.
    assert [row["reward"] for row in metrics] == pytest.approx([statistics.fmean(update) for update in raw])


def test_rewards_are_as_they_are_unless_they_are_to_be_normalized(
    models: ppo.Models, prompts: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    metrics = train(models, prompts, recipe(updates=1), tmp_path)
    assert max(seen.scores[0]) > 100
    assert metrics[0]["reward"] == pytest.approx(statistics.fmean(seen.scores[0]))


def test_every_update_draws_with_seeds_of_its_own_and_every_validation_with_the_same(
    models: ppo.Models, prompts: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll_out, drawn = ppo.roll_out, []

    def watched(models: Any, ids: Any, values: ppo.PPORecipe, ends: Any, seeds: Any) -> ppo.Rollouts:
        rollouts = roll_out(models, ids, values, ends, seeds)
        drawn.append((values.samples_per_prompt, list(seeds), rollouts.rows))
        return rollouts

    monkeypatch.setattr(ppo, "roll_out", watched)
    # The policy hardly moves, so that other texts come of other seeds.
    train(models, prompts, recipe(learning_rate=1e-9), tmp_path, validation=True)
    updates = [(seeds, rows) for n, seeds, rows in drawn if n == 2]
    validations = [(seeds, rows) for n, seeds, rows in drawn if n == 1]
    assert len(updates) == 4 and len(validations) == 5
    every = [seed for seeds, _ in updates for seed in seeds]
    assert len(set(every)) == len(every) == 8
    completions = {completion for _, rows in updates for row in rows for completion in row.completions}
    assert len(completions) > 12
    assert all(validation == validations[0] for validation in validations)


def test_the_best_policy_has_the_highest_reward_less_the_weighted_kl(
    models: ppo.Models, prompts: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the present KL's weight 0.05: 0, 0.95, 0.2, 0.9 and 0.5; their sums would choose update 2."""
    describe = ppo.describe
    by_update = [(0.0, 0.0), (1.0, 1.0), (1.2, 20.0), (1.4, 10.0), (0.5, 0.0)]
    validations = iter(by_update)

    def scripted(rollouts: ppo.Rollouts) -> dict[str, float]:
        figures = describe(rollouts)
        if len(rollouts.scores) == 2:  # of the validation, with one completion a prompt
            figures["reward"], figures["kl"] = next(validations)
        return figures

    monkeypatch.setattr(ppo, "describe", scripted)
    weights = {}

    def keep(step: int) -> None:
        weights[step] = copy.deepcopy(models.policy.state_dict())

    metrics = train(models, prompts, recipe(keep="best"), tmp_path, validation=True, hook=keep)
    assert sorted(weights) == [0, 1, 2, 3, 4]
    assert [row["reward"] for row in metrics if row["split"] == "validation"] == [reward for reward, _ in by_update]
    chosen = [
        step
        for step, kept in weights.items()
        if all(torch.equal(kept[name], tensor) for name, tensor in models.policy.state_dict().items())
    ]
    assert chosen == [1]


def test_the_loss_is_the_policys_and_the_weighted_loss_of_the_values(
    task: Task, models: ppo.Models, prompts: pd.DataFrame
) -> None:
    """The values' gradient, which theirs alone is, grows with their weight; the policy's does not."""
    ids = [row.tolist() for row in prompts["prompt_ids"]]
    rollouts = ppo.roll_out(models, ids, recipe(), [0], seeds=range(2))
    advantages = torch.linspace(-1, 1, rollouts.mask.numel()).view(rollouts.mask.shape)
    returns = rollouts.values + 1
    gradients = []
    for value_coef in (0.1, 0.4):
        for model in (models.policy, models.value):
            model.zero_grad()
        values = recipe(value_coef=value_coef, value_clip=10.0)
        figures = ppo._accumulate(models, rollouts, advantages, returns, [0, 1], values)
        # Half the squared error of 1; at ratio 1 the policy's loss is the mean advantage, with the other sign.
        assert figures["value_loss"] == pytest.approx(0.5, rel=1e-4)
        assert figures["policy_loss"] == pytest.approx(-advantages[rollouts.mask].mean().item(), abs=1e-5)
        assert figures["loss"] == pytest.approx(figures["policy_loss"] + value_coef * 0.5, abs=1e-5)
        gradients.append([next(p for p in model.parameters()).grad.clone() for model in (models.policy, models.value)])
    (policy, value), (same, greater) = gradients
    torch.testing.assert_close(same, policy)
    torch.testing.assert_close(greater, 4 * value)
    assert value.abs().max() > 0


def test_the_gradient_of_a_minibatch_does_not_depend_on_the_micro_batches(
    models: ppo.Models, prompts: pd.DataFrame
) -> None:
    rollouts = ppo.roll_out(models, [row.tolist() for row in prompts["prompt_ids"]], recipe(), [0], seeds=range(2))
    advantages = torch.linspace(-1, 1, rollouts.mask.numel()).view(rollouts.mask.shape)
    # Other than the policy's own, so that ratios are not 1.
    rollouts = dataclasses.replace(rollouts, logps=rollouts.logps + advantages * 0.5)
    figures, gradients = [], []
    for budget in (10_000, 1):
        parameters = [*models.policy.parameters(), *models.value.parameters()]
        for parameter in parameters:
            parameter.grad = None
        values = recipe(token_budget=budget)
        figures.append(ppo._accumulate(models, rollouts, advantages, rollouts.values + 1, [1, 0], values))
        gradients.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-5)
    ratio = torch.exp(-0.5 * advantages)[rollouts.mask]
    assert figures[0]["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    # A greater ratio is cut where the advantage is positive, a smaller one where it is negative: neither is here.
    assert figures[0]["clip_fraction"] == 0


def test_an_update_takes_every_row_once_an_epoch_and_reports_means_over_its_steps(
    models: ppo.Models, prompts: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts = ppo.roll_out(models, [row.tolist() for row in prompts["prompt_ids"]], recipe(), [0], seeds=range(2))
    taken: list[list[int]] = []

    def accumulate(*values: Any) -> dict[str, float]:
        taken.append(values[4])
        return {"ratio": float(len(taken)), "loss": 10.0 * len(taken)}

    monkeypatch.setattr(ppo, "_accumulate", accumulate)
    monkeypatch.setattr(ppo, "clip_gradients", lambda parameters, norm: norm + len(taken))
    optimizer = torch.optim.SGD(models.policy.parameters(), lr=0.1)
    values = recipe(epochs=3, minibatches=2, max_grad_norm=100.0)
    figures = ppo.update(models, optimizer, rollouts, values, 0.0, torch.Generator().manual_seed(0))
    assert [len(minibatch) for minibatch in taken] == [1] * 6
    assert all(sorted(taken[i] + taken[i + 1]) == [0, 1] for i in (0, 2, 4))
    assert figures == {"ratio": 3.5, "loss": 35.0, "grad_norm": 103.5, "first_ratio": 1.0}


@pytest.mark.parametrize("learned", [True, False])
def test_operations_of_an_update_by_hand(learned: bool, models: ppo.Models) -> None:
    """Of rows with a prompt of 3 tokens and completions of 2 and 1, in two epochs."""
    policy, value = shape_of(models.policy), shape_of(models.value)
    assert policy != value
    rows = [Row((1, 2, 3), ((4, 5), (6,)))] * 2
    one = sampling_flops(policy, 3, [2, 1]) + 7 * reading_flops(policy, 3, [2, 1])
    one += (8 if learned else 7) * reading_flops(value, 3, [2, 1])
    assert ppo.update_flops(dataclasses.replace(models, learned_reward=learned), rows, 2) == 2 * one


def test_every_pass_over_the_prompts_has_an_order_of_its_own() -> None:
    order, other = ppo.PromptOrder(8, seed=0), ppo.PromptOrder(8, seed=1)
    first, second = order.of_update(8, 0), order.of_update(8, 1)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second and first != other.of_update(8, 0)
    assert order.of_update(4, 1) == first[4:]
