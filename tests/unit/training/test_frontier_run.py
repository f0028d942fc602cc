"""One run of the sweep: every checkpoint is evaluated, in memory, and a run goes on where it stopped."""

from __future__ import annotations

import argparse
import functools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from prefopt.data import labels
from prefopt.errors import UserError
from prefopt.experiment.recipes import from_dict, from_json
from prefopt.generation.measures import completion_measures
from prefopt.lm.batching import Row
from prefopt.lm.models import load_scorer, new_scorer, save_model
from prefopt.rewards.learned import score_rows
from prefopt.store.tables import read_manifest, read_table, write_table
from prefopt.training import frontier_run, loop, reference
from prefopt.training.rollouts import PPORecipe
from prefopt.training.stage import model_hashes
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
    "dpo": {**TRAINING, "objective": "dpo", "values": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}},
    "unlikelihood": {**TRAINING, "objective": "unlikelihood", "values": {"alpha": 0.5}},
    "preferred_ft": {**TRAINING, "completion": "chosen"},
    "simpo": {**TRAINING, "objective": "simpo", "values": {"beta": 2.0, "margin": 1.0}},
    "orpo": {**TRAINING, "objective": "orpo", "values": {"beta": 0.5}},
    "kto": {**TRAINING, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "ppo_gt": {**PPO, "updates": 4, "kl_target": 3.0, "missing_eos_reward": None, "validation_prompts": 0},
}
# One sample of a checkpoint, where its evaluation is not what is looked at.
EVALUATED = {"prompt_id": "t0", "sample_index": 0, "reward": 0.5, "kl": 0.0, "tokens": 1, "logp": -1.0}
EVALUATED |= completion_measures([1], [2], "a", True) | {"learned_reward": None}


@pytest.fixture(scope="module")
def inputs(task: Task) -> dict[str, Path]:
    prompts = read_table(task.prompts, "prompts")
    rows = pd.concat([prompts, prompts.tail(4).assign(split="test", prompt_id=[f"t{i}" for i in range(4)])])
    hash_of = read_manifest(task.prompts)["tokenizer_hash"]
    write_table(task.folder / "with_test.parquet", "prompts", rows, tokenizer_hash=hash_of)
    recipe = '{"token_budget": 128, "dtype": "float32"}'
    taken_apart = task.folder / "frontier_labels.parquet"
    labels.run(argparse.Namespace(data=task.preferences, out=taken_apart))
    for name, data in (("pairs", task.preferences), ("labels", taken_apart)):
        out = task.folder / f"frontier_{name}_logps.parquet"
        reference.run(argparse.Namespace(model=task.model, data=data, recipe=recipe, out=out))
    return {
        **{"data": task.preferences, "reference": task.folder / "frontier_pairs_logps.parquet"},
        **{"labels": taken_apart, "label_reference": task.folder / "frontier_labels_logps.parquet"},
        "prompts": task.folder / "with_test.parquet",
    }


def arguments(task: Task, inputs: dict[str, Path], folder: Path, method: str, **values: Any) -> argparse.Namespace:
    recipe = {
        "run": f"{method}_x",
        "method": method,
        "kind": {"preferred_ft": "sft", "ppo_gt": "ppo", "kto": "kto"}.get(method, "preference"),
        "learned_reward": False,
        "models": 3 if method == "ppo_gt" else 2,
        "conservativeness": None if method == "preferred_ft" else 0.5,
        "interval": 2,
        "checkpoints": 2,
        "trainer": TRAINERS[method],
        "evaluation": EVALUATION,
        "reward": {"kind": "rule", "max_length": 64, "batch_size": 8},
    }
    paths = {"work": folder / "work", "out": folder / "out.parquet", "metrics": folder / "metrics.jsonl"}
    models = {"model": task.model, "reward_model": None, "true_reward_model": None}
    learned = ("labels", "label_reference") if method == "kto" else ("data", "reference")
    given = dict(zip(("data", "reference", "prompts"), (inputs[name] for name in (*learned, "prompts")), strict=True))
    return argparse.Namespace(**given, **models, **paths, recipe=json.dumps({**recipe, **values}))


