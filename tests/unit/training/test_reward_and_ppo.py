"""The reward model, and PPO against it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prefopt.experiment.recipes import from_json
from prefopt.lm.batching import Row
from prefopt.lm.models import load_policy, load_scorer, new_scorer, weights_hash
from prefopt.rewards.learned import raw_scores, score_rows
from prefopt.store.tables import read_manifest, read_table
from prefopt.training import ppo, reward
from prefopt.training.optimization import build_optimizer
from prefopt.training.stage import model_hashes
from tiny_task import Task, recipe

PPO: dict[str, Any] = {
    "updates": 3,
    "prompts_per_update": 4,
    "samples_per_prompt": 3,
    "epochs": 2,
    "minibatches": 2,
    "temperature": 0.7,
    "max_new_tokens": 6,
    "kl_coef": 0.05,
    "kl_target": None,
    "kl_horizon": 10000.0,
    "normalize_rewards": False,
    "gamma": 1.0,
    "lam": 0.95,
    "clip": 0.2,
    "value_clip": 0.2,
    "value_coef": 0.1,
    "true_reward": None,
    "missing_eos_reward": -1.0,
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup_steps": 0,
    "adam_eps": 1e-5,
    "max_grad_norm": 10.0,
    "validation_prompts": 4,
    "evaluate_every": 2,
    "checkpoint_every": 1,
    "keep": "last",
    "token_budget": 128,
    "dtype": "float32",
    "activation_checkpointing": False,
    "seed": 0,
}


@pytest.fixture(scope="module")
def reward_model(task: Task) -> Path:
    out = task.folder / "reward_model"
    arguments = {"model": task.model, "data": task.preferences, "demonstrations": task.demonstrations}
    paths = {"work": task.folder / "work", "out": out, "metrics": task.folder / "reward.jsonl"}
    text = recipe(epochs=6, learning_rate=3e-3, keep="last")
    reward.run(argparse.Namespace(**arguments, **paths, recipe=text))
    return out


def test_a_scorer_is_published_with_its_adapter_merged(task: Task, tmp_path: Path) -> None:
    arguments = {"model": task.model, "data": task.preferences, "demonstrations": task.demonstrations}
    paths = {"work": tmp_path / "work", "out": tmp_path / "scorer", "metrics": tmp_path / "reward.jsonl"}
    text = recipe(epochs=2, learning_rate=3e-3, adapter={"rank": 2, "alpha": 4})
    reward.run(argparse.Namespace(**arguments, **paths, recipe=text))
    names = load_file(paths["out"] / "model.safetensors")
    assert "score.weight" in names and not any("lora" in name for name in names)
    assert isinstance(load_scorer(paths["out"]), nn.Module)


@pytest.fixture
def models(task: Task, reward_model: Path) -> ppo.Models:
    return ppo.Models(
        policy=load_policy(task.model)[0],
        value=load_scorer(reward_model),
        reference=load_policy(task.model)[0],
        reward=ppo.learned_reward(load_scorer(reward_model), from_json(ppo.PPORecipe, json.dumps(PPO))),
    )


def roll_out(task: Task, models: ppo.Models, values: ppo.PPORecipe) -> ppo.Rollouts:
    prompts = [ids.tolist() for ids in read_table(task.prompts, "prompts")["prompt_ids"].head(4)]
    ends = [models.policy.config.eos_token_id]
    return ppo.roll_out(models, prompts, values, ends, seeds=range(4))  # type: ignore[arg-type]


def test_reward_model_fits_its_pairs_and_references_average_zero(task: Task, reward_model: Path) -> None:
    manifest = json.loads((reward_model / "manifest.json").read_text())
    metrics = [json.loads(line) for line in (task.folder / "reward.jsonl").read_text().splitlines()]
    training = [row["accuracy"] for row in metrics if row["split"] == "train"]
    assert training[-1] > 0.7
    last = [row for row in metrics if row["split"] == "validation"][-1]
    assert (manifest["held_out_split"], manifest["held_out_pairs"]) == ("validation", 4)
    assert manifest["held_out"] == pytest.approx({name: last[name] for name in ("loss", "margin", "accuracy")})
    assert manifest["identity"]["inputs"] == {
        "data": read_manifest(task.preferences)["content_hash"],
        "demonstrations": read_manifest(task.demonstrations)["content_hash"],
        **model_hashes("model", task.model),
    }
    demonstrations = read_table(task.demonstrations, "demonstrations")
    rows = [
        Row(tuple(d.prompt_ids.tolist()), (tuple(d.response_ids.tolist()),))
        for d in demonstrations[demonstrations["split"] == "train"].itertuples()
    ]
    scores = score_rows(load_scorer(reward_model), rows, token_budget=64)
    assert scores.shape == (12, 1)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() > 1e-3
    rounded = score_rows(load_scorer(reward_model), rows, token_budget=64, dtype="bfloat16")
    assert 0 < (rounded - scores).abs().max() < 0.05 * scores.std()


def test_an_equal_score_counts_as_half_right(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([1.0, 1.0, 2.0, 1.5, 0.0, 3.0])
    monkeypatch.setattr(reward, "raw_scores", lambda model, rows: scores)
    examples = reward.preference_examples(read_table(task.preferences, "preferences"))
    assert examples.weights == [1.0] * 16
    losses, figures = examples.losses(torch.nn.Identity(), [0, 1, 2])
    assert figures["margin"].tolist() == [0, 0.5, -3] and figures["accuracy"].tolist() == [0.5, 1, 0]
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-margin)) for margin in (0, 0.5, -3)])


def test_reward_is_read_at_eos_and_equals_transformers_own_forward(task: Task, reward_model: Path) -> None:
    model = load_scorer(reward_model)
    pair = read_table(task.preferences, "preferences").iloc[0]
    row = Row(tuple(pair.prompt_ids.tolist()), (tuple(pair.chosen_ids.tolist()), tuple(pair.rejected_ids.tolist())))
    ours = raw_scores(model, [row])
    model.config.pad_token_id = None  # transformers then reads the last position of a single row
    for score, completion in zip(ours, row.completions, strict=True):
        whole = model(input_ids=torch.tensor([[*row.prompt, *completion]])).logits
        assert score.item() == pytest.approx(whole.item(), abs=1e-5)


def test_a_scorer_without_an_offset_gives_its_scores_as_they_are(task: Task) -> None:
    model, _ = new_scorer(task.model, 0)
    assert not hasattr(model.config, "reward_offset")
    rows = [Row((5, 6), ((7, 8, 0), (9, 0))), Row((5,), ((8, 0), (7,)))]
    raw = raw_scores(model, rows).view(2, 2)
    torch.testing.assert_close(score_rows(model, rows, token_budget=64), raw.detach())
    model.config.reward_offset = 2.0
    torch.testing.assert_close(score_rows(model, rows, token_budget=64), raw.detach() - 2)


def test_first_update_has_ratio_one_and_no_divergence(task: Task, models: ppo.Models) -> None:
    values = from_json(ppo.PPORecipe, json.dumps(PPO))
    rollouts = roll_out(task, models, values)
    assert ppo.describe(rollouts)["kl"] == pytest.approx(0, abs=1e-4)
    optimizer = build_optimizer(torch.nn.ModuleList([models.policy, models.value]), "adamw", 1e-3)
    figures = ppo.update(models, optimizer, rollouts, values, 0.05, torch.Generator().manual_seed(0))
    assert figures["first_ratio"] == pytest.approx(1, abs=1e-4)
    assert figures["ratio"] != pytest.approx(1, abs=1e-4)
    assert figures["grad_norm"] > 0
    after = roll_out(task, models, values)
    assert ppo.describe(after)["kl"] > 1e-4 or after.rows != rollouts.rows


def test_a_completion_without_eos_gets_the_missing_eos_reward(task: Task, models: ppo.Models) -> None:
    values = dataclasses.replace(from_json(ppo.PPORecipe, json.dumps(PPO)), max_new_tokens=2, missing_eos_reward=-7.0)
    rollouts = roll_out(task, models, values)
    assert not rollouts.ended.all()
    assert set(rollouts.scores[~rollouts.ended].tolist()) == {-7.0}
    assert -7.0 not in rollouts.scores[rollouts.ended].tolist()


def test_ppo_raises_a_reward_that_can_be_raised(task: Task, models: ppo.Models) -> None:
    """The reward is the share of tokens from a tenth of the vocabulary; it must rise far above a tenth."""
    values = dataclasses.replace(
        from_json(ppo.PPORecipe, json.dumps(PPO)), temperature=1.0, kl_coef=0.0, samples_per_prompt=16, epochs=4
    )
    models.value.score.weight.data.zero_()
    both = torch.nn.ModuleList([models.policy, models.value])
    optimizer = build_optimizer(both, "adamw", 1e-2, adam_eps=1e-5)
    prompts = [ids.tolist() for ids in read_table(task.prompts, "prompts")["prompt_ids"].head(4)]
    rewards = []
    for step in range(12):
        rollouts = ppo.roll_out(models, prompts, values, ends=[299], seeds=range(4 * step, 4 * step + 4))
        completions = [completion for row in rollouts.rows for completion in row.completions]
        scores = torch.tensor([sum(token < 30 for token in ids) / len(ids) for ids in completions])
        rewards.append(scores.mean().item())
        rollouts = dataclasses.replace(rollouts, scores=scores * 10)
        ppo.update(models, optimizer, rollouts, values, 0.0, torch.Generator().manual_seed(step))
    assert rewards[0] < 0.15
    assert rewards[-1] > 0.5


def test_stage_runs_resumes_and_publishes(
    task: Task, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(name: str) -> argparse.Namespace:
        return argparse.Namespace(
            model=task.model,
            reward_model=reward_model,
            prompts=task.prompts,
            recipe=json.dumps(PPO),
            work=tmp_path / name / "work",
            out=tmp_path / name / "ppo",
            metrics=tmp_path / name / "ppo.jsonl",
            by_step=None,
        )

    ppo.run(arguments("whole"))
    real_update, calls = ppo.update, 0

    def dying_update(*values: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real_update(*values)

    monkeypatch.setattr(ppo, "update", dying_update)
    with pytest.raises(KeyboardInterrupt):
        ppo.run(arguments("killed"))
    monkeypatch.setattr(ppo, "update", real_update)
    ppo.run(arguments("killed"))
    assert weights_hash(tmp_path / "whole" / "ppo") == weights_hash(tmp_path / "killed" / "ppo")
    manifest = json.loads((tmp_path / "whole" / "ppo" / "manifest.json").read_text())
    assert manifest["identity"]["inputs"] == {
        "prompts": read_manifest(task.prompts)["content_hash"],
        **model_hashes("reference", task.model),
        **model_hashes("reward", reward_model),
    }
    assert (manifest["used"]["stage"], manifest["used"]["models"]) == ("ppo", 4)
    whole, killed = (tmp_path / name / "ppo.jsonl" for name in ("whole", "killed"))
    assert whole.read_text() == killed.read_text()
    steps = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["step"] for row in steps if row["split"] == "validation"] == [0, 2, 3]


def test_prompts_are_used_evenly() -> None:
    order = ppo.PromptOrder(10, seed=0)
    drawn = [i for done in range(5) for i in order.of_update(4, done)]
    assert sorted(drawn) == sorted([*range(10), *range(10)])
