"""Rewards of samples against each sample scored by itself, and what the stage says of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from prefopt.generation import sample, score
from prefopt.generation.score import ScoreRecipe, score_samples
from prefopt.lm.batching import Row
from prefopt.lm.models import load_scorer, new_scorer, save_model, weights_hash
from prefopt.lm.shape import rows_flops, shape_of
from prefopt.rewards.learned import score_rows
from prefopt.runtime.usage import Usage
from prefopt.store.tables import read_manifest, read_table
from tiny_task import Task, task

__all__ = ["task"]

SAMPLING = {
    **{"temperatures": [0.0, 1.0], "stop": [], "n": 3, "max_new_tokens": 6, "train_prompts": 2, "seed": 0},
    **{"validation_prompts": 2, "test_prompts": 0, "token_budget": 64, "dtype": "float32", "vllm": None},
}


@pytest.fixture(scope="module")
def scorer(task: Task) -> Path:
    save_model(task.folder / "scorer", *new_scorer(task.model, seed=1), {})
    return task.folder / "scorer"


@pytest.fixture(scope="module")
def samples(task: Task) -> Path:
    out = task.folder / "samples.parquet"
    paths = {"model": task.model, "reference_model": None, "prompts": task.prompts, "earlier": None, "out": out}
    sample.run(argparse.Namespace(**paths, run="base", shots=0, shard=None, recipe=json.dumps(SAMPLING)))
    return out


@pytest.mark.parametrize("budget", [10_000, 1])
def test_every_reward_is_its_samples_own(budget: int, task: Task, scorer: Path, samples: Path) -> None:
    model, table = load_scorer(scorer), read_table(samples, "samples")
    prompts = read_table(task.prompts, "prompts")
    usage = Usage("test", torch.device("cpu"), "float32")
    # In another order, so that groups are not what they are scored as by chance.
    turned = table.sample(frac=1, random_state=0)
    found = score_samples(model, prompts, turned, ScoreRecipe(token_budget=budget, dtype="float32"), usage)
    assert found.columns.tolist() == ["prompt_id", "temperature", "sample_index", "reward"]
    assert found["sample_index"].tolist() == turned["sample_index"].tolist()
    ids = dict(zip(prompts["prompt_id"], prompts["prompt_ids"], strict=True))
    rows = [Row(tuple(ids[row.prompt_id]), (tuple(row.token_ids),)) for row in turned.itertuples()]
    rewards = [score_rows(model, [row], 10_000).item() for row in rows]
    assert found["reward"].tolist() == pytest.approx(rewards, abs=1e-6) and len(set(rewards)) > 10
    assert usage.examples == len(table) == 4 * (1 + 3)
    if budget == 1:  # a prompt is read for each sample
        assert usage.tokens == sum(row.tokens for row in rows)
        assert usage.flops == rows_flops(shape_of(model), rows)
    else:
        # At each of two temperatures once.
        prompt_tokens = sum(len(ids[name]) for name in set(turned["prompt_id"]))
        assert usage.tokens == 2 * prompt_tokens + turned["tokens"].sum()


def test_the_tables_manifest_says_what_was_scored_by_what(
    task: Task, scorer: Path, samples: Path, tmp_path: Path
) -> None:
    recipe = {"token_budget": 64, "dtype": "float32"}
    paths = {"model": scorer, "prompts": task.prompts, "samples": samples, "out": tmp_path / "scores.parquet"}
    score.run(argparse.Namespace(**paths, shard=None, recipe=json.dumps(recipe)))
    table = read_table(tmp_path / "scores.parquet", "scores")
    assert len(table) == 16
    manifest = table.attrs["manifest"]
    assert manifest["samples"] == read_manifest(samples)["content_hash"]
    assert manifest["reward_weights"] == weights_hash(scorer) and manifest["recipe"] == recipe
    assert manifest["shape"] == dataclasses.asdict(shape_of(load_scorer(scorer)))
    used = manifest["used"]
    assert (used["stage"], used["device"], used["dtype"], used["examples"]) == ("score", "cpu", "float32", 16)
