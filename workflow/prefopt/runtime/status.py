"""The command `status`: what every stage of a folder is doing or did, from the logs alone, while it runs or afterwards."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import UserError
from prefopt.runtime.stage_log import Progress, StageLog, read_logs

_HEAD = ("stage", "state", "progress", "left", "took", "tokens/s", "peak MiB")
_STATES = ("done", "running", "stopped", "failed", "silent")


def status(logs: Sequence[StageLog], now: float) -> str:
    """A table with a line for each stage, and the sum.

    Args:
        logs: in the order of the lines.
        now: seconds since the epoch.
    """
    rows = [_HEAD, *(_row(log, now) for log in logs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for i, log in reversed([*enumerate(logs, start=1)]):
        if log.said:
            lines.insert(i + 1, f"    {log.said}")
    return "\n".join([*lines, "", _sum(logs)])


def progress_line(log: StageLog, progress: Progress, now: float) -> str:
    """How far a running stage is, in one line."""
    left = _left(log, progress, now)
    return f"{log.name}: {_progress(progress)}" + (f", {left} left" if left else "")


def _row(log: StageLog, now: float) -> tuple[str, ...]:
    progress, running = log.progress, log.state == "running"
    return (
        log.name,
        f"silent for {_time(now - log.written)}" if log.state == "silent" else log.state,
        "" if progress is None else _progress(progress) if running else _count(progress),
        _left(log, progress, now) if progress and running else "",
        "" if log.seconds is None else _time(log.seconds),
        "" if not log.tokens_per_second else f"{log.tokens_per_second:.0f}",
        "" if log.peak_memory_mib is None else f"{log.peak_memory_mib:.0f}",
    )


def _count(progress: Progress) -> str:
    return f"{progress.done} of {progress.total} {progress.unit}"


def _progress(progress: Progress) -> str:
    figures = f", {progress.figures}" if progress.figures else ""
    return f"{_count(progress)}, {progress.rate:.3g} per second{figures}"


def _left(log: StageLog, progress: Progress, now: float) -> str:
    """Time left at this rate; "" of work that is done, after which a stage may have other work."""
    return "" if progress.done == progress.total else _time(max(0.0, progress.left - max(0.0, now - log.written)))


def _time(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits at least."""
    if seconds == float("inf"):
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _sum(logs: Sequence[StageLog]) -> str:
    count = Counter(log.state for log in logs)
    states = ", ".join(f"{count[state]} {state}" for state in _STATES if count[state])
    took = sum(log.seconds for log in logs if log.seconds is not None)
    memory = max((log.peak_memory_mib for log in logs if log.peak_memory_mib is not None), default=None)
    parts = [f"{len(logs)} stages: {states}", f"{_time(took)} of all those that ended, added up"]
    if memory is not None:
        parts.append(f"at most {memory:.0f} MiB in one")
    lines = ["; ".join(parts) + ". A stage that has not begun has no log."]
    if count["silent"]:
        lines.append(
            "Silent: its log has no end and no process that is seen here writes it; it was killed, or is at work elsewhere."
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `status`."""
    parser.add_argument("--directory", type=Path, default=Path(), help="the folder in which Snakemake runs or ran")


def run(args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        UserError: the folder has no logs.
    """
    logs = read_logs(args.directory)
    if not logs:
        raise UserError(
            f"{args.directory / 'logs'} holds no log: name the folder in which Snakemake ran by --directory."
        )
    print(status(logs, time.time()))
