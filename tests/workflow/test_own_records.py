"""Records of one's own, by config alone: conversations in a file and in a saved folder, to a task's tokenized tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from running import REPOSITORY, only, overlay, planned, snakemake


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


def conversation(number: int) -> dict[str, Any]:
    start = (f"my cat {number}", "the shoe") if number % 2 else ()
    return {side: turns(*start, f"post number {number}", f"a {side} text {number}") for side in ("chosen", "rejected")}


@pytest.mark.workflow
def test_conversations_become_a_tasks_tables(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(60)]
    (tmp_path / "chats.json").write_text(json.dumps(rows[:40]))
    datasets.disable_progress_bars()
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows[40:])).save_to_disk(tmp_path / "saved")
    hh = {
        "runs": only("hh", "dpo"),
        "data": {
            "source": "records",
            "records": ["chats.json", {"path": "saved", "split": "test", "as": "test"}],
            "gold_fraction": 0.3,
        },
        "base": {"source": "path", "path": str(REPOSITORY / "workflow" / "models" / "tldr_base")},
        "judge": {"kind": "reward_model"},
    }
    path = overlay(tmp_path, {"tasks": {"hh": hh, "tldr": None, "cnndm": None, "imdb": None}})
    targets = ("results/data/hh/summary.json", "results/data/hh/training/prompts.parquet")
    result = snakemake("--cores", "1", "--show-failed-logs", *targets, "--configfile", path, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    summary = json.loads((tmp_path / targets[0]).read_text())
    assert summary["source"] == "records" and summary["synthetic"] is False
    assert [(one["source"], one["format"], one["rows"]["read"], one["taken"]) for one in summary["sources"]] == [
        ("chats.json", "pairs", 40, 40),
        ("saved/test", "pairs", 20, 20),
    ]
    raw = pd.read_parquet(tmp_path / "results/data/hh/raw/preferences.parquet").set_index("prompt")
    assert json.loads(raw.loc["User: my cat 41\n\nAssistant: the shoe\n\nUser: post number 41", "messages"])[2] == {
        "role": "user",
        "content": "post number 41",
    }
    test = raw[raw["split"] == "test"]
    assert set(test[test["source"] == "saved/test"]["chosen"]) == {f" a chosen text {i}" for i in range(40, 60)}
    prepared = pd.read_parquet(tmp_path / "results/data/hh/preferences.parquet")
    assert len(prepared) == len(raw) and prepared["chosen_ids"].map(len).min() > 1
    training = pd.read_parquet(tmp_path / targets[1])
    assert len(training) > 10 and not set(training["prompt"]) & set(test.index)
    assert planned(*targets, "--configfile", path, folder=tmp_path) == {}


@pytest.mark.workflow
def test_a_task_of_thumbs_alone_trains_kto(tmp_path: Path) -> None:
    thumbs = [{"prompt": f"post {i}", "completion": f"text {i}", "label": i % 3 > 0} for i in range(90)]
    (tmp_path / "thumbs.jsonl").write_text("\n".join(map(json.dumps, thumbs)))
    trained = {"batch_size": 16, "warmup_steps": 1, "evaluate_every": 2}
    support = {
        "like": "hh",
        "data": {"source": "records", "records": ["thumbs.jsonl"]},
        "runs": {**dict.fromkeys(only("hh")), "sft": {"method": "sft"}, "kto": {"method": "kto"}},
        "reference": "sft",
        "base": {"source": "path", "path": str(REPOSITORY / "workflow" / "models" / "tldr_base")},
        "sft": {"epochs": 1, **trained, "learning_rate": 1e-4},
        "kto": {**trained, "undesirable_weight": 2.0},
    }
    path = overlay(tmp_path, {"tasks": {"support": support, **dict.fromkeys(("hh", "tldr", "cnndm", "imdb"))}})
    targets = ("results/models/support/kto", "results/data/support/summary.json")
    result = snakemake("--cores", "1", "--show-failed-logs", *targets, "--configfile", path, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    counts = json.loads((tmp_path / targets[1]).read_text())["tables"]
    assert (counts["labels"]["read"], counts["preferences"]["kept"], counts["demonstrations"]["kept"]) == (90, 0, 60)
    metrics = [json.loads(line) for line in (tmp_path / "results/training/support/kto.jsonl").read_text().splitlines()]
    learnt = sum(pd.read_parquet(tmp_path / "results/data/support/labels.parquet")["split"] == "train")
    assert metrics[0]["kl"] < 1e-3 and max(row["step"] for row in metrics) == -(-learnt // 16)
    assert planned(*targets, "--configfile", path, folder=tmp_path) == {}
