"""One run of the sweep: every checkpoint is evaluated, in memory, and a run goes on where it stopped."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from prefopt.errors import UserError
from prefopt.tables import read_manifest, read_table, write_table
from prefopt.training import frontier_run, reference
from test_reward_and_ppo import PPO
from tiny_task import TRAINING, Task

EVALUATION = {
    "prompts": 4,
    "samples_per_prompt": 2,
    "max_new_tokens": 6,
    "seed": 0,
    "token_budget": 64,
    "dtype": "float32",
}
TRAINERS: dict[str, dict[str, Any]] = {
    "dpo": {**TRAINING, "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    "unlikelihood": {**TRAINING, "alpha": 0.5},
    "preferred_ft": {**TRAINING, "completion": "chosen"},
    "ppo_gt": {**PPO, "updates": 4, "kl_target": 3.0, "missing_eos_reward": None, "validation_prompts": 0},
}


@pytest.fixture(scope="module")
def inputs(task: Task) -> dict[str, Path]:
    prompts = read_table(task.prompts, "prompts")
    rows = pd.concat([prompts, prompts.tail(4).assign(split="test", prompt_id=[f"t{i}" for i in range(4)])])
    hash_of = read_manifest(task.prompts)["tokenizer_hash"]
    write_table(task.folder / "with_test.parquet", "prompts", rows, tokenizer_hash=hash_of)
    logps = task.folder / "frontier_logps.parquet"
    recipe = '{"token_budget": 128, "dtype": "float32"}'
    reference.run(argparse.Namespace(model=task.model, data=task.preferences, recipe=recipe, out=logps))
    return {"data": task.preferences, "reference": logps, "prompts": task.folder / "with_test.parquet"}


def arguments(task: Task, inputs: dict[str, Path], folder: Path, method: str, **values: Any) -> argparse.Namespace:
    recipe = {
        "run": f"{method}_x",
        "method": method,
        "conservativeness": None if method == "preferred_ft" else 0.5,
        "interval": 2,
        "checkpoints": 2,
        "trainer": TRAINERS[method],
        "evaluation": EVALUATION,
        "reward": {"kind": "rule", "max_length": 64, "batch_size": 8},
    }
    paths = {"work": folder / "work", "out": folder / "out.parquet", "metrics": folder / "metrics.jsonl"}
    models = {"model": task.model, "reward_model": None, "true_reward_model": None}
    return argparse.Namespace(**inputs, **models, **paths, recipe=json.dumps({**recipe, **values}))


@pytest.mark.parametrize("method", TRAINERS)
def test_every_checkpoint_is_evaluated_from_the_reference_policy_on(
    task: Task, inputs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    args = arguments(task, inputs, tmp_path, method)
    frontier_run.run(args)
    table = read_table(args.out, "evaluations")
    assert len(table) == 3 * 4 * 2 and sorted(table["step"].unique()) == [0, 2, 4]
    assert set(table["run"]) == {f"{method}_x"} and table["reward"].between(0, 1).all()
    assert table["conservativeness"].isna().all() == (method == "preferred_ft")
    by_step = table.groupby("step")["kl"].mean()
    assert abs(by_step[0]) < 1e-5 and by_step[2] > 1e-6 and by_step[4] != by_step[2]
    used = read_manifest(args.out)["used"]
    assert used["flops"] > 0 and used["models"] == (3 if method == "ppo_gt" else 2)
    assert (used["generated_tokens"] > 0) == (method == "ppo_gt")
    left = [path for path in (tmp_path / "work").rglob("*") if path.suffix in (".parquet", ".safetensors", ".pt")]
    assert left == []


def test_an_interrupted_run_goes_on_and_ends_the_same(
    task: Task, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = arguments(task, inputs, tmp_path / "whole", "dpo")
    frontier_run.run(whole)
    args = arguments(task, inputs, tmp_path / "cut", "dpo")
    evaluate, seen = frontier_run.evaluate_policy, []

    def stop_at_the_last(*values: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(*values)

    monkeypatch.setattr(frontier_run, "evaluate_policy", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        frontier_run.run(args)
    assert not args.out.exists()
    monkeypatch.setattr(frontier_run, "evaluate_policy", lambda *values: seen.append(9) or evaluate(*values))
    frontier_run.run(args)
    assert seen.count(9) < 3, "a finished checkpoint was evaluated again"
    pd.testing.assert_frame_equal(read_table(args.out, "evaluations"), read_table(whole.out, "evaluations"))


def test_the_learned_reward_must_be_given(task: Task, inputs: dict[str, Path], tmp_path: Path) -> None:
    args = arguments(task, inputs, tmp_path, "ppo_gt")
    args.recipe = args.recipe.replace('"method": "ppo_gt"', '"method": "ppo"')
    with pytest.raises(UserError, match="the method ppo learns from a reward model; give --reward-model"):
        frontier_run.run(args)
