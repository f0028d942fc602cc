"""A policy's own implicit reward, against plain forward passes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from prefopt.generation import implicit_rewards, sample
from prefopt.lm.models import load_policy, save_model, weights_hash
from prefopt.store.tables import read_manifest, read_table, write_table
from tiny_task import Task, task

__all__ = ["task"]

SAMPLING = {
    **{"temperatures": [0.7], "stop": [], "n": 3, "max_new_tokens": 6, "train_prompts": 2, "seed": 0},
    **{"validation_prompts": 2, "test_prompts": 0, "token_budget": 64, "dtype": "float32", "vllm": None},
}


@pytest.fixture(scope="module")
def policy(task: Task) -> Path:
    """The base with other weights."""
    model, tokenizer = load_policy(task.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(task.folder / "policy", model, tokenizer, {})
    return task.folder / "policy"


@pytest.fixture(scope="module")
def samples(task: Task, policy: Path) -> Path:
    out = task.folder / "own_samples.parquet"
    paths = {"model": policy, "reference_model": None, "prompts": task.prompts, "earlier": None, "out": out}
    sample.run(argparse.Namespace(**paths, run="own", shots=0, shard=None, recipe=json.dumps(SAMPLING)))
    return out


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("budget", [10_000, 1])
def test_a_reward_is_beta_times_the_log_ratio(
    normalized: bool, budget: int, task: Task, policy: Path, samples: Path, tmp_path: Path
) -> None:
    recipe = {"beta": 0.5, "length_normalized": normalized, "token_budget": budget, "dtype": "float32"}
    out = tmp_path / "scores.parquet"
    paths = {"model": policy, "reference_model": task.model, "prompts": task.prompts, "samples": samples, "out": out}
    implicit_rewards.run(argparse.Namespace(**paths, shard=None, recipe=json.dumps(recipe)))
    prompts = read_table(task.prompts, "prompts").set_index("prompt_id")["prompt_ids"]
    models = [load_policy(folder)[0] for folder in (policy, task.model)]
    rows = read_table(samples, "samples")
    found = read_table(out, "scores", samples=read_manifest(samples)["content_hash"])
    assert len(found) == len(rows) == 12 and found["reward"].abs().max() > 0.05
    for one, reward in zip(rows.itertuples(), found["reward"], strict=True):
        ids = torch.tensor([[*prompts[one.prompt_id], *one.token_ids]])
        # At temperature 1, whatever it was sampled at.
        with torch.no_grad():
            logps = [
                model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-one.tokens :].sum()
                for model in models
            ]
        expected = 0.5 * (logps[0] - logps[1]).item() / (one.tokens if normalized else 1)
        assert reward == pytest.approx(expected, abs=1e-5)
    manifest = read_manifest(out)
    assert manifest["reward_weights"] == [weights_hash(policy), weights_hash(task.model)]
    # Both models read every completion.
    assert manifest["used"]["stage"] == "implicit_rewards"
    assert manifest["used"]["examples"] == 2 * 12 and manifest["used"]["flops"] > 0


def test_shards_are_whole_groups_of_a_prompt_and_a_temperature(
    task: Task, policy: Path, samples: Path, tmp_path: Path
) -> None:
    """Of four prompts at one temperature and once more at another the first half is the first temperature's."""
    rows = read_table(samples, "samples")
    twice = pd.concat([rows, rows.assign(temperature=1.0)])
    both = tmp_path / "samples.parquet"
    write_table(both, "samples", twice, prompts=read_manifest(task.prompts)["content_hash"])
    recipe = json.dumps({"beta": 0.5, "length_normalized": False, "token_budget": 64, "dtype": "float32"})
    paths = {"model": policy, "reference_model": task.model, "prompts": task.prompts, "samples": both}
    whole, *halves = (
        (tmp_path / f"{name}.parquet", shard) for name, shard in (("whole", None), ("a", "1-of-2"), ("b", "2-of-2"))
    )
    for out, shard in (whole, *halves):
        implicit_rewards.run(argparse.Namespace(**paths, out=out, shard=shard, recipe=recipe))
    every, *parts = (pd.read_parquet(out) for out, _ in (whole, *halves))
    assert [part["temperature"].unique().tolist() for part in parts] == [[0.7], [1.0]]
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), every)


def test_a_policy_gives_its_own_reference_no_reward(task: Task, samples: Path, tmp_path: Path) -> None:
    recipe = {"beta": 0.5, "length_normalized": False, "token_budget": 64, "dtype": "float32"}
    out = tmp_path / "scores.parquet"
    paths = {"model": task.model, "reference_model": task.model, "prompts": task.prompts, "samples": samples}
    implicit_rewards.run(argparse.Namespace(**paths, out=out, shard=None, recipe=json.dumps(recipe)))
    assert read_table(out, "scores")["reward"].eq(0).all()