@pytest.mark.parametrize("method", TRAINERS)
def test_every_checkpoint_is_evaluated_from_the_reference_policy_on(
    task: Task, inputs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    args = arguments(task, inputs, tmp_path, method)
    frontier_run.run(args)
    table = read_table(args.out, "evaluations")
    assert len(table) == 3 * 4 * 2 and sorted(table["step"].unique()) == [0, 2, 4]
    assert table["prompt_id"].tolist() == [f"t{i}" for i in range(4) for _ in range(2)] * 3
    assert set(table["run"]) == {f"{method}_x"} and table["reward"].between(0, 1).all()
    assert table["conservativeness"].isna().all() == (method == "preferred_ft")
    by_step = table.groupby("step")["kl"].mean()
    assert abs(by_step[0]) < 1e-5 and by_step[2] > 1e-6 and by_step[4] != by_step[2]
    used = read_manifest(args.out)["used"]
    assert used["flops"] > 0 and used["models"] == (3 if method == "ppo_gt" else 2)
    assert (used["generated_tokens"] > 0) == (method == "ppo_gt")
    pairs = {} if method == "ppo_gt" else {"data": read_manifest(args.data)["content_hash"]}
    assert read_manifest(args.out)["identity"]["inputs"] == {
        "prompts": read_manifest(inputs["prompts"])["content_hash"],
        **model_hashes("reference", task.model),
        **pairs,
    }
    steps = [row["step"] for row in map(json.loads, args.metrics.read_text().splitlines()) if row["split"] == "train"]
    assert steps == [1, 2, 3, 4], "no longer than to the last checkpoint"
    left = [path for path in (tmp_path / "work").rglob("*") if path.suffix in (".parquet", ".safetensors", ".pt")]
    assert left == []


@pytest.mark.parametrize("method", ["dpo", "unlikelihood", "preferred_ft", "kto"])
def test_each_method_learns_from_its_own_side_of_its_own_pairs(
    task: Task, inputs: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step every figure follows from the reference table, and DPO's policy has no margin."""
    monkeypatch.setattr(frontier_run, "evaluate_policy", lambda *values: [EVALUATED])
    args = arguments(task, inputs, tmp_path, method, interval=1, checkpoints=1)
    frontier_run.run(args)
    validation, training = (json.loads(line) for line in args.metrics.read_text().splitlines()[:2])
    if method == "kto":
        # The policy is the reference: no log-ratio, no KL, and each example loses 1 - sigmoid(0).
        for figures in (validation, training):
            expected = {"loss": 0.5, "kl": 0.0, "kto_margin": 0.0, "kto_accuracy": 0.5}
            assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-3)
        return
    table = read_table(inputs["reference"], "reference_logprobs")
    first = loop.epoch_batches(12, TRAINING["batch_size"], TRAINING["seed"], 0)[0]
    for figures, rows in ((validation, table.iloc[12:]), (training, table.iloc[first])):
        chosen, rejected, tokens = (rows[name] for name in ("chosen_logp", "rejected_logp", "chosen_tokens"))
        expected = {
            "dpo": {"loss": math.log(2), "margin": 0.0, "chosen_reward": 0.0, "rejected_reward": 0.0}
            | {"chosen_logp": chosen.mean(), "rejected_logp": rejected.mean()},
            "unlikelihood": {"loss": (0.5 * rejected - chosen).sum() / tokens.sum()}
            | {"chosen_logp": chosen.mean(), "rejected_logp": rejected.mean()},
            "preferred_ft": {"loss": -chosen.sum() / tokens.sum(), "logp": chosen.mean()},
        }[method]
        assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


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


@pytest.mark.parametrize("again", [True, False])
def test_activations_of_the_value_network_are_computed_again_if_asked_for(
    task: Task, again: bool, inputs: dict[str, Path], tmp_path: Path
) -> None:
    args = arguments(task, inputs, tmp_path, "ppo_gt")
    recipe = from_json(frontier_run.FrontierRunRecipe, args.recipe)
    trainer = from_dict(PPORecipe, {**TRAINERS["ppo_gt"], "activation_checkpointing": again})
    models, _ = frontier_run._ppo_models(args, recipe, trainer, None, None, None, lambda texts: torch.zeros(0))
    assert all(isinstance(layer.forward, functools.partial) == again for layer in models.value.model.layers)


def test_a_learned_reward_is_learned_from_and_told_beside_the_true_one(
    task: Task, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, tokenizer = new_scorer(task.model, 3)
    scorer.config.reward_offset = -20.0
    save_model(tmp_path / "scorer", scorer, tokenizer, {})
    once = {"learned_reward": True, "interval": 1, "checkpoints": 1, "trainer": {**TRAINERS["ppo_gt"], "updates": 1}}
    args = arguments(task, inputs, tmp_path, "ppo_gt", **once)
    args.reward_model = tmp_path / "scorer"
    rows = [Row((5, 6), ((7, 8, 0), (9, 0)))]
    evaluate, given = frontier_run.evaluate_policy, []

    def watched(*values: Any) -> Any:
        given.append(values[-1](rows))
        return evaluate(*values)

    monkeypatch.setattr(frontier_run, "evaluate_policy", watched)
    frontier_run.run(args)
    expected = score_rows(load_scorer(tmp_path / "scorer"), rows, 64)
    assert len(given) == 2 and all(torch.equal(one, expected) for one in given)
    learned = read_table(args.out, "evaluations")["learned_reward"]
    assert learned.notna().all() and (learned > 15).all(), "the offset is taken off"
    told = read_manifest(args.out)["identity"]["inputs"]
    assert told.items() >= model_hashes("reward", tmp_path / "scorer").items()
    # The value network starts from the reward model.
    recipe = from_json(frontier_run.FrontierRunRecipe, args.recipe)
    trainer = from_dict(PPORecipe, TRAINERS["ppo_gt"])
    models, _ = frontier_run._ppo_models(args, recipe, trainer, None, None, None, lambda texts: torch.zeros(0))
    assert models.learned_reward and torch.equal(models.value.score.weight, scorer.score.weight)


def test_the_learned_reward_must_be_given(task: Task, inputs: dict[str, Path], tmp_path: Path) -> None:
    args = arguments(task, inputs, tmp_path, "ppo_gt")
    args.recipe = args.recipe.replace('"learned_reward": false', '"learned_reward": true')
    with pytest.raises(UserError, match="ppo_gt learns from a reward model; give --reward-model"):
        frontier_run.run(args)
