"""Ids agree among base, policy, reward model and tables, or the stage that brings them together says so."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prefopt.errors import UserError
from prefopt.generation import best_of_n, sample, score
from prefopt.judging import accuracy
from prefopt.lm.models import load_tokenizer, new_scorer, save_model, tokenizer_hash
from prefopt.training import ppo, preference, reference, reward, sft
from test_reward_and_ppo import PPO
from tiny_task import TRAINING, Task, recipe

SAMPLING: dict[str, Any] = {
    **{"temperatures": [0.0], "stop": [], "n": 1, "max_new_tokens": 3, "train_prompts": 2, "validation_prompts": 0},
    **{"test_prompts": 0, "token_budget": 64, "dtype": "float32", "seed": 0, "vllm": None},
}
COMPUTE = '{"token_budget": 64, "dtype": "float32"}'


@pytest.fixture(scope="module")
def other(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the same tokenizer.json, and another token at the end of a text."""
    folder = tmp_path_factory.mktemp("other") / "instruct"
    shutil.copytree(task.model, folder)
    path = folder / "tokenizer_config.json"
    ends = load_tokenizer(folder).convert_ids_to_tokens(40)
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": ends}))
    assert (folder / "tokenizer.json").read_bytes() == (task.model / "tokenizer.json").read_bytes()
    return folder


@pytest.fixture(scope="module")
def scorers(task: Task, other: Path) -> tuple[Path, Path]:
    """A reward model of the base, and one of the other folder."""
    for folder in (task.model, other):
        save_model(other.parent / f"scorer_{folder.name}", *new_scorer(folder, 0), {})
    return other.parent / f"scorer_{task.model.name}", other.parent / f"scorer_{other.name}"


def sampled(task: Task, folder: Path) -> Path:
    out = folder / "samples.parquet"
    paths = {"model": task.model, "prompts": task.prompts, "out": out, "reference_model": None}
    paths |= {"shard": None, "earlier": None}
    sample.run(argparse.Namespace(**paths, run="sft", shots=0, recipe=json.dumps(SAMPLING)))
    return out


def stages(task: Task, other: Path, folder: Path) -> dict[str, tuple[ModuleType, dict[str, Any]]]:
    data = {"model": other, "data": task.preferences, "out": folder / "out", "metrics": folder / "metrics"}
    data |= {"work": folder / "work", "recipe": recipe(completion="chosen")}
    shown = {**data, "data": task.demonstrations, "recipe": recipe(completion="response")}
    asked = {
        "model": other,
        "prompts": task.prompts,
        "out": folder / "out",
        "shard": None,
        "earlier": None,
        "run": "sft",
    }
    asked |= {"reference_model": None, "recipe": json.dumps(SAMPLING)}
    pairwise = {"objective": "dpo", "values": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}}
    return {
        "sft": (sft, shown),
        "preferred_ft": (sft, data),
        "reference": (reference, {**data, "recipe": COMPUTE}),
        "dpo": (
            preference,
            {**data, "reference": None, "reference_model": None, "by_step": None, "recipe": recipe(**pairwise)},
        ),
        "reward": (reward, {**data, "demonstrations": task.demonstrations, "recipe": json.dumps(TRAINING)}),
        "ppo": (ppo, {**data, "prompts": task.prompts, "reward_model": other, "recipe": json.dumps(PPO)}),
        "sample": (sample, asked),
    }


@pytest.mark.parametrize("stage", ["sft", "preferred_ft", "reference", "dpo", "reward", "ppo", "sample"])
def test_a_model_that_ends_texts_otherwise_than_the_data(stage: str, task: Task, other: Path, tmp_path: Path) -> None:
    module, arguments = stages(task, other, tmp_path)[stage]
    with pytest.raises(
        UserError, match=r"was made with tokenizer_hash = '.*, EOS 0', but '.*, EOS 40' is expected here"
    ):
        module.run(argparse.Namespace(**arguments))  # type: ignore[attr-defined]
    assert list(tmp_path.glob("out*")) == []


def test_a_reward_model_of_another_base(task: Task, scorers: tuple[Path, Path], tmp_path: Path) -> None:
    own, foreign = scorers
    out = sampled(task, tmp_path)
    paths = {"prompts": task.prompts, "samples": out, "out": tmp_path / "scores.parquet", "shard": None}
    with pytest.raises(UserError, match="EOS 40' is expected here"):
        score.run(argparse.Namespace(**paths, model=foreign, recipe=COMPUTE))
    score.run(argparse.Namespace(**paths, model=own, recipe=COMPUTE))

    arguments = {"model": task.model, "reward_model": foreign, "prompts": task.prompts, "work": tmp_path / "work"}
    places = {"out": tmp_path / "ppo", "metrics": tmp_path / "ppo.jsonl"}
    with pytest.raises(
        UserError, match=r"The tokenizer of .*scorer_instruct .*EOS 40\) is not that of .*base .*EOS 0\)"
    ):
        ppo.run(argparse.Namespace(**arguments, **places, by_step=None, recipe=json.dumps(PPO)))
    with pytest.raises(UserError, match="EOS 40' is expected here"):
        values = json.dumps({"token_budget": 64, "confidence": 0.95})
        paths = {"gold_model": foreign, "gold_data": task.preferences, "out": tmp_path / "accuracy.parquet"}
        accuracy.run(argparse.Namespace(**paths, recipe=values))


def test_a_reference_policy_of_another_base(task: Task, other: Path, scorers: Any, tmp_path: Path) -> None:
    paths = {
        "model": task.model,
        "prompts": task.prompts,
        "out": tmp_path / "s.parquet",
        "shard": None,
        "earlier": None,
    }
    with pytest.raises(UserError, match=r"The tokenizer of .*instruct .*EOS 40\) is not that of .*base"):
        sample.run(argparse.Namespace(**paths, reference_model=other, run="sft", shots=0, recipe=json.dumps(SAMPLING)))
    out = sampled(task, tmp_path)
    score.run(
        argparse.Namespace(
            **{"prompts": task.prompts, "samples": out, "out": tmp_path / "scores.parquet", "shard": None},
            **{"model": scorers[0], "recipe": COMPUTE},
        )
    )
    given = {"candidates": out, "scores": tmp_path / "scores.parquet", "greedy": out, "prompts": task.prompts}
    with pytest.raises(UserError, match="EOS 40' is expected here"):
        best_of_n.run(
            argparse.Namespace(
                **given, reference_model=other, run="best", n=1, recipe=COMPUTE, out=tmp_path / "b.parquet"
            )
        )


def test_the_tokenizer_beside_a_trained_model_is_the_bases(task: Task, scorers: tuple[Path, Path]) -> None:
    assert tokenizer_hash(scorers[0]) == tokenizer_hash(task.model)
