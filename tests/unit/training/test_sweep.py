"""A run of a sweep: every checkpoint is evaluated, in memory, by its method's trainer, and a run goes on where it stopped."""

from __future__ import annotations

import argparse
import dataclasses
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
from prefopt.lm.models import load_policy, load_scorer, new_scorer, save_model, weights_hash
from prefopt.rewards.learned import score_rows
from prefopt.rewards.true_reward import load_true_reward
from prefopt.store.tables import read_manifest, read_table, write_table
from prefopt.training import by_step, kto, loop, ppo, preference, reference, round_evaluations, sft
from prefopt.training.evaluation import EvaluationRecipe, evaluate_policy
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
ADAPTER = {"rank": 4, "alpha": 8}
TRAINERS: dict[str, dict[str, Any]] = {
    "dpo": {**TRAINING, "objective": "dpo", "values": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}},
    "adapted": {**TRAINING, "objective": "simpo", "values": {"beta": 2.0, "margin": 1.0}, "adapter": ADAPTER},
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


RULE = {"kind": "rule", "max_length": 64, "batch_size": 8}
KINDS: dict[str, Any] = {"preferred_ft": sft, "ppo_gt": ppo, "kto": kto}


def arguments(
    task: Task,
    inputs: dict[str, Path],
    folder: Path,
    method: str,
    interval: int = 2,
    points: int = 2,
    learned: bool = False,
    **values: Any,
) -> argparse.Namespace:
    """Of a method's trainer, for a run of so many intervals with a checkpoint after each."""
    steps = interval * points
    if method == "ppo_gt":
        recipe = {**TRAINERS[method], "updates": steps, "true_reward": None if learned else RULE}
        given = {"prompts": inputs["prompts"], "reward_model": folder / "scorer" if learned else None}
    else:
        recipe = {**TRAINERS[method], "epochs": None, "steps": steps}
        names = ("labels", "label_reference") if method == "kto" else ("data", "reference")
        given = dict(zip(("data", "reference"), (inputs[name] for name in names), strict=True))
        given["reference_model"] = None
    of_run = {"points": points, "method": method, "seed": 0, "evaluation": EVALUATION, "reward": RULE}
    of_run["conservativeness"] = None if method == "preferred_ft" else 0.5
    paths = {"work": folder / "work", "out": folder / "model", "metrics": folder / "metrics.jsonl"}
    paths |= {"sampled_prompts": inputs["prompts"], "evaluations": folder / "out.parquet"}
    nothing = {"true_reward_model": None, "samples": None}
    texts = {"run": f"{method}_x", "by_step": json.dumps(of_run), "recipe": json.dumps({**recipe, **values})}
    return argparse.Namespace(**given, **paths, **nothing, **texts, model=task.model)


def run(method: str, args: argparse.Namespace) -> pd.DataFrame:
    """The evaluations of a run."""
    KINDS.get(method, preference).run(args)
    return read_table(args.evaluations, "evaluations")


@pytest.mark.parametrize("method", TRAINERS)
def test_every_checkpoint_is_evaluated_from_the_reference_policy_on(
    task: Task, inputs: dict[str, Path], tmp_path: Path, method: str
) -> None:
    args = arguments(task, inputs, tmp_path, method)
    table = run(method, args)
    assert len(table) == 3 * 4 * 2 and sorted(table["step"].unique()) == [0, 2, 4]
    assert table["prompt_id"].tolist() == [f"t{i}" for i in range(4) for _ in range(2)] * 3
    assert set(table["run"]) == {f"{method}_x"} and table["reward"].between(0, 1).all()
    assert table["conservativeness"].isna().all() == (method == "preferred_ft")
    by_step = table.groupby("step")["kl"].mean()
    assert abs(by_step[0]) < 1e-5 and by_step[2] > 1e-6 and by_step[4] != by_step[2]
    used = read_manifest(args.evaluations)["used"]
    assert used["flops"] > 0 and used["models"] == (3 if method == "ppo_gt" else 2)
    assert (used["generated_tokens"] > 0) == (method == "ppo_gt")
    pairs = {} if method == "ppo_gt" else {"data": read_manifest(args.data)["content_hash"]}
    hashed = read_manifest(inputs["prompts"])["content_hash"]
    assert read_manifest(args.evaluations)["identity"]["inputs"] == {
        **{"sampled_prompts": hashed, "by_step": args.by_step, **pairs},
        **({"prompts": hashed} if method == "ppo_gt" else {}),
        **model_hashes("model" if method == "preferred_ft" else "reference", task.model),
    }
    # What is published is what was evaluated last.
    policy, tokenizer = load_policy(args.out)
    start, test = load_policy(task.model)[0], read_table(inputs["prompts"], "prompts").tail(4)
    reward = load_true_reward(folder=None, device=torch.device("cpu"), **RULE)
    again = evaluate_policy(policy, start, tokenizer, test, reward, from_dict(EvaluationRecipe, EVALUATION))
    last = table[table["step"] == 4]
    for key in ("reward", "kl", "logp", "tokens"):
        assert last[key].tolist() == pytest.approx([row[key] for row in again], abs=1e-5)
    steps = [row["step"] for row in map(json.loads, args.metrics.read_text().splitlines()) if row["split"] == "train"]
    assert steps == [1, 2, 3, 4], "no longer than to the last checkpoint"
    left = [path for path in (tmp_path / "work").rglob("*") if path.suffix in (".parquet", ".safetensors", ".pt")]
    assert left == []


