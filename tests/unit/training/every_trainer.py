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

from prefopt.lm.loading import read_model
from prefopt.lm.logprobs import completion_logprobs
from prefopt.lm.sharding import place
from prefopt.lm.verify import use_engine
from prefopt.runtime import collectives, processes
from prefopt.store.tables import write_table
from prefopt.training import classifier, kto, ppo, preference, pretrain, reference, reward, sft
from test_logprobs import ROWS
from test_reward_and_ppo import PPO
from tiny_models import CONFIGS, make_model
from tiny_task import SHAPE, TRAINING, WORDS

# The last batch of an epoch is smaller than four processes' hands, and the budget cuts each into micro-batches.
VALUES: dict[str, dict[str, Any]] = {
    "sft": {**TRAINING, "batch_size": 5, "completion": "response", "keep": "best"},
    "preferred_ft": {**TRAINING, "completion": "chosen", "optimizer": "adamw", "activation_checkpointing": True},
    "adapter": {**TRAINING, "completion": "chosen", "adapter": {"rank": 2, "alpha": 4}},
    "reference": {"token_budget": 64, "dtype": "float32"},
    "dpo": {**TRAINING, "objective": "dpo", "values": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}},
    "dpo_adapter": {
        **{**TRAINING, "objective": "dpo", "values": {"loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0}},
        "adapter": {"rank": 2, "alpha": 4},
    },
    "reference_labels": {"token_budget": 64, "dtype": "float32"},
    # An epoch's last batch of 24 examples is of one.
    "kto": {**TRAINING, "batch_size": 23, "beta": 0.5, "desirable_weight": 1.25, "undesirable_weight": 0.75},
    "reward": TRAINING,
    "ppo": {**PPO, "prompts_per_update": 5, "keep": "best"},
    "pretrain": {**TRAINING, **SHAPE, "epochs": 1},
    "classifier": {**TRAINING, "epochs": 1, "max_length": 16},
}
MODULES = {
    **{
        "sft": sft,
        "preferred_ft": sft,
        "adapter": sft,
        "reference": reference,
        "dpo": preference,
        "dpo_adapter": preference,
        "reference_labels": reference,
        "kto": kto,
    },
    **{"reward": reward, "ppo": ppo, "pretrain": pretrain, "classifier": classifier},
}


def inputs(name: str, task: Path) -> dict[str, Path]:
    """A stage's inputs; the reference tables and the reward model are made beforehand by one process."""
    model, preferences = {"model": task / "base"}, {"data": task / "preferences.parquet"}
    cached = {"reference": task / "logps.parquet"}
    by_name: dict[str, dict[str, Path]] = {
        "sft": {**model, "data": task / "demonstrations.parquet"},
        "dpo": {**model, **preferences, **cached},
        "dpo_adapter": {**model, **preferences, **cached},
        "reference_labels": {**model, "data": task / "labels.parquet"},
        "kto": {**model, "data": task / "labels.parquet", "reference": task / "label_logps.parquet"},
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
    MODULES[name].run(
        argparse.Namespace(**inputs(name, task), **paths, reference_model=None, by_step=None, recipe=recipe)
    )  # type: ignore[attr-defined]


def make_inputs(task: Path, out: Path) -> None:
    """Makes what the tiny task lacks for every trainer: texts, reviews, reference tables and a reward model."""
    write_table(task / "text.parquet", "pretraining", [{"text": " ".join(WORDS[i % 5 :])} for i in range(60)])
    reviews = [
        {"review_id": f"r{i}", "text": " ".join(WORDS[i % 7 :]), "label": i % 2, "split": split}
        for i, split in enumerate(["train"] * 9 + ["validation"] * 4 + ["test"] * 5)
    ]
    write_table(task / "reviews.parquet", "raw_reviews", reviews)
    made = {"reference": "logps.parquet", "reference_labels": "label_logps.parquet", "reward": "scorer"}
    for name, target in made.items():
        if not (task / target).exists():
            run(name, task, out)
            (out / name).rename(task / target)


def compare_shards(architecture: str, folder: Path) -> None:
    """Asserts that a model, read by the main process and sharded, has the log-probabilities and gradients of the whole one."""
    whole = make_model(architecture, engine=True)
    if processes.is_main():
        whole.save_pretrained(folder)
    collectives.barrier()
    read = read_model(type(whole), folder, weights=processes.is_main())
    assert all(parameter.is_meta != processes.is_main() for parameter in read.parameters())
    sharded = place(use_engine(read, together=True), "float32")
    expected, found = (completion_logprobs(model, ROWS, temperature=0.7).sums for model in (whole, sharded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected.sum().backward()
    found.sum().backward()
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        gradient = other.grad.full_tensor()  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def main() -> None:
    """Runs all of them, and compares every architecture."""
    torch.set_num_threads(1)
    task, out = map(Path, sys.argv[1:])
    with collectives.joined() if processes.count() > 1 else contextlib.nullcontext():
        for name in VALUES:
            run(name, task, out)
        # Matrix products in bfloat16, as on a GPU.
        for name in ("dpo", "ppo"):
            run(name, task, out / "bfloat16", dtype="bfloat16")
        for architecture in CONFIGS if processes.count() > 1 else ():
            compare_shards(architecture, out / architecture)


if __name__ == "__main__":
    main()
