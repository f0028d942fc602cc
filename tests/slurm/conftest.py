"""A Slurm for the session, and a folder in which all that DPO needs was made through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster import Cluster, Unavailable, install, running_cluster
from running import TINY, copy_workflow, snakemake
from submitting import GPU_JOBS, submitted

DATA = [f"results/data/tldr/{table}.parquet" for table in ("training/demonstrations", "preferences")]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running Slurm; tests that need one are skipped where there can be none."""
    with ExitStack() as stack:
        try:
            install()
            running = stack.enter_context(running_cluster())
        except Unavailable as error:
            pytest.skip(f"no Slurm: {error}")
        yield running


@pytest.fixture(scope="session")
def before_dpo(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow in which Slurm jobs have made SFT, Preferred-FT and the reference log-probabilities.

    What comes before is made without Slurm, which is quicker.
    """
    folder = copy_workflow(tmp_path_factory.mktemp("slurm") / "copy")
    result = snakemake("--cores", "2", *DATA, "--configfile", TINY, folder=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    targets = ["results/models/tldr/preferred_ft", "results/logprobs/tldr/reference.parquet"]
    output = submitted(cluster, folder, *targets, values=GPU_JOBS)
    assert "3 of 3 steps (100%) done" in output, output[-6000:]
    return folder
