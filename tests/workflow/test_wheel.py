"""An installed wheel, with no checkout on the path of imports."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import IGNORED, REPOSITORY, TINY, planned, snakemake

from prefopt.store.tables import read_manifest

OUTER = """
from prefopt.resources import SNAKEFILE

configfile: "config.yaml"

module prefopt:
    snakefile: {snakefile}
    config: config["study"]
use rule * from prefopt as dpo_*
"""


def python(*arguments: str, folder: Path) -> str:
    """What a command prints."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel that was built of a copy of the checkout, without what it depends on."""
    source, made, site = (tmp_path_factory.mktemp(name) for name in ("source", "made", "site"))
    for name in ("workflow", "config", "envs"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), ".", folder=source)
    (wheel,) = map(str, made.glob("prefopt-*.whl"))
    python(*pip, "install", "--no-deps", "--no-compile", "--target", str(site), wheel, folder=source)
    shutil.rmtree(source)
    return site


@pytest.fixture
def elsewhere(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose commands find the installed wheel alone."""
    monkeypatch.setenv("PYTHONPATH", str(installed))
    return tmp_path


def test_it_holds_every_file_of_the_package(installed: Path) -> None:
    package = REPOSITORY / "workflow" / "prefopt"
    files = [Path(folder) / name for folder, _, names in os.walk(package, followlinks=True) for name in names]
    expected = {
        str(path.relative_to(package))
        for path in files
        if "__pycache__" not in path.parts and path != package / "resources" / "config" / "README.md"
    }
    found = {str(path.relative_to(installed / "prefopt")) for path in (installed / "prefopt").rglob("*")}
    assert expected <= found
    assert not any(path.is_symlink() for path in installed.rglob("*"))


def test_its_commands_read_its_own_files(installed: Path, elsewhere: Path) -> None:
    read = "from prefopt.resources import *; print(DEFAULTS, SCHEMA, PROMPTS, SHIPPED_BASE, SNAKEFILE)"
    found = [Path(path) for path in python("-c", read, folder=elsewhere).split()]
    assert all(path.is_relative_to(installed) and path.exists() for path in found) and len(found) == 5
    assert "tasks.tldr.dpo.beta: 0.25" in python("-m", "prefopt", "config", "tasks.tldr.dpo.beta", folder=elsewhere)
    assert "shipped base" in python("-m", "prefopt", "plan", folder=elsewhere)


@pytest.mark.parametrize("source", ["wheel", "git"])
def test_it_is_a_module_of_another_workflow(elsewhere: Path, source: str) -> None:
    """By the Snakefile of the wheel, or by that of a repository, whose files Snakemake fetches one by one."""
    snakefile = "SNAKEFILE"
    if source == "git":
        for name in ("workflow/rules", "workflow/report", "envs"):
            shutil.copytree(REPOSITORY / name, elsewhere / "repository" / name)
        shutil.copy(REPOSITORY / "workflow" / "Snakefile", elsewhere / "repository" / "workflow")
        for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "A release"]):
            by = ("-c", "user.name=a", "-c", "user.email=a@b")
            subprocess.run(["git", *by, *words], cwd=elsewhere / "repository", check=True)
        snakefile = f'"git+file://{elsewhere}/repository/workflow/Snakefile@HEAD"'
    (elsewhere / "Snakefile").write_text(OUTER.format(snakefile=snakefile))
    study = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())
    (elsewhere / "config.yaml").write_text(yaml.safe_dump({"study": study}))
    jobs = planned("results/tldr_winrates.csv", folder=elsewhere)
    assert jobs["dpo_win_rates"] == 1 and "dpo_pretrain" not in jobs, "the shipped base is in the wheel"


def test_it_runs_its_stages(installed: Path, elsewhere: Path) -> None:
    """A table, by the Snakefile of the wheel, whose jobs run the wheel's code."""
    table = "results/data/tldr/raw/gold_preferences.parquet"
    snakefile = installed / "prefopt" / "resources" / "workflow" / "Snakefile"
    arguments = ["--snakefile", snakefile, "--cores", "1", "--configfile", TINY, "--", table]
    result = snakemake(*arguments, folder=elsewhere)
    assert result.returncode == 0, result.stderr
    assert read_manifest(elsewhere / table)["rows"] == 48
    said = python("-m", "prefopt", "verify", table, "--configfile", str(TINY), folder=elsewhere)
    assert said.startswith("1 as asked for, 0 not made yet")