def test_a_run_in_rounds_is_evaluated_at_the_end_of_each(task: Task, inputs: dict[str, Path], tmp_path: Path) -> None:
    """As any other checkpoint of the same weights: by the same draws, against the same reference policy."""
    trained = arguments(task, inputs, tmp_path / "dpo", "dpo", points=1)
    expected = run("dpo", trained)
    scorer, tokenizer = new_scorer(task.model, 3)
    save_model(tmp_path / "scorer", scorer, tokenizer, {})
    out = tmp_path / "rounds.parquet"
    paths = {"model": task.model, "sampled_prompts": inputs["prompts"], "evaluations": out, "samples": None}
    rewards = {"true_reward_model": None, "reward_model": tmp_path / "scorer"}
    rounds = {"rounds": [trained.out, task.model], "run": "mine", "by_step": trained.by_step}
    round_evaluations.run(argparse.Namespace(**paths, **rewards, **rounds))
    table = read_table(out, "evaluations")
    assert table["step"].tolist() == [step for step in (0, 1, 2) for _ in range(8)] and set(table["run"]) == {"mine"}
    for step, of in ((0, 0), (1, 2), (2, 0)):
        ours, theirs = table[table["step"] == step], expected[expected["step"] == of]
        for key in ("prompt_id", "sample_index", "tokens", "method", "conservativeness"):
            assert ours[key].tolist() == theirs[key].tolist()
        for key in ("reward", "kl", "logp"):
            assert ours[key].tolist() == pytest.approx(theirs[key].tolist(), abs=1e-5)
    assert table["learned_reward"].notna().all() and expected["learned_reward"].isna().all()
    identity, used = (read_manifest(out)[name] for name in ("identity", "used"))
    assert identity["rounds"] == [model_hashes("policy", folder) for folder in rounds["rounds"]]
    assert identity["prompts"] == read_manifest(inputs["prompts"])["content_hash"]
    assert identity["reward_weights"] is None
    assert identity["learned_reward_weights"] == weights_hash(tmp_path / "scorer")
    assert (used["stage"], used["examples"], used["models"]) == ("round_evaluations", 3 * 4 * 2, 2)
    # With no learned reward, and a true one that is a model (the rule of this recipe does not read it).
    rewards = {"true_reward_model": tmp_path / "scorer", "reward_model": None}
    round_evaluations.run(argparse.Namespace(**paths, **rewards, **rounds))
    assert read_table(out, "evaluations")["learned_reward"].isna().all()
    identity = read_manifest(out)["identity"]
    assert identity["learned_reward_weights"] is None
    assert identity["reward_weights"] == weights_hash(tmp_path / "scorer")


