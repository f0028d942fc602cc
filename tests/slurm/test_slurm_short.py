"""The part of the Slurm tests that `.ci/run` runs: devices of one's own, and a training longer than its time limit."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
from cluster import Cluster
from submitting import (
    DPO,
    ENDLESS,
    log_of_dpo,
    running,
    saved_step,
    slow_dpo,
    slow_to_save,
    wait_for_checkpoint,
    wait_for_resumption,
)

pytestmark = pytest.mark.slurm


def test_jobs_side_by_side_get_what_they_ask_for_and_devices_of_their_own(cluster: Cluster, before_dpo: Path) -> None:
    jobs = {job["Rule"]: job for job in cluster.jobs()}
    sft, preferred_ft = (jobs[name] for name in ("sft", "preferred_ft"))
    assert sft["StartTime"] < preferred_ft["EndTime"] and preferred_ft["StartTime"] < sft["EndTime"]
    given = {}
    for name, job in (("sft", sft), ("preferred_ft", preferred_ft)):
        assert job["JobState"] == "COMPLETED" and job["Partition"] == "main" and job["TimeLimit"] == "00:30:00"
        assert job["TresPerJob"] == "gres:gpu:1" and "mem=3751M" in job["TRES"]
        log = (before_dpo / f"logs/tldr/{name}.log").read_text(encoding="utf-8")
        (given[name],) = re.findall(r"devices of Slurm: (\d+)$", log, re.MULTILINE)
    assert given["sft"] != given["preferred_ft"]


def test_a_trainer_that_meets_its_time_limit_goes_on_in_the_next_job(
    cluster: Cluster, before_dpo: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(before_dpo, tmp_path / "copy", symlinks=True)
    slow_to_save(folder, seconds=8)
    last = cluster.last_number()
    with running(cluster, folder, DPO, values=slow_dpo(ENDLESS)) as run:
        wait_for_checkpoint(folder)
        (first,) = cluster.of_rule("dpo", after=last)
        # Now less than the two minutes of the profile's `--signal` are left; Slurm looks twice a minute.
        cluster.call("scontrol", "update", f"JobId={first['JobId']}", "TimeLimit=2")
        run.wait_for_line("Trying to restart job")
        resumed = wait_for_resumption(folder)
        # The failed attempt's log was shown, and says where the next one goes on.
        assert resumed == saved_step(run.output()) > 0
        first, second = cluster.of_rule("dpo", after=last)
        assert first["JobState"] == "FAILED" and second["JobState"] == "RUNNING" and second["TimeLimit"] == "01:00:00"
        wait_for_checkpoint(folder, after=time.time())
        assert "devices of Slurm: " in log_of_dpo(folder)
