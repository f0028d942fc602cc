"""The workflow as a module of another one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import REPOSITORY, TINY, planned, snakemake

from prefopt.experiment.explained import merged
from prefopt.resources import DEFAULTS

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


PREFIX = "studies/a b"
PREFIXED = f"""
configfile: "config.yaml"

module study:
    snakefile: "{REPOSITORY}/workflow/Snakefile"
    config: config
    prefix: "{PREFIX}"
use rule * from study as study_*
"""


@pytest.fixture
def prefixed(tmp_path: Path) -> Path:
    """A folder with a workflow that puts everything of the tiny one, with the shipped base, below a prefix."""
    (tmp_path / "Snakefile").write_text(PREFIXED)
    config = merged([DEFAULTS, TINY])
    tldr, defaults = config["tasks"]["tldr"], merged([DEFAULTS])["tasks"]["tldr"]
    tldr |= {"base": defaults["base"], "lengths": defaults["lengths"]}
    tldr["evaluation"]["against"] = {"run": "sft", "temperature": 0.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_every_command_follows_the_prefix_of_a_module(prefixed: Path) -> None:
    result = snakemake("--dry-run", "-p", "--set-scatter", "sampling=2", "--", "study_all", folder=prefixed)
    assert result.returncode == 0, result.stderr
    commands = re.findall(r"^ *Shell command: trap : TERM USR1;(.*)", result.stdout + result.stderr, re.MULTILINE)
    words = [word for command in commands for word in shlex.split(command)]
    assert len(commands) > 100
    assert [word for word in words if re.match(r"(\./)?(results|logs|work|human)/", word)] == []
    made = {word.removeprefix(f"{PREFIX}/").partition("/")[0] for word in words if word.startswith(f"{PREFIX}/")}
    assert made == {"results", "logs", "work", "human"}


def test_a_module_with_a_prefix_makes_tables_there(prefixed: Path) -> None:
    table = f"{PREFIX}/results/data/tldr/gold_preferences.parquet"
    result = snakemake("--cores", "1", "--", table, folder=prefixed)
    assert result.returncode == 0, result.stderr
    assert (prefixed / table).exists()
    assert {path.name for path in prefixed.iterdir()} == {"Snakefile", "config.yaml", "studies", ".snakemake"}


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
