"""What a stage's log says of it, and what `status` says of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt import cli
from prefopt.runtime import stage_log
from prefopt.runtime.stage_log import Progress, StageLog, read_logs
from prefopt.runtime.status import progress_line, status

STEPS = "06:10:33 sft: 223 of 235 steps, 0.0 per second, 600 s left, loss 3.665\n"
USED = (
    "06:13:48 used: stage sft, device cpu, dtype float32, threads 1, world_size 1, examples 7494, tokens 359296, "
    "generated_tokens 0, flops 285, models 1, seconds {seconds}, device_seconds 2.5, tokens_per_second {rate}, "
    "peak_memory_mib {mib}\n"
)


def write(folder: Path, name: str, text: str, ago: float = 0, measured: float | None = None) -> Path:
    """A log that was written so many seconds ago, and what Snakemake measured of its job, so many seconds ago."""
    path = folder / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - ago,) * 2)
    if measured is not None:
        benchmark = folder / "logs" / "benchmarks" / f"{name}.jsonl"
        benchmark.parent.mkdir(parents=True, exist_ok=True)
        benchmark.write_text(json.dumps({"s": 90.5, "max_rss": 300.25, "cpu_time": 3.0}) + "\n")
        os.utime(benchmark, (time.time() - measured,) * 2)
    return path


def read(folder: Path) -> StageLog:
    (log,) = read_logs(folder)
    return log


@pytest.mark.parametrize(
    ("text", "state", "said"),
    [
        (STEPS + "06:14:00 sft: done\n", "done", ""),
        (STEPS + "prefopt sft: pairs.parquet has no rows.\n", "failed", "prefopt sft: pairs.parquet has no rows."),
        (STEPS + "Traceback (most recent call last):\n  File x\nValueError: no\n", "failed", "ValueError: no"),
        (
            STEPS + "06:10:34 process 1 of 2 ended with exit code 137\n",
            "failed",
            "process 1 of 2 ended with exit code 137",
        ),
        (
            STEPS + "prefopt sft: pairs.parquet has no rows.\n06:10:34 process 0 of 2 ended with exit code 2\n",
            "failed",
            "prefopt sft: pairs.parquet has no rows.",
        ),
        (
            "06:10:33 dpo: saved after step 3 of 9; run it again to go on.\n",
            "stopped",
            "dpo: saved after step 3 of 9; run it again to go on.",
        ),
        (STEPS, "silent", ""),
        ("", "silent", ""),
        # An error that a stage has overcome stands before its last line.
        ("prefopt sft: a sentence.\n" + STEPS, "silent", ""),
    ],
)
def test_the_end_of_a_log_says_how_its_stage_ended(tmp_path: Path, text: str, state: str, said: str) -> None:
    write(tmp_path, "imdb/sft", text, ago=1000)
    log = read(tmp_path)
    assert (log.name, log.state, log.said) == ("imdb/sft", state, said)


def test_a_job_that_snakemake_measured_after_its_log_is_done(tmp_path: Path) -> None:
    write(tmp_path, "compute", "", ago=100, measured=99)
    assert (read(tmp_path).state, read(tmp_path).seconds, read(tmp_path).peak_memory_mib) == ("done", 90.5, 300.25)
    write(tmp_path, "compute", STEPS, ago=98)  # begun anew since
    assert (read(tmp_path).state, read(tmp_path).seconds) == ("silent", None)


def test_progress_has_the_rate_that_the_time_left_was_made_from(tmp_path: Path) -> None:
    write(tmp_path, "seed_1/imdb/sft", "06:10:21 sft: 222 of 235 steps, 0.0 per second, 650 s left\n" + STEPS)
    assert read(tmp_path).progress == Progress("sft", 223, 235, "steps", 0.02, 600.0, "loss 3.665")
    write(tmp_path, "seed_1/imdb/sft", "06:10:21 sample ppo: 9 of 9 samples, 4.5 per second, 0 s left\n")
    assert read(tmp_path).progress == Progress("sample ppo", 9, 9, "samples", 4.5, 0.0, "")


def test_what_was_used_is_that_of_the_longest_part(tmp_path: Path) -> None:
    parts = ((4.1, 1594.5, 635), (4.6, 1369.7, 620))
    write(tmp_path, "tldr/dpo", "".join(USED.format(seconds=s, rate=rate, mib=mib) for s, rate, mib in parts))
    log = read(tmp_path)
    assert (log.seconds, log.tokens_per_second, log.peak_memory_mib) == (4.6, 1369.7, 635)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a log open, as the shell opens it for a stage."""
    path = write(tmp_path, "imdb/sft", STEPS)
    with path.open("ab") as file, subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, stdout=file) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="processes are not seen here")
def test_a_stage_whose_log_is_open_is_running_however_long_it_is_silent(
    tmp_path: Path, writer: subprocess.Popen[bytes]
) -> None:
    path = tmp_path / "logs" / "imdb" / "sft.log"
    os.utime(path, (0, 0))
    assert read(tmp_path).state == "running"
    writer.kill()
    writer.wait()
    os.utime(path)
    assert read(tmp_path).state == "silent"


def test_where_processes_are_not_seen_a_log_that_grows_is_of_a_running_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_log, "_PROCESSES", tmp_path / "none")
    write(tmp_path, "imdb/sft", STEPS, ago=100)
    assert read(tmp_path).state == "running"
    write(tmp_path, "imdb/sft", STEPS, ago=400)
    assert read(tmp_path).state == "silent"


def test_the_status_of_a_folder(tmp_path: Path) -> None:
    steps = Progress("sft", 223, 235, "steps", 0.02, 600.0, "loss 3.665")
    logs = [
        StageLog("imdb/sft", "done", 900.0, "", Progress("sft", 235, 235, "steps", 0.1, 0.0, ""), 3979.1, 91.1, 6547.0),
        StageLog("compute", "done", 910.0, "", None, 4.0, 0.0, None),
        StageLog("imdb/dpo", "failed", 920.0, "prefopt dpo: no pairs.", None, None, None, None),
        StageLog("seed_1/imdb/sft", "silent", 940.0, "", steps, None, None, None),
        StageLog("tldr/sft", "running", 960.0, "", steps, None, None, None),
    ]
    assert status(logs, now=1000.0).splitlines() == [
        "stage            state            progress                                       left   took    tokens/s  peak MiB",
        "imdb/sft         done             235 of 235 steps                                      66 min  91        6547",
        "compute          done                                                                   4 s",
        "imdb/dpo         failed",
        "    prefopt dpo: no pairs.",
        "seed_1/imdb/sft  silent for 60 s  223 of 235 steps",
        "tldr/sft         running          223 of 235 steps, 0.02 per second, loss 3.665  9 min",
        "",
        "5 stages: 2 done, 1 running, 1 failed, 1 silent; 66 min of all those that ended, added up; at most 6547 MiB in one. "
        "A stage that has not begun has no log.",
        "Silent: its log has no end and no process that is seen here writes it; it was killed, or is at work elsewhere.",
    ]
    assert progress_line(logs[-1], steps, 1000.0) == (
        "tldr/sft: 223 of 235 steps, 0.02 per second, loss 3.665, 9 min left"
    )


def test_the_command_reads_a_folder_and_says_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "compute", "06:14:00 compute: done\n", ago=100)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["status", "--directory", str(tmp_path)]) == 0
    assert "compute  done" in capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before
    assert cli.main(["status", "--directory", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"prefopt status: {tmp_path}/none/logs holds no log: name the folder in which Snakemake ran by --directory.\n"
    )
