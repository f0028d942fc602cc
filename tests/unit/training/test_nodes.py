"""A training over two nodes, for which a program stands in that starts each task as Slurm's `srun` would.

tests/slurm has Slurm itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import prefopt
from prefopt import cli
from tiny_task import Task, recipe

SRUN = """\
#!{python}
import json, os, pathlib, signal, subprocess, sys, time
split = sys.argv.index({python!r})
pathlib.Path({folder!r}, "asked").write_text(json.dumps(sys.argv[1:split]))
tasks = [
    subprocess.Popen(sys.argv[split:], env={{**os.environ, "SLURM_PROCID": str(i), "SLURMD_NODENAME": f"node{{i}}"}})
    for i in range(2)
]
signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
while None in (codes := [task.poll() for task in tasks]) and not any(codes):
    time.sleep(0.1)
for task in tasks if any(codes) else []:
    task.kill()
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes."""
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text(SRUN.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    shared = {"PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "GLOO_SOCKET_IFNAME": "lo"}
    # The node's own name need not be known to this machine's resolver.
    return {**os.environ, **shared, "PYTHONPATH": str(Path(prefopt.__file__).parents[1])}


def words(task: Task, folder: Path, nodes: int, processes: int, **values: object) -> list[str]:
    given = {"model": task.model, "data": task.demonstrations, "out": folder / "model", "work": folder / "work"}
    paths = [
        word
        for name, path in {**given, "metrics": folder / "metrics.jsonl"}.items()
        for word in (f"--{name}", str(path))
    ]
    own = ["--threads", "2", "--gpus", "0", "--nodes", str(nodes), "--processes", str(processes), "sft"]
    return [*own, *paths, "--recipe", recipe(completion="response", **values)]


def begun(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prefopt", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_nodes_of_two_processes_train_as_one_process_does(
    task: Task, tmp_path: Path, allocation: dict[str, str]
) -> None:
    assert cli.main(words(task, tmp_path / "one", 1, 1)) == 0
    with begun(words(task, tmp_path / "four", 2, 2), allocation) as job:
        said = job.communicate(timeout=300)[1]
    assert job.returncode == 0, said
    one, four = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "four"))
    for key, weights in one.items():
        torch.testing.assert_close(four[key], weights, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "four/model/manifest.json").read_text())["used"]["world_size"] == 4
    asked = json.loads((tmp_path / "asked").read_text())
    assert {"--overlap", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} < set(asked)


def test_nodes_that_are_told_to_stop_save_and_another_number_goes_on(
    task: Task, tmp_path: Path, allocation: dict[str, str]
) -> None:
    long = {"epochs": 4000, "checkpoint_every": 5}
    with begun(words(task, tmp_path, 2, 1, **long), allocation) as job:
        until = time.monotonic() + 200
        while not list((tmp_path / "work").glob("*/checkpoint_*/facts.json")):
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=100)[1]
    assert (job.returncode, said.count("saved after step")) == (75, 1), said
    saved = re.search(r"saved after step (\d+)", said)
    with begun(words(task, tmp_path, 1, 1, **long), allocation) as job:
        assert job.stderr is not None and saved is not None
        # Whatever it says first, it has begun; then it is told to stop.
        line = next(line for line in job.stderr if "resumed after" in line or "step 0" in line)
        assert f"resumed after step {saved[1]}" in line
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=100)
    assert job.returncode == 75


def test_what_fails_on_one_node_ends_all(task: Task, tmp_path: Path, allocation: dict[str, str]) -> None:
    with begun(words(task, tmp_path, 2, 1, batch_size=0), allocation) as job:
        job.communicate(timeout=200)
    assert job.returncode not in (0, 75) and not (tmp_path / "model").exists()


def test_several_nodes_are_slurms_alone(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cli.main(words(task, tmp_path, 2, 1)) == 2
    assert "compute.nodes is 2, but this is no job of Slurm's" in capsys.readouterr().err
