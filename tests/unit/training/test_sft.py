"""Fine-tuning's loss: a mean over the tokens of all completions, in training and in validation."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import pandas as pd
import pytest
import torch

from prefopt.lm.models import load_policy, tokenizer_hash, weights_hash
from prefopt.store.tables import read_table
from prefopt.training import loop, sft
from tiny_task import Task, recipe


@torch.no_grad()
def plain_logps(task: Task, table: pd.DataFrame, column: str) -> list[tuple[float, int]]:
    """Log-probability and tokens of each completion, from transformers' own forward of one row at a time."""
    model, _ = load_policy(task.model)
    found = []
    for row in table.itertuples():
        completion = getattr(row, column).tolist()
        ids = torch.tensor([[*row.prompt_ids.tolist(), *completion]])
        logps = model(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        found.append((logps[-len(completion) :].sum().item(), len(completion)))
    return found


def token_mean(logps: list[tuple[float, int]]) -> float:
    return -sum(logp for logp, _ in logps) / sum(tokens for _, tokens in logps)


@pytest.mark.parametrize(
    ("completion", "data", "seed"), [("response", "demonstrations", 0), ("chosen", "preferences", 1)]
)
def test_the_loss_is_a_mean_over_the_tokens_of_the_asked_completions(
    completion: str, data: str, seed: int, task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths = {"work": tmp_path / "work", "out": tmp_path / "model", "metrics": tmp_path / "metrics.jsonl"}
    values = recipe(completion=completion, epochs=1, batch_size=6, evaluate_every=2, seed=seed)
    sft.run(argparse.Namespace(model=task.model, data=getattr(task, data), **paths, by_step=None, recipe=values))
    metrics = [json.loads(line) for line in paths["metrics"].read_text().splitlines()]
    table = read_table(getattr(task, data), data)
    logps = plain_logps(task, table, f"{completion}_ids")
    assert len({tokens for _, tokens in logps}) > 1
    first = loop.epoch_batches(12, 6, seed, 0)[0]  # of the training rows, which come before the others
    assert metrics[0]["split"] == "validation" and metrics[1]["split"] == "train"
    assert metrics[0]["loss"] == pytest.approx(token_mean(logps[12:]), rel=1e-5)
    assert metrics[0]["logp"] == pytest.approx(sum(logp for logp, _ in logps[12:]) / 4, rel=1e-5)
    assert metrics[1]["loss"] == pytest.approx(token_mean([logps[i] for i in first]), rel=1e-5)
    manifest = json.loads((paths["out"] / "manifest.json").read_text())
    assert (manifest["used"]["stage"], manifest["used"]["examples"]) == ("sft", 12)
    assert "sft: step 0, validation loss " in caplog.text
    assert manifest["identity"]["inputs"] == {
        "data": table.attrs["manifest"]["content_hash"],
        "model_weights": weights_hash(task.model),
        "model_tokenizer": tokenizer_hash(task.model),
    }
