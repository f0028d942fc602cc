"""Metrics of trainers as TensorBoard reads them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt import cli
from prefopt.analysis.event_files import trainings, write_events
from prefopt.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"step": 0, "split": "validation", "loss": 0.75, "name": "no number"},
    {"step": 1, "split": "train", "loss": 0.5, "learning_rate": 2.5e-6},
    {"step": 2, "split": "train", "loss": 0.25, "learning_rate": 5e-6},
    {"step": 2, "split": "validation", "loss": 0.375},
]


def write(path: Path, rows: list[dict[str, Any]], when: float = 1000.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, (when, when))


def checkpoint(work: Path, name: str, facts: dict[str, Any], when: float) -> None:
    path = work / name / "facts.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(facts))
    os.utime(path, (when, when))


def test_every_figure_of_every_trainer_is_a_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path / "results" / "training" / "tldr" / "dpo.jsonl", ROWS)
    write(tmp_path / "results" / "seed_1" / "training" / "tldr" / "dpo.jsonl", ROWS[:1])
    arguments = ["export", "tensorboard", str(tmp_path / "results"), "--out", str(tmp_path / "events")]
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 0, "a second time replaces the folder"
    found = {}
    for folder in sorted({path.parent for path in (tmp_path / "events").rglob("*tfevents*")}):
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            points = [(event.step, round(event.value, 9), event.wall_time) for event in events.Scalars(tag)]
            found[f"{folder.relative_to(tmp_path / 'events')}: {tag}"] = points
    assert found == {
        "seed_1/training/tldr/dpo/validation: loss": [(0, 0.75, 1000.0)],
        "training/tldr/dpo/train: learning_rate": [(1, 2.5e-6, 1000.0), (2, 5e-6, 1000.0)],
        "training/tldr/dpo/train: loss": [(1, 0.5, 1000.0), (2, 0.25, 1000.0)],
        "training/tldr/dpo/validation: loss": [(0, 0.75, 1000.0), (2, 0.375, 1000.0)],
    }


def test_a_training_that_runs_has_its_metrics_in_its_last_checkpoint(tmp_path: Path) -> None:
    work = tmp_path / "work"
    checkpoint(work, "tldr/dpo/aaaa/checkpoint_000007", {"step": 1, "metrics": ROWS[:2]}, when=10)
    checkpoint(work, "tldr/dpo/bbbb/checkpoint_000001", {"step": 2, "metrics": ROWS}, when=30)
    checkpoint(work, "tldr/dpo/bbbb/checkpoint_000000", {"step": 1, "metrics": ROWS[:3]}, when=20)
    checkpoint(work, "tldr/dpo/bbbb/best_000001", {"step": 2}, when=40)
    assert trainings(work) == {"tldr/dpo": (ROWS, 30.0)}


def test_one_file_and_nothing_at_all(tmp_path: Path) -> None:
    write(tmp_path / "dpo.jsonl", ROWS)
    assert trainings(tmp_path / "dpo.jsonl") == {"dpo": (ROWS, 1000.0)}
    for source in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match="holds no metrics: name results/training, or work once"):
            trainings(source)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_without_tensorboard_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install tensorboard\.$"):
        write_events({"dpo": (ROWS, 0.0)}, tmp_path / "events")
    assert not (tmp_path / "events").exists()
