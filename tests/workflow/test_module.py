"""The workflow as a module of another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import REPOSITORY, planned, snakemake

OUTER = """
import json

configfile: "config.yaml"

before = json.dumps(config)
module prefopt:
    snakefile: "REPOSITORY/workflow/Snakefile"
    config: config["study"]
use rule * from prefopt as dpo_*

rule own:
    output: "own.txt"
    params: same=json.dumps(config) == before
    shell: "echo {params.same} ${{PYTHONPATH:-none}} $(trap -p TERM) > {output}"
""".replace("REPOSITORY", str(REPOSITORY))


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a workflow of its own."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "Snakefile").write_text(OUTER)
    study = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"study": study}))
    return tmp_path


def test_it_finds_its_own_files(outer: Path) -> None:
    jobs = planned("results/tldr_winrates.csv", folder=outer)
    # The shipped base is found beside this workflow, so that none is trained.
    assert jobs["dpo_win_rates"] == 1 and "dpo_pretrain" not in jobs


def test_it_changes_nothing_of_the_other_workflow(outer: Path) -> None:
    result = snakemake("--cores", "1", "own.txt", folder=outer)
    assert result.returncode == 0, result.stderr
    assert (outer / "own.txt").read_text() == "True none\n"


def test_a_catalogue_finds_the_workflow_and_draws_its_rules() -> None:
    """The Snakemake workflow catalogue looks for these files, and draws the graph by this command."""
    about = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert {"mandatory-flags", "software-stack-deployment", "report"} <= about.keys()
    command = ["-m", "snakemake", "-s", "workflow/Snakefile", "-c", "1", "-d", ".test", "--forceall", "--rulegraph"]
    drawn = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    assert 'label = "win_rates"' in drawn.stdout and "frontier_run" not in drawn.stdout, (
        "its own config leaves out imdb"
    )
