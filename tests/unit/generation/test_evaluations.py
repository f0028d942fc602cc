"""True reward and KL of what a run wrote while it trained."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prefopt.data.synthetic.hidden import quality_score
from prefopt.data.synthetic.posts import generate
from prefopt.errors import UserError
from prefopt.generation import evaluations
from prefopt.generation.evaluations import EvaluationsRecipe, evaluations_of
from prefopt.lm.batching import Row
from prefopt.lm.models import new_scorer, save_model, tokenizer_hash, weights_hash
from prefopt.rewards import stage
from prefopt.rewards.learned import score_rows
from prefopt.rewards.stage import TrueRewardsRecipe, sample_reward
from prefopt.store.tables import read_manifest, read_table, write_table
from tiny_task import Task, task

__all__ = ["task"]

REWARD = {"kind": "oracle", "max_length": 0, "batch_size": 0, "token_budget": 100}
RECIPE = EvaluationsRecipe(
    run="mine", method="dpo", seed=3, conservativeness=0.5, reward=REWARD, token_budget=100, dtype="float32"
)


PROMPTS = pd.DataFrame({"prompt_id": [f"p{i}" for i in range(10)], "prompt_ids": [np.array([1, 2, 3])] * 10})


def samples(**values: Any) -> pd.DataFrame:
    rows = [
        {"prompt_id": f"p{i}", "sample_index": 0, "run": f"mine_step_{step}", "tokens": 4 + i, "logp": -2.0 - i}
        | {"token_ids": [4, 5], "text": " x" * i, "finish_reason": ["end:<turn>", "length"][i]}
        for step in (0, 12)
        for i in range(2)
    ]
    return pd.DataFrame(rows).assign(**values)


def test_a_kl_is_the_log_ratio_of_a_sample_and_a_step_is_told_by_its_name() -> None:
    table = evaluations_of(
        samples(),
        PROMPTS,
        [-2.0, -3.5, -4.0, -3.0],
        lambda rows: torch.arange(4.0),
        lambda rows: -torch.ones(4),
        RECIPE,
    )
    assert table["learned_reward"].tolist() == [-1.0] * 4
    assert table["kl"].tolist() == [0.0, 0.5, 2.0, 0.0] and table["reward"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert table["step"].tolist() == [0, 0, 12, 12] and table["step"].dtype == np.int64
    assert table["logp"].tolist() == [-2.0, -3.0] * 2 and table["ended"].tolist() == [True, False] * 2
    assert table["empty"].tolist() == [True, False] * 2 and not table[["repeats", "copies"]].to_numpy().any()
    assert set(zip(table["run"], table["method"], table["seed"], table["conservativeness"], strict=True)) == {
        ("mine", "dpo", 3, 0.5)
    }
    with pytest.raises(UserError, match="A sample's reward is nan for p1"):
        evaluations_of(
            samples(), PROMPTS, [-2.0] * 4, lambda rows: torch.tensor([0.0, float("nan"), 0.0, 0.0]), None, RECIPE
        )


def test_the_mean_log_ratio_is_the_kl_of_a_distribution_of_three() -> None:
    """By hand: p = (0.5, 0.3, 0.2), q = (0.2, 0.3, 0.5): KL = 0.3 ln 2.5."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    drawn = np.repeat(np.arange(3), (p * 10).astype(int))
    frame = pd.DataFrame(
        {"prompt_id": [f"p{i}" for i in range(10)], "sample_index": 0, "run": "mine_step_1", "tokens": 1}
    ).assign(token_ids=[[4]] * 10, text=" x", finish_reason="eos")
    rewards = evaluations_of(
        frame.assign(logp=np.log(p)[drawn]),
        PROMPTS,
        np.log(q)[drawn].tolist(),
        lambda rows: torch.zeros(10),
        None,
        RECIPE,
    )
    assert rewards["kl"].mean() == pytest.approx(0.3 * np.log(2.5))


