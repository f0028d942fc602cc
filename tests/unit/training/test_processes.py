"""The same recipe in one, two and four processes: the same losses and weights, whatever the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import every_trainer
from prefopt.lm.batching import Row
from prefopt.lm.sharding import dealt_micro_batches
from prefopt.runtime import processes
from prefopt.store.tables import read_manifest, read_table
from tiny_task import Task

SIZES = (1, 2, 4)
TRAINERS = [name for name in every_trainer.VALUES if not name.startswith("reference")]


@pytest.fixture(scope="module")
def runs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each number of processes, with what every trainer made there."""
    folder = tmp_path_factory.mktemp("processes")
    every_trainer.make_inputs(task.folder, folder / "first")
    for size in SIZES:
        assert group([every_trainer.__file__, str(task.folder), str(folder / str(size))], size) == [0] * size
    return folder


def group(arguments: list[str], size: int) -> list[int]:
    """Exit codes of a group of processes that all run this Python script."""
    folder = Path(arguments[-1])
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    path = ":".join(map(str, [Path(processes.__file__).parents[2], here, here.parent / "lm"]))
    shared = {"WORLD_SIZE": str(size), "PREFOPT_STORE": str(folder / "store"), "PYTHONPATH": path}
    started = [
        subprocess.Popen([sys.executable, *arguments], env={**os.environ, **shared, "RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        return [process.wait(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()


def metrics(path: Path) -> pd.DataFrame:
    return pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("name", TRAINERS)
def test_losses_and_weights_do_not_depend_on_the_number_of_processes(runs: Path, name: str, size: int) -> None:
    one, many = (metrics(runs / str(n) / f"{name}.jsonl") for n in (1, size))
    assert list(one.columns) == list(many.columns) and len(one) == len(many) > 2
    pd.testing.assert_frame_equal(one, many, rtol=1e-5, atol=1e-6)
    weights, others = (load_file(runs / str(n) / name / "model.safetensors") for n in (1, size))
    assert weights.keys() == others.keys()
    for key in weights:
        torch.testing.assert_close(weights[key], others[key], rtol=1e-4, atol=1e-5)
    manifest = json.loads((runs / str(size) / name / "manifest.json").read_text())
    assert manifest["used"]["world_size"] == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_bfloat16_stays_near_float32(runs: Path, name: str, size: int) -> None:
    """Gathered weights are bfloat16 where there are several processes, casts of float32 ones in one."""
    whole, half = (
        metrics(runs / str(n)).query("split == 'train'") for n in (f"1/{name}.jsonl", f"{size}/bfloat16/{name}.jsonl")
    )
    assert half["loss"].iloc[0] == pytest.approx(whole["loss"].iloc[0], rel=0.05)
    assert half["grad_norm"].iloc[0] == pytest.approx(whole["grad_norm"].iloc[0], rel=0.1)
    used = json.loads((runs / f"{size}/bfloat16/{name}/manifest.json").read_text())["used"]
    assert (used["dtype"], used["world_size"]) == ("bfloat16", size)
    if name == "ppo":
        assert half["first_ratio"].to_numpy() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize(
    ("name", "table"), [("reference", "reference_logprobs"), ("reference_labels", "reference_label_logprobs")]
)
def test_a_reference_table_does_not_depend_on_the_number_of_processes(
    runs: Path, size: int, name: str, table: str
) -> None:
    one, many = (read_table(runs / str(n) / name, table) for n in (1, size))
    pd.testing.assert_frame_equal(one, many, rtol=1e-5)
    counted = [read_manifest(runs / str(n) / name)["used"] for n in (1, size)]
    assert counted[0]["examples"] == counted[1]["examples"] == len(one)
    assert counted[0]["flops"] == counted[1]["flops"] and counted[0]["tokens"] == counted[1]["tokens"]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_row_is_dealt_to_one_process_and_all_take_as_many_passes(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(range(1 + i % 4), (range(1 + i * i % 11),)) for i in range(13)]
    monkeypatch.setenv("WORLD_SIZE", str(size))
    passes, seen, tokens = set(), [], []
    for rank in range(size):
        monkeypatch.setenv("RANK", str(rank))
        dealt = dealt_micro_batches(rows, token_budget=20)
        passes.add(len(dealt))
        own = [i for batch, counts in dealt if counts for i in batch]
        seen += own
        tokens.append(sum(rows[i].tokens for i in own))
        assert all(sum(rows[i].tokens for i in batch) <= 20 for batch, _ in dealt)
    assert len(passes) == 1 and sorted(seen) == list(range(13))
    assert size == 8 or max(tokens) < 1.5 * min(tokens)
