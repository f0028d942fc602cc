"""The workflow through a real Slurm: the same table as without one, and what becomes of jobs that are interrupted."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from cluster import GPU_MODELS, Cluster, end_leftovers, processes_of
from running import TINY, copy_workflow, planned, snakemake
from submitting import (
    DPO,
    DPO_JOBS,
    ENDLESS,
    GPU_JOBS,
    SHORT,
    Run,
    assert_complete,
    log_of_dpo,
    running,
    slow_dpo,
    submitted,
    wait_for_checkpoint,
    wait_for_resumption,
)

pytestmark = pytest.mark.slurm

WIN_RATES = "results/tldr_winrates.csv"
IN_USE = "in use by another training process"


@pytest.fixture
def folder(before_dpo: Path, tmp_path: Path) -> Path:
    """A copy of the workflow in which DPO is the next job."""
    return shutil.copytree(before_dpo, tmp_path / "copy", symlinks=True)


def test_the_table_is_the_one_of_a_run_without_slurm(cluster: Cluster, tmp_path: Path) -> None:
    folder, here = (copy_workflow(tmp_path / name) for name in ("slurm", "here"))
    last = cluster.last_number()
    submitted(cluster, folder, WIN_RATES, values=GPU_JOBS)
    result = snakemake("--cores", "2", WIN_RATES, "--configfile", TINY, folder=here)
    assert result.returncode == 0, result.stderr[-4000:]
    pd.testing.assert_frame_equal(pd.read_csv(folder / WIN_RATES), pd.read_csv(here / WIN_RATES))
    # Every job went through Slurm, and those that run no model took no device.
    jobs = [job for job in cluster.jobs() if int(job["JobId"]) > int(last)]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    with_device = {job["Rule"] for job in jobs if job.get("TresPerJob") == "gres:gpu:1"}
    without = {job["Rule"] for job in jobs if "TresPerJob" not in job}
    assert without == {"records", "prepare", "prepare_preferences", "summary", "judge", "win_rates"}
    assert with_device | without == planned(WIN_RATES, "--forceall", "--configfile", TINY, folder=here).keys()
    logs = [path.read_text(encoding="utf-8") for path in sorted((folder / "logs/tldr").glob("sample_*.log"))]
    assert len(logs) == 5 and all(re.search(r"devices of Slurm: \d$", log, re.MULTILINE) for log in logs)


def test_a_model_of_gpu_and_a_partition_are_asked_for_by_rule(cluster: Cluster, folder: Path) -> None:
    last = cluster.last_number()
    asked = ["--set-resources", "dpo:gpu_model=h200", "dpo:slurm_partition=other"]
    submitted(cluster, folder, DPO, *asked, values=DPO_JOBS)
    (job,) = cluster.of_rule("dpo", after=last)
    assert job["Partition"] == "other" and job["TresPerJob"] == "gres:gpu:h200:1"
    (device,) = re.findall(r"devices of Slurm: (\d+)$", log_of_dpo(folder), re.MULTILINE)
    assert int(device) in range(GPU_MODELS["a100"], GPU_MODELS["a100"] + GPU_MODELS["h200"])


def test_a_failing_stage_is_tried_three_times_and_says_what_to_put_right(cluster: Cluster, folder: Path) -> None:
    table = folder / "results/logprobs/tldr/reference.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 2])
    last = cluster.last_number()
    with running(cluster, folder, DPO, values=DPO_JOBS) as run:
        assert run.wait() != 0
        output = run.output()
    assert [job["JobState"] for job in cluster.of_rule("dpo", after=last)] == ["FAILED"] * 3
    # Once for each attempt, and the same each time.
    (said,) = {line for line in output.splitlines() if line.startswith("prefopt preference: ")}
    assert "results/logprobs/tldr/reference.parquet" in said and "Traceback" not in log_of_dpo(folder)


@pytest.mark.parametrize("how", ["by hand", "by an urgent job"])
def test_a_requeued_trainer_goes_on_and_snakemake_notices_nothing(cluster: Cluster, folder: Path, how: str) -> None:
    last = cluster.last_number()
    with running(cluster, folder, DPO, values=slow_dpo(SHORT)) as run:
        wait_for_checkpoint(folder)
        (job,) = cluster.of_rule("dpo", after=last)
        if how == "by hand":
            cluster.call("scontrol", "requeue", job["JobId"])
        else:
            cluster.call("sbatch", "--partition", "urgent", "--exclusive", "--output", "/dev/null", "--wrap", "true")
        resumed = wait_for_resumption(folder)
        assert run.wait() == 0
        assert "Error in rule" not in run.output()
    (again,) = cluster.of_rule("dpo", after=last)
    assert (again["JobId"], again["Restarts"], again["JobState"]) == (job["JobId"], "1", "COMPLETED")
    assert resumed > 0
    assert_complete(folder, SHORT)


def test_an_interrupted_snakemake_cancels_its_jobs_which_save(cluster: Cluster, folder: Path) -> None:
    last = cluster.last_number()
    with running(cluster, folder, DPO, values=slow_dpo(SHORT)) as run:
        wait_for_checkpoint(folder)
        run.process.send_signal(signal.SIGINT)
        assert run.wait() != 0
    (job,) = cluster.of_rule("dpo", after=last)
    assert job["JobState"] == "CANCELLED"
    submitted(cluster, folder, DPO, values=slow_dpo(SHORT))
    assert wait_for_resumption(folder) > 0
    assert_complete(folder, SHORT)


def test_the_orphan_of_a_killed_snakemake_and_its_successor_share_no_checkpoint(cluster: Cluster, folder: Path) -> None:
    last = cluster.last_number()
    with running(cluster, folder, DPO, values=slow_dpo(ENDLESS)) as killed:
        wait_for_checkpoint(folder)
        killed.kill()
        (orphan,) = cluster.of_rule("dpo", after=last)
        assert orphan["JobState"] == "RUNNING"
        # Snakemake's own lock outlives it too.
        refused_at_once = Run(cluster, folder, DPO, values=slow_dpo(ENDLESS))
        assert refused_at_once.wait() != 0 and "--unlock" in refused_at_once.output()
        assert snakemake("--unlock", "--configfile", TINY, folder=folder).returncode == 0
        with running(cluster, folder, DPO, values=slow_dpo(ENDLESS)) as run:
            # The orphan has the checkpoints, and goes on with them.
            run.wait_for_line(f"prefopt preference: work/tldr/dpo/.* is {IN_USE}")
            wait_for_checkpoint(folder, after=time.time())
            # Cancelled it saves, and the successor's next attempt goes on from there.
            cluster.call("scancel", orphan["JobId"])
            assert wait_for_resumption(folder) > 0
            orphan, refused, successor = cluster.of_rule("dpo", after=last)[:3]
    states = [job["JobState"] for job in (orphan, refused, successor)]
    assert states == ["CANCELLED", "FAILED", "RUNNING"]
    assert len(list((folder / "work/tldr/dpo").glob("*.lock"))) == 1


def test_a_killed_test_session_leaves_nothing_to_the_next(cluster: Cluster) -> None:
    code = "import cluster, time\nwith cluster.running_cluster() as one: print(one.root, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        root = Path(session.stdout.readline().strip())
        session.kill()
    names = {process.name() for process in processes_of(root)}
    assert {"munged", "slurmctld", "slurmd"} <= names
    end_leftovers()
    assert not processes_of(root) and not root.exists()
    # That of a session that runs is left alone.
    assert "idle" in cluster.call("sinfo", "--noheader", "--format", "%T")
