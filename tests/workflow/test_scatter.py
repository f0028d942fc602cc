"""`--set-scatter`: the same tables, made by more jobs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from running import TINY, overlay, planned, snakemake

from prefopt.store.tables import read_manifest

WIN_RATES = "results/tldr_winrates.csv"
SCATTER = ("--set-scatter", "sampling=3", "scoring=2", "judging=2")


def test_every_table_that_is_made_in_shards_is_gathered(tmp_path: Path) -> None:
    whole, cut = (planned("all", *more, folder=tmp_path) for more in ((), SCATTER))
    times = {"sample": 3, "candidates": 3, "pair_samples": 3, "ceiling_samples": 3, "score": 2, "true_rewards": 2}
    times |= {"judge": 2, "judge_candidates": 2, "other_judge": 2, "run_rewards": 2}
    scattered = {rule: count for rule, count in whole.items() if rule in times}
    assert scattered.keys() == times.keys()
    expected = {rule: count * times.get(rule, 1) for rule, count in whole.items()}
    assert cut == {**expected, "gather": sum(scattered.values())} and "gather" not in whole


def test_one_process_can_be_cut_alone(tmp_path: Path) -> None:
    whole, cut = (planned(WIN_RATES, *more, folder=tmp_path) for more in ((), ("--set-scatter", "scoring=4")))
    assert cut == {**whole, "score": 4, "gather": 1}


@pytest.mark.workflow
def test_the_win_rates_do_not_depend_on_the_number_of_shards(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    samples = folder / "results/samples/tldr/dpo.parquet"
    table, manifest = (folder / WIN_RATES).read_bytes(), read_manifest(samples)
    config = ["--configfile", TINY]
    made = planned(WIN_RATES, *config, *SCATTER, folder=folder)
    assert made["gather"] == 13 and not made.keys() & {"sft", "dpo", "ppo", "reward_model", "reference"}
    result = snakemake("--cores", "2", WIN_RATES, *config, *SCATTER, folder=folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert (folder / WIN_RATES).read_bytes() == table
    gathered = read_manifest(samples)
    counts = ("examples", "tokens", "generated_tokens", "flops")
    assert [gathered["used"][key] for key in counts] == [manifest["used"][key] for key in counts]
    assert {**gathered, "used": None} == {**manifest, "used": None}
    # Shards are gone, yet nothing is to be done, and a change is seen.
    assert not list((folder / "results").glob("shards/**/*.parquet"))
    assert planned(WIN_RATES, *config, *SCATTER, folder=folder) == {}
    hotter = overlay(tmp_path, {"tasks": {"tldr": {"sampling": {"temperatures": [0.0, 0.5]}}}})
    assert planned(WIN_RATES, *config, hotter, *SCATTER, folder=folder) == made
