"""Pages of a study through real Snakemake, which deletes a job's outputs before it runs the job again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from running import overlay, snakemake

from prefopt.store.tables import read_table, write_table
from test_human import export, world

pytestmark = pytest.mark.workflow

STUDY = "results/human/tldr"


def make_inputs(folder: Path) -> Path:
    """Samples and prompts of a made-up run; returns a config whose study compares them by people."""
    samples, prompts = world()
    made = write_table(folder / "results/data/tldr/prompts.parquet", "prompts", prompts)
    for method, rows in samples.groupby("run"):
        write_table(folder / f"results/samples/tldr/{method}.parquet", "samples", rows, prompts=made["content_hash"])
    matchup = {"first": {"run": "dpo", "temperature": 0.25}, "second": {"run": "ppo", "temperature": 0.0}}
    study = {"matchups": [{**matchup, "items": 10}], "judgments_per_rater": 5, "simulated_raters": None}
    return overlay(folder, {"tasks": {"tldr": {"human": study}}})


def run(folder: Path, config: Path, rule: str, target: str, *arguments: str) -> Any:
    only = ["--allowed-rules", rule, "--rerun-triggers", "mtime", "--cores", "1"]
    return snakemake(target, *only, *arguments, "--configfile", config, folder=folder, timeout=200)


def pages(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / STUDY / "pages").glob("*.html")}


def test_votes_outlive_pages_that_are_made_again(tmp_path: Path) -> None:
    config = make_inputs(tmp_path)
    result = run(tmp_path, config, "human_study", f"{STUDY}/pages")
    assert result.returncode == 0, result.stderr[-3000:]
    secret = tmp_path / "human/secrets/tldr"
    assert (secret.stat().st_mode & 0o777, (tmp_path / STUDY / "key.json").stat().st_mode & 0o777) == (0o600, 0o600)
    before, key = pages(tmp_path), json.loads((tmp_path / STUDY / "key.json").read_text())
    assert sorted(before) == ["r01.html", "r02.html"]
    # Once by force, once because somebody deleted the results.
    for arguments in (["--force"], []):
        if not arguments:
            shutil.rmtree(tmp_path / STUDY)
        result = run(tmp_path, config, "human_study", f"{STUDY}/pages", *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "human_study" in result.stderr
        assert pages(tmp_path) == before
    votes = tmp_path / "human/votes/tldr"
    votes.mkdir(parents=True)
    (votes / "tldr-r01.json").write_text(json.dumps(export(key)))
    result = run(tmp_path, config, "human_votes", f"{STUDY}/votes.parquet")
    assert result.returncode == 0, result.stderr[-3000:]
    table = read_table(tmp_path / STUDY / "votes.parquet", "votes", study=key["study"])
    assert len(table) == 5 and pd.read_csv(tmp_path / STUDY / "raters.csv")["counted"].tolist() == [5]
