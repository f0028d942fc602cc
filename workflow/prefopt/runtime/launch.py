"""One command in several processes that train one model together, on one machine.

What torchrun does for one node, but with signals passed on and waited for however long saving takes, and an exit code
that says whether to run again. Over several nodes torchrun starts the same command.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from prefopt.runtime.interruption import RUN_AGAIN

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two looks at the processes


def launch(arguments: Sequence[str], count: int, inherited: Sequence[int] = ()) -> int:
    """Runs `python -P -m prefopt` with these arguments in `count` processes.

    SIGTERM and SIGUSR1 go on to all of them. When one fails the others are ended, since they would wait for it.

    Args:
        arguments: of each process.
        count: how many; each finds its number in RANK and LOCAL_RANK, as under torchrun.
        inherited: file descriptors that they shall hold too, so that a lease ends with the last of them.

    Returns:
        0, or the exit code of the first that failed.
    """
    with tempfile.TemporaryDirectory(prefix="prefopt-") as folder:
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PREFOPT_STORE": f"{folder}/store"}
        command = [sys.executable, "-P", "-m", "prefopt", *arguments]
        processes: list[subprocess.Popen[bytes]] = []

        def pass_on(number: int, _: FrameType | None) -> None:
            for process in processes:
                process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            for rank in range(count):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, pass_fds=inherited))
            return _first_failure(processes)
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
