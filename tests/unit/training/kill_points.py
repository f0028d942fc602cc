"""Kills a training at every change that it makes to the file system, and runs it again each time.

    python kill_points.py TRAINER TASK OUT EVERY OF_PUBLISHING

A process that has trained once, so that all is imported, forks one child for each run, since importing takes longer
than training. Of the points before publishing each EVERY-th is tried, of those from there on each OF_PUBLISHING-th. Prints a
JSON object a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import every_trainer
from prefopt.training import by_step, stage
from test_by_step import SAMPLING

# The first weights are the best on validation, so that the last ones would be told from them.
SHORT: dict[str, Any] = {"keep": "best", "learning_rate": 0.3, "evaluate_every": 1, "checkpoint_every": 1}
EPOCH = {**SHORT, "epochs": 1, "batch_size": 6}
VALUES: dict[str, dict[str, Any]] = {
    "sft": EPOCH,
    "dpo": EPOCH,  # sampled by step
    "kto": {**EPOCH, "batch_size": 12},
    "ppo": {**SHORT, "updates": 2},
}
KILLED = 9


def train(trainer: str, task: Path, out: Path, die_at: int | None = None) -> tuple[int, dict[str, int]]:
    """Trains in a child that dies in place of its change number `die_at`.

    Returns:
        The exit code, and how many changes it made: before publishing, and in all.
    """
    told, tell = os.pipe()
    if child := os.fork():
        os.close(tell)
        with os.fdopen(told) as lines:
            counted = lines.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), json.loads(counted or "{}")
    changes = before = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if changes == die_at:
                os._exit(KILLED)
            changes += 1

    def noted(publish: Callable[..., None]) -> Callable[..., None]:
        def noting(*arguments: Any, **facts: Any) -> None:
            nonlocal before
            before = before or changes
            publish(*arguments, **facts)

        return noting

    stage.publish = noted(stage.publish)
    by_step.Watcher.publish = noted(by_step.Watcher.publish)  # type: ignore[method-assign]
    sys.addaudithook(watch)
    code = 1
    try:
        run(trainer, task, out)
        code = 0
    finally:
        os.write(tell, json.dumps({"before": before, "all": changes}).encode())
        os._exit(code)


def run(trainer: str, task: Path, out: Path) -> None:
    """Trains in this process."""
    sampled = trainer == "dpo"
    paths = {"work": out / "work" / trainer, "out": out / "model", "metrics": out / "metrics.jsonl"}
    paths |= {"samples": out / "samples.parquet", "sampled_prompts": task / "prompts.parquet"}
    nothing = {"reference_model": None, "evaluations": None, "true_reward_model": None}
    every_trainer.MODULES[trainer].run(  # type: ignore[attr-defined]
        argparse.Namespace(
            **{**every_trainer.inputs(trainer, task), **paths, **nothing, "run": "mine"},
            by_step=json.dumps({"points": 2, "sampling": SAMPLING}) if sampled else None,
            recipe=json.dumps({**every_trainer.VALUES[trainer], **VALUES[trainer]}),
        )
    )


def made(out: Path) -> dict[str, Any]:
    """What a run has left: hashes of weights, metrics and samples, and every name."""
    weights, metrics = (
        hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in (out / "model" / "model.safetensors", out / "metrics.jsonl")
    )
    samples = out / "samples.parquet"
    rows = hashlib.sha256(pd.read_parquet(samples).to_json().encode()).hexdigest() if samples.is_file() else None
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return {"weights": weights, "metrics": metrics, "samples": rows, "names": names}


def main() -> None:
    """An undisturbed run, then two runs for each point: one that is killed there, and the next one."""
    trainer, task, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    every, of_publishing = map(int, sys.argv[4:])
    torch.set_num_threads(1)
    run(trainer, task, out)
    shutil.rmtree(out)
    code, changes = train(trainer, task, out)
    print(json.dumps({"point": None, "code": code, **changes, **made(out)}), flush=True)
    for point in [*range(0, changes["before"], every), *range(changes["before"], changes["all"], of_publishing)]:
        shutil.rmtree(out)
        killed, _ = train(trainer, task, out, die_at=point)
        left = made(out)["names"]
        code, _ = train(trainer, task, out)
        print(json.dumps({"point": point, "killed": killed, "left": left, "code": code, **made(out)}), flush=True)


if __name__ == "__main__":
    main()
