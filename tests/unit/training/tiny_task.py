"""A tiny random Llama in a folder, with tables of random token ids that carry its tokenizer's hash."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.data.labels import mismatched, taken_apart
from prefopt.lm.models import save_model, tokenizer_hash
from prefopt.store.tables import write_table
from prefopt.training.pretrain import PretrainRecipe, new_model, train_tokenizer

WORDS = "my dog ate the red shoe and i feel sad should i buy a new one from that shop".split()  # noqa: SIM905

TRAINING: dict[str, Any] = {
    "epochs": 2,
    "steps": None,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_steps": 2,
    "max_grad_norm": 10.0,
    "optimizer": "rmsprop",
    "weight_decay": 0.0,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "keep": "last",
    "token_budget": 64,
    "dtype": "float32",
    "activation_checkpointing": False,
    "adapter": None,
    "seed": 0,
}
SHAPE = {
    **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "layers": 2, "heads": 2, "max_positions": 64},
    **{"initializer_range": 0.02, "short_tokens": 0, "short_first": 0},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Paths of a tiny task."""

    folder: Path
    model: Path
    demonstrations: Path
    preferences: Path
    labels: Path
    prompts: Path


def recipe(**values: Any) -> str:
    return json.dumps({**TRAINING, **values})


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def make_task(folder: Path) -> Task:
    """Makes the model and its tables."""
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 3, 300)
    model = new_model(PretrainRecipe(**TRAINING, **SHAPE), tokenizer)
    path = folder / "base"
    save_model(path, model, tokenizer, {})
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " " + " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    def ids(value: str, end: bool = False) -> list[int]:
        return [*tokenizer(value, add_special_tokens=False)["input_ids"], *([tokenizer.eos_token_id] if end else [])]

    demonstrations, preferences, prompts = [], [], []
    for i in range(16):
        split = "train" if i < 12 else "validation"
        prompt, response, chosen, rejected = text(3, 6), text(2, 5), text(2, 5) + " shop", text(2, 6)
        common = {"prompt_id": f"p{i}", "prompt": prompt, "split": split, "prompt_ids": ids(prompt)}
        demonstrations.append({**common, "response": response, "facts": "", "response_ids": ids(response, True)})
        pair = {"pair_id": f"pair{i}", "chosen": chosen, "rejected": rejected, "source": "test"}
        pair_ids = {"chosen_ids": ids(chosen, True), "rejected_ids": ids(rejected, True)}
        preferences.append({**common, **pair, **pair_ids})
        prompts.append({**common, "reference": response.strip(), "facts": ""})
    labels = []
    for row in taken_apart({"messages": "", **pair} for pair in preferences):
        del row["messages"]
        labels.append({**row, "prompt_ids": ids(row["prompt"]), "completion_ids": ids(row["completion"], True)})
    for split in ("train", "validation"):
        own = [row for row in labels if row["split"] == split]
        for row, other in zip(own, mismatched([row["prompt_id"] for row in own], split), strict=True):
            row["mismatched_ids"] = own[other]["completion_ids"]
    manifest = {"tokenizer_hash": tokenizer_hash(path), "lengths": {"max_prompt_length": 40, "max_length": 60}}
    tables = {"demonstrations": demonstrations, "preferences": preferences, "labels": labels, "prompts": prompts}
    paths = {name: folder / f"{name}.parquet" for name in tables}
    for name, rows in tables.items():
        write_table(paths[name], name, rows, **manifest)
    return Task(folder, path, **paths)
