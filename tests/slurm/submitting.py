"""Snakemake runs that submit to a cluster, in the background, so that a test can meddle with them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import Cluster, wait_for
from running import TINY, overlay

# So that jobs that run a model ask Slurm for a GPU each (and run on the CPU, since it is a made-up one).
GPU_JOBS: dict[str, Any] = {"compute": {"gpus": 1}}
DPO = "results/models/tldr/dpo"
# DPO by its plain rule, which samples nothing while it trains.
ALONE: dict[str, Any] = {"by_step": None, "frontier": None}
DPO_JOBS: dict[str, Any] = {**GPU_JOBS, "tasks": {"tldr": ALONE}}
# What is quick on one node of one's own, and would burden a cluster: the plugin looks at its jobs after 4 s, 14 s later, 24 s
# later ..., and again after 4 s once one has ended. There is no accounting, hence `squeue`.
FAST = [
    *("--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "4"),
    *("--seconds-between-status-checks", "2", "--latency-wait", "5"),
]


# More steps of DPO than any test waits for, and so few that a test can wait for the last.
ENDLESS, SHORT = 15000, 300


def slow_dpo(steps: int) -> dict[str, Any]:
    """An overlay for a DPO of so many steps, each some hundredths of a second, that something can happen to it."""
    dpo = {"epochs": steps // 3, "checkpoint_every": 5, "evaluate_every": steps, "keep": "last"}
    return {**GPU_JOBS, "tasks": {"tldr": {**ALONE, "dpo": dpo}}}


# Python imports a module of this name when it starts.
SLOW_TO_SAVE = """
import signal, time

plain = signal.signal


def slow(number, handler):
    if not callable(handler):
        return plain(number, handler)
    return plain(number, lambda *arguments: (time.sleep({seconds}), handler(*arguments)))


signal.signal = slow
"""


class Run:
    """A Snakemake that submits its jobs by the shipped profile.

    Args:
        cluster: where to.
        folder: a copy of the workflow.
        arguments: targets first, then options.
        values: an overlay of the tiny config.
    """

    def __init__(self, cluster: Cluster, folder: Path, *arguments: str, values: dict[str, Any]) -> None:
        self._output = folder.parent / f"snakemake_{len(list(folder.parent.glob('snakemake_*.txt')))}.txt"
        configs = [str(TINY), str(overlay(folder.parent, values))]
        command = [
            *(sys.executable, "-m", "snakemake", *arguments, *FAST),
            *("--workflow-profile", "profiles/slurm", "--configfile", *configs),
        ]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8")

    def wait(self, timeout: float = 1800.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def wait_for_line(self, pattern: str, timeout: float = 300.0) -> None:
        """Waits until it has printed something that fits the pattern."""

        def printed() -> bool:
            # Looked at first: what it prints last must count.
            ended = self.process.poll() is not None
            found = re.search(pattern, self.output()) is not None
            assert found or not ended, f"Snakemake ended without {pattern!r}"
            return found

        wait_for(f"{pattern!r} in Snakemake's output", printed, timeout)

    def kill(self) -> None:
        """Ends it and its children at once, but not its jobs, which are Slurm's."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running(cluster: Cluster, folder: Path, *arguments: str, values: dict[str, Any]) -> Iterator[Run]:
    """A run that is ended with its jobs, should it not end by itself; a failed test shows what it printed."""
    run = Run(cluster, folder, *arguments, values=values)
    try:
        yield run
    except BaseException:
        print(run.output()[-8000:])
        raise
    finally:
        if run.process.poll() is None:
            run.kill()
        cancel_all(cluster)


def submitted(cluster: Cluster, folder: Path, *arguments: str, values: dict[str, Any]) -> str:
    """What a run prints that succeeds."""
    with running(cluster, folder, *arguments, values=values) as run:
        assert run.wait() == 0, run.output()[-6000:]
        return run.output()


def cancel_all(cluster: Cluster) -> None:
    """Cancels all jobs of the cluster and waits until they have ended, saving what they save."""
    cluster.call("scancel", "--user", "root")
    wait_for("an empty queue", lambda: not cluster.call("squeue", "--noheader"))


def slow_to_save(folder: Path, seconds: int) -> None:
    """Makes this copy's trainers take their time when they are told to stop, as one of a large model would."""
    (folder / "workflow" / "sitecustomize.py").write_text(SLOW_TO_SAVE.format(seconds=seconds))


def wait_for_checkpoint(folder: Path, after: float = 0.0) -> None:
    """Waits until the running DPO has saved a checkpoint (after the time `after`)."""

    def saved() -> bool:
        return any(
            path.stat().st_mtime > after for path in (folder / "work/tldr/dpo").glob("*/checkpoint_*/facts.json")
        )

    wait_for("a checkpoint of DPO", saved)


def log_of_dpo(folder: Path) -> str:
    """The log of DPO's last attempt."""
    path = folder / "logs/tldr/dpo.log"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def saved_step(text: str) -> int:
    """The step after which a DPO that was told to stop has saved, as its log says."""
    (step,) = set(re.findall(r"dpo: saved after step (\d+) of \d+; run it again to go on", text))
    return int(step)


def wait_for_resumption(folder: Path) -> int:
    """The step after which DPO's running attempt has gone on."""
    pattern = r"dpo: resumed after step (\d+)"
    found = wait_for("a resumed DPO", lambda: re.findall(pattern, log_of_dpo(folder)))
    return int(found[0])


def assert_complete(folder: Path, steps: int) -> None:
    """DPO's metrics are those of one uninterrupted training: each step once, in order."""
    rows = (folder / "results/training/tldr/dpo.jsonl").read_text(encoding="utf-8")
    assert [int(step) for step in re.findall(r'"step": (\d+), "split": "train"', rows)] == list(range(1, steps + 1))
