"""One command in several processes that train one model together, on one node or on all nodes of a Slurm job.

What torchrun does, but with signals passed on and waited for however long saving takes, and an exit code that says whether
to run again. By hand torchrun starts the same command.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from prefopt.errors import UserError
from prefopt.runtime.interruption import RUN_AGAIN
from prefopt.runtime.server import free_port

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at the processes
_NODES = "PREFOPT_NODES"  # how many, in the environment of what runs on each of them


def over_nodes(arguments: Sequence[str], count: int) -> int:
    """Runs `python -P -m prefopt` with these arguments once on each node of this Slurm job, which then calls `launch`.

    Args:
        arguments: of each.
        count: how many nodes the job has.

    Returns:
        0, the exit code of srun, or `RUN_AGAIN` where the processes were asked to stop and have saved.

    Raises:
        UserError: this is no job of Slurm's.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            f"compute.nodes is {count}, but this is no job of Slurm's, which alone gives a job several nodes: run with "
            f"--workflow-profile profiles/slurm, or set compute.nodes to 1."
        )
    # The first process listens here: what a job starts by itself runs on the first of its nodes.
    shared = {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(free_port("")), _NODES: str(count)}
    step = [*("srun", "--overlap", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--cpu-bind=none")]
    # When one node fails the others are ended. What has saved ends with 0 there, and is no failure.
    command = [*step, "--kill-on-bad-exit=1", sys.executable, "-P", "-m", "prefopt", *arguments]
    processes: list[subprocess.Popen[bytes]] = []
    with _passing_signals_on(processes) as passed:
        processes.append(subprocess.Popen(command, env={**os.environ, **shared}))
        code = processes[0].wait()
    return RUN_AGAIN if code == 0 and passed else code


def nodes() -> int:
    """On how many nodes the same command runs beside this one; 1 where it runs alone."""
    return int(os.environ.get(_NODES, "1"))


def launch(arguments: Sequence[str], count: int, inherited: Sequence[int] = ()) -> int:
    """Runs `python -P -m prefopt` with these arguments in `count` processes, on each of `nodes` nodes.

    SIGTERM and SIGUSR1 go on to all of them. When one fails the others are ended, since they would wait for it.

    Args:
        arguments: of each process.
        count: how many here; each finds its number in RANK and LOCAL_RANK, as under torchrun.
        inherited: file descriptors that they shall hold too, so that a lease ends with the last of them.

    Returns:
        0, or the exit code of the first that failed; on one of several nodes 0 for `RUN_AGAIN` too, see `over_nodes`.
    """
    first = count * int(os.environ["SLURM_PROCID"]) if nodes() > 1 else 0
    with tempfile.TemporaryDirectory(prefix="prefopt-") as folder:
        shared = {"WORLD_SIZE": str(count * nodes()), "LOCAL_WORLD_SIZE": str(count)}
        if nodes() == 1:
            shared["PREFOPT_STORE"] = f"{folder}/store"
        command = [sys.executable, "-P", "-m", "prefopt", *arguments]
        processes: list[subprocess.Popen[bytes]] = []
        with _passing_signals_on(processes):
            for rank in range(count):
                environment = {**os.environ, **shared, "RANK": str(first + rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, pass_fds=inherited))
            code = _first_failure(processes)
            return 0 if code == RUN_AGAIN and nodes() > 1 else code


@contextlib.contextmanager
def _passing_signals_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGTERM and SIGUSR1 go on to all processes, which end with the block; gives the numbers of those that came."""
    passed: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield passed
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended or one has failed; 0 or that one's code. One that saved to stop is no failure."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0, RUN_AGAIN):
                # The shell's way to say that a signal ended a process.
                code = 128 - code if code < 0 else code
                logger.error("process %d of %d ended with exit code %d", rank, len(processes), code)
                return code
        if None not in codes:
            return RUN_AGAIN if RUN_AGAIN in codes else 0
        time.sleep(_POLL)
