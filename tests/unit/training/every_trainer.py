"""Runs every trainer once on the tiny task, in the process group that the environment describes.

    python every_trainer.py TASK OUT

Started by `test_processes.py` in groups of one, two and four, since starting Python takes longer than training.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from prefopt import collectives, processes
from prefopt.training import classifier, dpo, ppo, pretrain, reference, reward, sft
from test_reward_and_ppo import PPO
from tiny_task import SHAPE, TRAINING

# The last batch of an epoch is smaller than four processes' hands, and the budget cuts each into micro-batches.
VALUES: dict[str, dict[str, Any]] = {
    "sft": {**TRAINING, "batch_size": 5, "completion": "response", "keep": "best"},
    "preferred_ft": {**TRAINING, "completion": "chosen", "optimizer": "adamw", "activation_checkpointing": True},
    "adapter": {**TRAINING, "completion": "chosen", "adapter": {"rank": 2, "alpha": 4}},
    "reference": {"token_budget": 64, "dtype": "float32"},
    "dpo": {**TRAINING, "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
    "dpo_adapter": {
        **{**TRAINING, "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
        "adapter": {"rank": 2, "alpha": 4},
    },
    "reward": TRAINING,
    "ppo": {**PPO, "prompts_per_update": 5, "keep": "best"},
    "pretrain": {**TRAINING, **SHAPE, "epochs": 1},
    "classifier": {**TRAINING, "epochs": 1, "max_length": 16},
}
MODULES = {
    **{"sft": sft, "preferred_ft": sft, "adapter": sft, "reference": reference, "dpo": dpo, "dpo_adapter": dpo},
    **{"reward": reward, "ppo": ppo, "pretrain": pretrain, "classifier": classifier},
}


def inputs(name: str, task: Path) -> dict[str, Path | None]:
    """A stage's inputs; the reference table and the reward model are made beforehand by one process."""
    model, preferences = {"model": task / "base"}, {"data": task / "preferences.parquet"}
    cached = {"reference": task / "logps.parquet", "by_step": None}
    by_name: dict[str, dict[str, Path | None]] = {
        "sft": {**model, "data": task / "demonstrations.parquet"},
        "dpo": {**model, **preferences, **cached},
        "dpo_adapter": {**model, **preferences, **cached},
        "reward": {**model, **preferences, "demonstrations": task / "demonstrations.parquet"},
        "ppo": {**model, "reward_model": task / "scorer", "prompts": task / "prompts.parquet"},
        "pretrain": {"text": task / "text.parquet"},
        "classifier": {**model, "reviews": task / "reviews.parquet"},
    }
    return by_name.get(name, {**model, **preferences})


def run(name: str, task: Path, out: Path, **values: Any) -> None:
    """Runs a stage with its values, some of them replaced."""
    paths = {"work": out / "work" / name, "out": out / name, "metrics": out / f"{name}.jsonl"}
    paths |= {"table": out / f"{name}.csv"}
    recipe = json.dumps({**VALUES[name], **values})
    MODULES[name].run(argparse.Namespace(**inputs(name, task), **paths, recipe=recipe))  # type: ignore[attr-defined]


def main() -> None:
    """Runs all of them."""
    torch.set_num_threads(1)
    task, out = map(Path, sys.argv[1:])
    with collectives.joined() if processes.count() > 1 else contextlib.nullcontext():
        for name in VALUES:
            run(name, task, out)


if __name__ == "__main__":
    main()
