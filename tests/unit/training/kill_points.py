"""Kills a training at every change that it makes to the file system, and runs it again each time.

    python kill_points.py TASK OUT EVERY

A process that has imported all and trained nothing forks one child for each run, since importing takes longer than
training. Of the points before publishing each EVERY-th is tried, of those from there on all. Prints a JSON object a run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from prefopt.training import sft, stage
from tiny_task import recipe

# The first weights are the best on validation, so that the last ones would be told from them.
VALUES: dict[str, Any] = {
    **{"completion": "response", "keep": "best", "learning_rate": 0.3, "epochs": 1, "batch_size": 6},
    **{"evaluate_every": 1, "checkpoint_every": 1},
}
KILLED = 9


def train(task: Path, out: Path, die_at: int | None = None) -> tuple[int, dict[str, int]]:
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

    publish = stage.publish

    def noted(*arguments: Any, **facts: Any) -> None:
        nonlocal before
        before = changes
        publish(*arguments, **facts)

    stage.publish = noted
    sys.addaudithook(watch)
    code = 1
    try:
        torch.set_num_threads(1)
        paths = {"work": out / "work" / "sft", "out": out / "model", "metrics": out / "metrics.jsonl"}
        inputs = {"model": task / "base", "data": task / "demonstrations.parquet", "recipe": recipe(**VALUES)}
        sft.run(argparse.Namespace(**inputs, **paths, by_step=None))
        code = 0
    finally:
        os.write(tell, json.dumps({"before": before, "all": changes}).encode())
        os._exit(code)


def made(out: Path) -> dict[str, Any]:
    """What a run has left: hashes of weights and metrics, and every name."""
    weights, metrics = (
        hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in (out / "model" / "model.safetensors", out / "metrics.jsonl")
    )
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    return {"weights": weights, "metrics": metrics, "names": names}


def main() -> None:
    """An undisturbed run, then two runs for each point: one that is killed there, and the next one."""
    task, out, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    code, changes = train(task, out)
    print(json.dumps({"point": None, "code": code, **changes, **made(out)}), flush=True)
    for point in [*range(0, changes["before"], every), *range(changes["before"], changes["all"])]:
        shutil.rmtree(out)
        killed, _ = train(task, out, die_at=point)
        left = made(out)["names"]
        code, _ = train(task, out)
        print(json.dumps({"point": point, "killed": killed, "left": left, "code": code, **made(out)}), flush=True)


if __name__ == "__main__":
    main()
