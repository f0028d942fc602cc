"""A trainer over two nodes, placed by Snakemake: two `slurmd` on this machine, with made-up GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster import Cluster, Unavailable, install, running_cluster, wait_for
from running import TINY, copy_workflow, snakemake
from submitting import (
    DPO,
    ENDLESS,
    log_of_dpo,
    running,
    saved_step,
    slow_dpo,
    wait_for_checkpoint,
    wait_for_resumption,
)

pytestmark = pytest.mark.slurm

INPUTS = ["results/data/tldr/preferences.parquet", "results/models/tldr/sft", "results/logprobs/tldr/reference.parquet"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            install()
            running_one = stack.enter_context(running_cluster(2))
        except Unavailable as error:
            pytest.skip(f"no Slurm: {error}")
        yield running_one


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the workflow with what DPO reads."""
    made = copy_workflow(tmp_path / "copy")
    result = snakemake("--cores", "2", *INPUTS, "--configfile", TINY, folder=made)
    assert result.returncode == 0, result.stderr[-4000:]
    return made


def test_a_trainer_on_two_nodes_saves_when_told_and_goes_on_with_one(two: Cluster, folder: Path) -> None:
    over_two = {**slow_dpo(ENDLESS), "compute": {"gpus": 1, "nodes": 2}}
    with running(two, folder, DPO, values=over_two) as run:
        wait_for_checkpoint(folder)
        (job,) = two.of_rule("dpo")
        assert (job["NumNodes"], job["TresPerJob"]) == ("2", "gres:gpu:2")
        log = log_of_dpo(folder)
        assert log.count("devices of Slurm: ") == 2, "each node leases for itself"
        two.call("scontrol", "update", f"JobId={job['JobId']}", "TimeLimit=2")
        run.wait_for_line("Trying to restart job")
        resumed = wait_for_resumption(folder)
        assert resumed == saved_step(run.output()) > 0
        wait_for_checkpoint(folder, after=time.time())
    assert snakemake("--unlock", "--cores", "1", "--configfile", TINY, folder=folder).returncode == 0
    last = two.last_number()
    with running(two, folder, DPO, values=slow_dpo(ENDLESS)):
        wait_for("a job on one node", lambda: [job["NumNodes"] for job in two.of_rule("dpo", after=last)] == ["1"])
        wait_for("its device", lambda: log_of_dpo(folder).count("devices of Slurm: ") == 1)
        assert wait_for_resumption(folder) > resumed
