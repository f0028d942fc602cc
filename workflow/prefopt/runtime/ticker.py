"""A line a minute on the terminal for each stage that is running, from the logs, while Snakemake waits for its jobs.

It only reads. Whatever goes wrong in it ends it with a sentence, and the run goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from prefopt.runtime.stage_log import read_logs
from prefopt.runtime.status import progress_line

_EVERY = 60.0  # seconds
_MOST = 8  # lines at once

_stops: list[Callable[[], None]] = []


def start(say: Callable[[str], None], folder: Path = Path(), every: float = _EVERY) -> None:
    """Begins to tell, in a thread that keeps no process alive, until `stop`.

    Args:
        say: is given each line.
        folder: in which Snakemake runs.
        every: seconds between two times.
    """
    stop()
    ended, began = threading.Event(), time.time()

    def tell() -> None:
        try:
            while not ended.wait(every):
                for line in lines(folder, began, every):
                    say(line)
        except Exception as error:
            say(f"No progress is shown any more ({error}); the run goes on.")

    thread = threading.Thread(target=tell, name="ticker", daemon=True)
    thread.start()
    # A thread that writes while the interpreter shuts down would abort it.
    _stops[:] = [ended.set, lambda: thread.join(timeout=10)]


def stop() -> None:
    """Ends it, if it was started."""
    for step in _stops:
        step()
    _stops.clear()


def lines(folder: Path, began: float, every: float) -> list[str]:
    """How far each running stage of a folder is.

    Args:
        folder: in which Snakemake runs.
        began: seconds since the epoch; what was written before is of an earlier run.
        every: seconds. A job on another machine, whose process is not seen here, counts as running while its log is not
            older than twice as long.
    """
    now = time.time()
    logs = [
        (log, log.progress)
        for log in read_logs(folder, began)
        if log.progress and (log.state == "running" or (log.state == "silent" and now - log.written < 2 * every))
    ]
    told = [progress_line(log, progress, now) for log, progress in logs[-_MOST:]]
    return told + ([f"and {len(logs) - _MOST} more: python -m prefopt status"] if len(logs) > _MOST else [])