@pytest.mark.parametrize("method", ["dpo", "unlikelihood", "preferred_ft", "kto"])
def test_each_method_learns_from_its_own_side_of_its_own_pairs(
    task: Task, inputs: dict[str, Path], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step every figure follows from the reference table, and DPO's policy has no margin."""
    monkeypatch.setattr(by_step, "evaluate_policy", lambda *values: [EVALUATED])
    args = arguments(task, inputs, tmp_path, method, interval=1, points=1)
    run(method, args)
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
    whole = run("dpo", arguments(task, inputs, tmp_path / "whole", "dpo"))
    args = arguments(task, inputs, tmp_path / "cut", "dpo")
    evaluate, seen = by_step.evaluate_policy, []

    gathered: list[Any] = []
    all_weights = by_step.gathered
    monkeypatch.setattr(by_step, "gathered", lambda model: gathered.append(model) or all_weights(model))

    def stop_at_the_last(*values: Any) -> Any:
        assert gathered[-1] is values[0], "all weights of the policy are there"
        seen.append(len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(*values)

    monkeypatch.setattr(by_step, "evaluate_policy", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run("dpo", args)
    assert not args.evaluations.exists() and not args.out.exists()
    monkeypatch.setattr(by_step, "evaluate_policy", lambda *values: seen.append(9) or evaluate(*values))
    table = run("dpo", args)
    assert seen.count(9) < 3, "a finished checkpoint was evaluated again"
    pd.testing.assert_frame_equal(table, whole)


def test_what_is_evaluated_otherwise_is_begun_anew(
    task: Task, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was cut short and is then to have more checkpoints has none of those that were not asked for."""
    evaluate, seen = by_step.evaluate_policy, []

    def stop_at_the_second(*values: Any) -> Any:
        seen.append(len(seen))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(*values)

    monkeypatch.setattr(by_step, "evaluate_policy", stop_at_the_second)
    once = {"checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run("dpo", arguments(task, inputs, tmp_path, "dpo", **once))
    table = run("dpo", arguments(task, inputs, tmp_path, "dpo", interval=1, points=4, **once))
    assert table["step"].drop_duplicates().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("again", [True, False])
def test_activations_of_the_value_network_are_computed_again_if_asked_for(
    task: Task, again: bool, inputs: dict[str, Path], tmp_path: Path
) -> None:
    args = arguments(task, inputs, tmp_path, "ppo_gt")
    recipe = from_json(PPORecipe, args.recipe)
    models, *_ = ppo._models(args, dataclasses.replace(recipe, activation_checkpointing=again))
    for model in (models.policy, models.value):
        assert all(isinstance(layer.forward, functools.partial) == again for layer in model.model.layers)


def test_a_learned_reward_is_learned_from_and_told_beside_the_true_one(
    task: Task, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, tokenizer = new_scorer(task.model, 3)
    scorer.config.reward_offset = -20.0
    save_model(tmp_path / "scorer", scorer, tokenizer, {})
    args = arguments(task, inputs, tmp_path, "ppo_gt", interval=1, points=1, learned=True)
    rows = [Row((5, 6), ((7, 8, 0), (9, 0)))]
    evaluate, given = by_step.evaluate_policy, []

    def watched(*values: Any) -> Any:
        given.append(values[-1](rows))
        return evaluate(*values)

    monkeypatch.setattr(by_step, "evaluate_policy", watched)
    learned = run("ppo_gt", args)["learned_reward"]
    expected = score_rows(load_scorer(tmp_path / "scorer"), rows, 64)
    assert len(given) == 2 and all(torch.equal(one, expected) for one in given)
    assert learned.notna().all() and (learned > 15).all(), "the offset is taken off"
    told = read_manifest(args.evaluations)
    assert told["identity"]["inputs"].items() >= model_hashes("reward", tmp_path / "scorer").items()
    assert told["used"]["models"] == 4
    # The value network starts from the reward model.
    models, *_ = ppo._models(args, from_json(PPORecipe, args.recipe))
    assert models.learned_reward and torch.equal(models.value.score.weight, scorer.score.weight)


def test_the_learned_reward_must_be_given(task: Task, inputs: dict[str, Path], tmp_path: Path) -> None:
    args = arguments(task, inputs, tmp_path, "ppo_gt", learned=True)
    args.reward_model = None
    with pytest.raises(UserError, match="unless its recipe names a true reward; give --reward-model"):
        run("ppo_gt", args)


def test_several_processes_are_refused(
    task: Task, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_step.processes, "count", lambda: 2)
    args = arguments(task, inputs, tmp_path, "dpo")
    table = read_table(inputs["prompts"], "prompts")
    with pytest.raises(UserError, match="in one process"):
        by_step._evaluated(args, table, None, None, None, None)


@pytest.mark.parametrize("length", [{"epochs": 1, "steps": 2}, {"epochs": None, "steps": None}])
def test_a_training_lasts_for_steps_or_for_epochs(
    task: Task, inputs: dict[str, Path], tmp_path: Path, length: dict[str, int | None]
) -> None:
    args = arguments(task, inputs, tmp_path, "dpo")
    args.recipe = json.dumps({**json.loads(args.recipe), **length})
    with pytest.raises(UserError, match="lasts for steps or for epochs"):
        run("dpo", args)
