"""What a run says on the terminal while its jobs are at work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import REPOSITORY

# Snakemake's command line, telling five times a second and not each minute.
DRIVER = """
import functools, sys
from prefopt.runtime import ticker
ticker.start = functools.partial(ticker.start, every=0.2)
from snakemake.cli import main
main(sys.argv[1:])
"""
LINE = "tldr/dpo: 3 of 9 steps, 0.01 per second, loss 0.5, 10 min left"


@pytest.mark.workflow
@pytest.mark.parametrize(("arguments", "told"), [((), True), (("--quiet", "progress"), False)])
def test_running_stages_are_told_unless_progress_is_not_wanted(
    tmp_path: Path, arguments: tuple[str, ...], told: bool
) -> None:
    log = tmp_path / "logs" / "tldr" / "dpo.log"
    log.parent.mkdir(parents=True)
    log.write_text("06:10:33 dpo: 3 of 9 steps, 0.0 per second, 600 s left, loss 0.5\n")
    # A job on another machine that goes on writing.
    os.utime(log, (time.time() + 3600,) * 2)
    target = "results/data/tldr/raw/demonstrations.parquet"
    words = ["-s", str(REPOSITORY / "Snakefile"), "--cores", "1", "--directory", str(tmp_path), target, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "workflow")}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / target).exists()
    assert (LINE in result.stderr.splitlines()) == told and LINE not in result.stdout
