"""What a stage's log says of it: how far it is, what it used, how it ended.

A log ends with the word that the stage is done, with an error, or with neither: then the stage is at work or was killed. Lines
alone cannot tell these apart, since a slow stage may be silent for long. On Linux a process that has the log open can: it is
the stage. Elsewhere, and for jobs on other machines, what remains is how long ago the log was written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path

_TAIL = 64 * 1024  # bytes of a log's end that are read
_RECENT = 300.0  # seconds of silence for which a stage is taken to be at work where processes cannot be seen
_PROCESSES = Path("/proc")

_TIME = r"\d\d:\d\d:\d\d "
_PROGRESS = re.compile(
    rf"{_TIME}(?P<name>.+): (?P<done>\d+) of (?P<total>\d+) (?P<unit>\S+), (?P<rate>\S+) per second, (?P<left>\S+) s left"
    r"(?:, (?P<figures>.*))?"
)
_USED = re.compile(rf"{_TIME}used: .*, seconds (\S+), .*, tokens_per_second (\S+), peak_memory_mib (\d+)")
_DONE = re.compile(rf"{_TIME}\w+: done")
_SAVED = re.compile(rf"{_TIME}(.*: saved after step .*)")
_FAILED_PROCESS = re.compile(rf"{_TIME}(process \d+ of \d+ ended with exit code .*)")

File = tuple[int, int]  # device and inode


@dataclasses.dataclass(frozen=True)
class Progress:
    """A stage's last line of progress."""

    name: str
    done: int
    total: int
    unit: str
    rate: float  # units a second since the stage was started
    left: float  # seconds, when the line was written
    figures: str  # what stands beside the count, "loss 3.594" say


@dataclasses.dataclass(frozen=True)
class StageLog:
    """What one log says."""

    name: str  # its path below `logs/`, without its ending
    state: str  # "done", "running", "failed", "stopped" or "silent"
    written: float  # when, in seconds since the epoch
    said: str  # the last words of a stage that failed or was stopped
    progress: Progress | None
    seconds: float | None  # that it took
    tokens_per_second: float | None
    peak_memory_mib: float | None


def read_logs(folder: Path, since: float = 0.0) -> list[StageLog]:
    """Every stage's log of a folder in which Snakemake ran, the one that was written last at the end.

    Args:
        folder: that holds `logs/`. Nothing is written there and no lock is touched.
        since: seconds since the epoch; logs that were last written before are left out.
    """
    logs = folder / "logs"
    now, held = time.time(), _open_files()
    found = []
    for path in logs.rglob("*.log"):
        try:
            if path.stat().st_mtime >= since:
                found.append(_read(path, logs, now, held))
        except FileNotFoundError:
            continue  # Snakemake removes a log when it starts its stage again
    return sorted(found, key=lambda log: (log.written, log.name))


def _read(path: Path, logs: Path, now: float, held: set[File] | None) -> StageLog:
    below = path.relative_to(logs).with_suffix("")
    about = path.stat()
    lines = _last_lines(path)
    progress = _last_progress(lines)
    # A stage that samples while it trains reports both; the longer of them is the whole.
    used = [tuple(map(float, match.groups())) for line in lines if (match := _USED.fullmatch(line))]
    seconds, tokens_per_second, _ = max(used, default=(None, None, None))
    memory = max((one[2] for one in used), default=None)
    benchmark = _benchmark(logs / "benchmarks" / f"{below}.jsonl", about.st_mtime)
    state, said = _state(lines, benchmark is not None)
    if state == "silent":
        of_stage = about.st_mtime > now - _RECENT if held is None else (about.st_dev, about.st_ino) in held
        state = "running" if of_stage else "silent"
    if benchmark is not None:
        seconds, memory = benchmark[0], memory or benchmark[1]
    return StageLog(str(below), state, about.st_mtime, said, progress, seconds, tokens_per_second, memory)


def _state(lines: list[str], measured: bool) -> tuple[str, str]:
    """How a stage ended, and its last words; "silent" where its log has no end.

    Args:
        lines: the log's end.
        measured: whether Snakemake has measured the job of this log, which it does after a success.
    """
    last = lines[-1] if lines else ""
    if measured or _DONE.fullmatch(last):
        return "done", ""
    if match := _SAVED.fullmatch(last):
        return "stopped", match[1]
    if match := _FAILED_PROCESS.fullmatch(last):
        # Of several processes; the one that failed has said why, unless it was killed.
        state, said = _state(lines[:-1], False)
        return ("failed", said) if state == "failed" else ("failed", match[1])
    plain = len(lines) - next((i for i, line in enumerate(reversed(lines)) if re.match(_TIME, line)), len(lines))
    after = lines[plain:]
    if any(line.startswith(("Traceback (most recent", "prefopt ", "usage: prefopt")) for line in after):
        return "failed", last
    return "silent", ""


def _last_progress(lines: list[str]) -> Progress | None:
    match = next((match for line in reversed(lines) if (match := _PROGRESS.fullmatch(line))), None)
    if match is None:
        return None
    done, total, left = int(match["done"]), int(match["total"]), float(match["left"])
    # A log gives a rate with one digit after the point, which is nothing of a slow one; the time left was made from it.
    rate = (total - done) / left if 0 < left < float("inf") else float(match["rate"])
    return Progress(match["name"], done, total, match["unit"], rate, left, match["figures"] or "")


def _benchmark(path: Path, log_written: float) -> tuple[float, float | None] | None:
    """Seconds and MiB that Snakemake measured of a job; None where it has not, or has of an earlier one alone."""
    try:
        if path.stat().st_mtime < log_written:
            return None
        measured = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        # A job that ends at once is not measured: Snakemake writes "NA".
        memory = measured.get("max_rss")
        return float(measured["s"]), memory if isinstance(memory, int | float) else None
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _open_files() -> set[File] | None:
    """The files to which processes of this machine write; None where the system does not show them (it is no Linux)."""
    if not (_PROCESSES / "self" / "fd").exists():
        return None
    found = set()
    for process in _PROCESSES.glob("[0-9]*"):
        for number in ("1", "2"):
            try:
                about = (process / "fd" / number).stat()
            except OSError:
                continue  # it has ended, or belongs to another user
            found.add((about.st_dev, about.st_ino))
    return found
