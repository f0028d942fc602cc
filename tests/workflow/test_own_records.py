"""Records of one's own, by config alone: conversations in a file and in a saved folder, to a task's tokenized tables."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from running import REPOSITORY, only, overlay, planned, snakemake
from test_record_formats import SECTIONS

from prefopt.data.formats.recognise import FORMATS


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


def conversation(number: int) -> dict[str, Any]:
    start = (f"my cat {number}", "the shoe") if number % 2 else ()
    return {side: turns(*start, f"post number {number}", f"a {side} text {number}") for side in ("chosen", "rejected")}


@pytest.mark.workflow
def test_conversations_become_a_tasks_tables(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(
        REPOSITORY / "workflow" / "models" / "tldr_base", base, ignore=shutil.ignore_patterns("manifest.json")
    )
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
        "base": {"source": "path", "path": "base"},
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
    # What the user brought is known by its content, also where Snakemake's own records stay behind.
    assert verified(tmp_path, path, *targets) == (0, "")
    (tmp_path / "chats.json").write_text(json.dumps([{**rows[0], "chosen": rows[1]["chosen"]}, *rows[1:40]]))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    status, said = verified(tmp_path, path, *targets)
    assert status == 2 and "results/data/hh/raw/preferences.parquet: made of another records" in said
    assert "results/data/hh/preferences.parquet: made of another base" in said
    jobs = planned(*targets, "--configfile", path, folder=tmp_path)
    assert {"records", "prepare", "prepare_preferences", "summary"} <= jobs.keys()


def verified(folder: Path, overlay: Path, *targets: str) -> tuple[int, str]:
    """Status of the command `verify`, and what it says of results that are not as asked for."""
    words = [sys.executable, "-m", "prefopt", "verify", *targets, "--configfile", overlay]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, "\n".join(line for line in done.stdout.splitlines() if "made of another" in line)


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


@pytest.mark.workflow
def test_as_many_files_as_one_likes_become_a_table(tmp_path: Path) -> None:
    """Their names are together more than Linux lets one argument hold, and so is the command that holds them."""
    folder = tmp_path / "a folder with a name that is about as long as names of folders of records are"
    folder.mkdir()
    for i in range(1800):
        post = {"id": f"p{i}", "title": f"title {i}", "post": f"text number {i} about things", "subreddit": "x"}
        (folder / f"part-{i:05d}-of-01800.jsonl").write_text(json.dumps({**post, "summary": f"summary {i}"}))
    (tmp_path / "none.jsonl").touch()
    posts = sorted(str(path.relative_to(tmp_path)) for path in folder.iterdir())
    assert sum(map(len, posts)) > 2**17
    data = {"source": "files", "posts": posts, "comparisons": ["none.jsonl"], "gold_fraction": 0.3}
    tldr = {"data": data, "judge": {"kind": "reward_model"}, "human": None}
    path = overlay(tmp_path, {"tasks": {"tldr": tldr, **dict.fromkeys(("hh", "cnndm", "imdb"))}})
    target = "results/data/tldr/raw/demonstrations.parquet"
    result = snakemake("--cores", "1", "--show-failed-logs", target, "--configfile", path, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert len(pd.read_parquet(tmp_path / target)) == 1800


def numbered(value: Any, number: str) -> Any:
    """An example row whose every text about a prompt says a number, so that it is another prompt."""
    if isinstance(value, dict):
        own = ("prompt", "content", "post", "article", "title")
        return {
            key: f"{number} {one}" if key in own and isinstance(one, str) else numbered(one, number)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [numbered(one, number) for one in value]
    return value.replace("Human: Hi", f"Human: Hi {number}") if isinstance(value, str) else value


def every_format(folder: Path) -> Iterator[tuple[str, Path, int]]:
    """The example rows of docs/record_formats.md, twelve of each, in files of every ending: format, file, rows."""
    writers = {
        "jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
        "json": lambda rows: json.dumps(rows).encode(),
        "jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        "json.zst": lambda rows: pa.compress(json.dumps(rows).encode(), "zstd", asbytes=True),
        "csv": lambda rows: pd.DataFrame(cells(rows)).to_csv(index=False).encode(),
        "parquet": lambda rows: pd.DataFrame(rows).to_parquet(),
    }
    for (name, text), ending in zip(SECTIONS.items(), itertools.cycle(writers), strict=False):
        blocks = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
        # Of one file each row has one form; a later block of the page is another.
        for number, block in enumerate(blocks):
            rows = [numbered(json.loads(line), f"{name} {i}") for i in range(12) for line in block.splitlines()]
            path = folder / f"{name}_{number}.{ending}"
            path.write_bytes(writers[ending](rows))
            yield name, path, len(rows)


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as a CSV file holds them, lists as JSON."""
    return [{key: one if isinstance(one, str | int) else json.dumps(one) for key, one in row.items()} for row in rows]


@pytest.mark.workflow
def test_every_format_becomes_one_tasks_tables_and_policy(tmp_path: Path) -> None:
    files = list(every_format(tmp_path))
    assert {name for name, *_ in files} == set(FORMATS)
    trained = {"epochs": 1, "batch_size": 16, "warmup_steps": 1, "evaluate_every": 4}
    support = {
        "like": "tldr",
        "data": {"source": "records", "records": [path.name for _, path, _ in files], "pairs": {"rule": "all"}},
        "runs": {**dict.fromkeys(only("tldr")), "sft": {"method": "sft"}},
        "base": {"source": "path", "path": str(REPOSITORY / "workflow" / "models" / "tldr_base")},
        "prompt": {"style": "plain"},
        "sft": trained,
    }
    path = overlay(tmp_path, {"tasks": {"support": support, **dict.fromkeys(("hh", "tldr", "cnndm", "imdb"))}})
    targets = ("results/models/support/sft", "results/data/support/summary.json")
    result = snakemake("--cores", "1", "--show-failed-logs", *targets, "--configfile", path, folder=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    summary = json.loads((tmp_path / targets[1]).read_text())
    told = [(one["format"], one["source"], one["rows"]["read"]) for one in summary["sources"]]
    assert told == [(name, path.name, rows) for name, path, rows in files]
    assert all(one["taken"] for one in summary["sources"])
    assert planned(*targets, "--configfile", path, folder=tmp_path) == {}