def test_an_oracles_reward_is_the_hidden_quality_of_a_text() -> None:
    sizes = {"seed": 1, "demonstrations": 2, "validation_prompts": 0, "test_prompts": 0, "pairs": 0}
    tables = generate(
        {**sizes, "validation_pairs": 0, "gold_pairs": 0, "gold_test_pairs": 0, "pretraining_documents": 0}
    )
    prompts = pd.DataFrame(tables.demonstrations)
    reward = sample_reward(TrueRewardsRecipe(**REWARD), prompts, None, torch.device("cpu"))
    rows = prompts[["prompt_id"]].assign(text=[tables.demonstrations[0]["response"], " nothing"])
    first, second = (
        quality_score(row["facts"], row["prompt_id"], text)
        for row, text in zip(tables.demonstrations, rows["text"], strict=True)
    )
    assert reward(rows).tolist() == pytest.approx([first, second]) and first > second
    with pytest.raises(UserError, match="'p' has no hidden facts"):
        unknown = pd.DataFrame([{"prompt_id": "p", "facts": "", "prompt": "x"}])
        sample_reward(TrueRewardsRecipe(**REWARD), unknown, None, torch.device("cpu"))(
            pd.DataFrame([{"prompt_id": "p", "text": "x"}])
        )


def test_a_reward_models_prompts_are_of_its_tokenizer_and_it_runs_where_it_is_asked_to(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold, by_rule = (TrueRewardsRecipe(**{**REWARD, "kind": kind}) for kind in ("gold_reward_model", "rule"))
    assert stage._tokenized_by(gold, task.model) == {"tokenizer_hash": tokenizer_hash(task.model)}
    # Of a classifier's folder, or none, prompts may be of any.
    assert stage._tokenized_by(by_rule, task.model) == stage._tokenized_by(gold, None) == {}
    asked: list[Any] = []
    monkeypatch.setattr(stage, "load_scorer", lambda folder, device: asked.extend((folder, device)))
    stage.scored_by(task.model, PROMPTS, 64, torch.device("meta"))
    assert asked == [task.model, torch.device("meta")]


def test_the_stage_reads_temperature_1_alone(tmp_path: Path, task: Task) -> None:
    prompts = [
        {"prompt_id": f"p{i}", "prompt": "x", "reference": "", "split": "test", "facts": "", "prompt_ids": [1, 2, 3]}
        for i in range(2)
    ]
    manifest = write_table(tmp_path / "prompts.parquet", "prompts", prompts, tokenizer_hash=tokenizer_hash(task.model))
    frame = samples(split="test", reference_logp=float("nan"))
    both = pd.concat([frame.assign(temperature=1.0), frame.assign(temperature=0.7)])
    content = manifest["content_hash"]
    write_table(tmp_path / "samples.parquet", "samples", both, prompts=content)
    recipe = {**REWARD, "kind": "gold_reward_model"}
    values = {
        "run": "mine",
        "method": "dpo",
        "seed": 0,
        "conservativeness": None,
        "token_budget": 64,
        "dtype": "float32",
    }
    args = argparse.Namespace(
        samples=tmp_path / "samples.parquet",
        prompts=tmp_path / "prompts.parquet",
        reference_model=task.model,
        true_reward_model=None,
        reward_model=None,
        recipe=json.dumps({**values, "reward": recipe}),
        out=tmp_path / "out.parquet",
    )
    with pytest.raises(UserError, match="give its folder by --true-reward-model"):
        evaluations.run(args)
    args.recipe = json.dumps({**values, "reward": {**recipe, "kind": "rule"}})
    evaluations.run(args)
    table = read_table(args.out, "evaluations")
    assert len(table) == 4 and table["conservativeness"].isna().all() and table["kl"].nunique() == 2
    assert table["learned_reward"].isna().all()
    # With a reward model, which is not the true reward.
    scorer, tokenizer = new_scorer(task.model, 1)
    save_model(tmp_path / "scorer", scorer, tokenizer, {})
    args.reward_model = tmp_path / "scorer"
    evaluations.run(args)
    with_learned = read_table(args.out, "evaluations")
    rows = [Row((1, 2, 3), ((4, 5),))]
    assert with_learned["learned_reward"].tolist() == pytest.approx([score_rows(scorer, rows, 64).item()] * 4)
    assert with_learned["reward"].tolist() == table["reward"].tolist()
    manifest = read_manifest(args.out)
    assert manifest["samples"] == read_manifest(tmp_path / "samples.parquet")["content_hash"]
    assert manifest["reference_weights"] == weights_hash(task.model) and manifest["reward_weights"] is None
    assert manifest["learned_reward_weights"] == weights_hash(tmp_path / "scorer")
    write_table(tmp_path / "samples.parquet", "samples", frame.assign(temperature=0.7), prompts=content)
    with pytest.raises(UserError, match="holds no completion at temperature 1"):
        evaluations.run(args)
