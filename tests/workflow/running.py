"""Runs of real Snakemake on a copy of the workflow, so that the checkout's own results are never touched."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny.yaml"
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")
PARTS = ("Snakefile", "workflow", "config", "profiles", "envs")


def command(folder: Path, *arguments: str | Path) -> list[str]:
    """Snakemake's command line for a folder, with the Snakefile there or else the checkout's."""
    snakefile = folder / "Snakefile"
    return [
        *(sys.executable, "-m", "snakemake"),
        *("--snakefile", str(snakefile if snakefile.exists() else REPOSITORY / "Snakefile")),
        *map(str, arguments),
    ]


def snakemake(*arguments: str | Path, folder: Path, timeout: int = 1500) -> subprocess.CompletedProcess[str]:
    """Runs Snakemake in a folder (see `command`); its jobs end with it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE")}
    words = command(folder, *arguments)
    with subprocess.Popen(
        words,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def only(task: str, *runs: str) -> dict[str, None]:
    """An overlay of a task's runs that leaves these alone in."""
    config = yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text(encoding="utf-8"))
    return dict.fromkeys(run for run in config["tasks"][task]["runs"] if run not in runs)


def planned(*arguments: str | Path, folder: Path) -> dict[str, int]:
    """Jobs that Snakemake would run, by rule, from a dry run; empty where nothing is to be done."""
    result = snakemake("--dry-run", *arguments, folder=folder)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return counted(output)


def counted(output: str) -> dict[str, int]:
    """Jobs by rule, of what Snakemake wrote."""
    table = output.partition("Job stats:")[2].partition("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}


def overlay(folder: Path, values: dict[str, Any], name: str = "overlay.yaml") -> Path:
    """Writes an overlay for `--configfile`."""
    path = folder / name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def copy_workflow(folder: Path) -> Path:
    """A copy of what Snakemake reads; the folder is where it then runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=IGNORED)
        else:
            shutil.copy2(source, folder / name)
    return folder
