"""Runs in rounds: what a round reads, what a further one makes, and a run that is killed in the middle of one."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from compared import Job, Name, Rules, loaded
from running import TINY, command, copy_workflow, overlay, snakemake
from snakemake.utils import update_config

from prefopt.experiment.config import resolve
from prefopt.lm.models import weights_hash
from prefopt.store.tables import read_manifest, read_table

VALUES = {
    **{"rounds": 2, "prompts": 12, "validation_prompts": 6, "n": 3, "max_new_tokens": 8, "batch_size": 8},
    # The toy policy seldom comes to an end.
    **{"warmup_steps": 1, "evaluate_every": 1, "missing_eos_reward": None},
}
MINE = {"method": "iterative_dpo"}
OWN = {**MINE, "labels": "implicit", "start": "dpo", "reference": "moving"}
STAGES = ["round_prompts", "round_samples", "round_scores", "round_pairs", "round_reference", "iterative_dpo"]


def tldr(**runs: dict[str, Any] | None) -> dict[str, Any]:
    """An overlay of these runs and their opponents alone."""
    left_out = dict.fromkeys(("base", "preferred_ft", "ppo", "best_of_4"))
    section = {"iterative_dpo": VALUES, "runs": {**left_out, **runs}, "human": None, "other_judges": {"gold": None}}
    return {"tasks": {**dict.fromkeys(("imdb", "hh", "cnndm")), "tldr": {**section, "by_step": {"runs": ["dpo"]}}}}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rules]:
    folder = tmp_path_factory.mktemp("rules")
    judged = {"method": "iterative_dpo", "labels": "judge"}
    with loaded(folder, TINY, overlay(folder, tldr(mine=MINE, own=OWN, judged=judged))) as rules:
        yield rules


@pytest.fixture(scope="module")
def jobs(rules: Rules) -> dict[Name, Job]:
    return rules.jobs()


def of_round(jobs: dict[Name, Job], run: str, number: int) -> dict[str, Job]:
    """A round's jobs by their rules."""
    wanted = {"run": run, "round": str(number)}
    return {rule: job for (rule, cards), job in jobs.items() if wanted.items() <= dict(cards).items()}


def changed(rules: Rules, jobs: dict[Name, Job], **values: Any) -> set[str]:
    """What jobs of their own a changed run makes, with their round."""
    config = copy.deepcopy(rules.config)
    update_config(config, {"tasks": {"tldr": {"runs": {"mine": values}}}})
    with rules.with_config(resolve(config)):
        own, _ = rules.rerun(jobs, rules.jobs())
    return {f"{rule} {dict(cards).get('round', '')}".rstrip() for rule, cards in own}


def test_a_round_samples_and_trains_the_policy_of_the_round_before(jobs: dict[Name, Job]) -> None:
    first, second = of_round(jobs, "mine", 1), of_round(jobs, "mine", 2)
    assert sorted(first) == sorted(second) == sorted(STAGES) and not of_round(jobs, "mine", 3)
    sft, before = "results/models/tldr/sft", "results/rounds/tldr/mine/1/model"
    for stage in ("round_samples", "round_reference", "iterative_dpo"):
        assert sft in first[stage].inputs and before not in first[stage].inputs
    assert before in second["round_samples"].inputs and before in second["iterative_dpo"].inputs
    # The reference policy stays.
    assert sft in second["round_reference"].inputs and sft in second["iterative_dpo"].inputs
    (sampled,) = [job for (rule, cards), job in jobs.items() if rule == "sample" and dict(cards)["run"] == "mine"]
    assert "results/rounds/tldr/mine/2/model" in sampled.inputs


def test_a_policy_that_labels_its_own_samples_starts_from_dpo(jobs: dict[Name, Job]) -> None:
    first, second = of_round(jobs, "own", 1), of_round(jobs, "own", 2)
    dpo, before = "results/models/tldr/dpo", "results/rounds/tldr/own/1/model"
    assert dpo in first["round_samples"].inputs and dpo in first["iterative_dpo"].inputs
    assert {"results/models/tldr/sft", dpo} <= set(first["round_implicit_rewards"].inputs)
    assert {"results/models/tldr/sft", before} <= set(second["round_implicit_rewards"].inputs)
    # The reference policy of the loss is what the round starts from.
    assert before in second["round_reference"].inputs
    assert "results/models/tldr/sft" not in second["iterative_dpo"].inputs


def test_a_judge_labels_what_each_round_samples(rules: Rules, jobs: dict[Name, Job]) -> None:
    for number in (1, 2):
        made = of_round(jobs, "judged", number)
        assert sorted(made) == sorted([*STAGES[:2], "round_judge_labels", *STAGES[3:]])
        folder = f"results/rounds/tldr/judged/{number}"
        labels = made["round_judge_labels"]
        assert set(labels.inputs) == {f"{folder}/samples.parquet", f"{folder}/prompts.parquet"}, (
            "the oracle reads no model"
        )
        assert f"{folder}/scores.parquet" in made["round_pairs"].inputs
    # Another seed of the judge's order makes these labels again, and nothing of the run that a reward model labels.
    config = copy.deepcopy(rules.config)
    update_config(config, {"tasks": {"tldr": {"judge": {"seed": 7}}}})
    with rules.with_config(resolve(config)):
        own, _ = rules.rerun(jobs, rules.jobs())
    assert {rule for rule, cards in own if "round" in dict(cards)} == {"round_judge_labels"}


def test_a_further_round_makes_itself_alone(rules: Rules, jobs: dict[Name, Job]) -> None:
    tables = {"sample", "training_figure", "compute", "all"}  # the run's model is the last round's
    assert changed(rules, jobs, rounds=3) == {*(f"{stage} 3" for stage in STAGES), *tables}


def test_each_value_reaches_its_stage_of_every_round(rules: Rules, jobs: dict[Name, Job]) -> None:
    def both(*stages: str) -> set[str]:
        return {f"{stage} {number}" for stage in stages for number in (1, 2)}

    assert changed(rules, jobs, prompts=11) == both("round_prompts", "round_samples")
    assert changed(rules, jobs, n=2) == changed(rules, jobs, temperature=0.7) == both("round_samples")
    assert changed(rules, jobs, pairs="all") == changed(rules, jobs, length_penalty=0.1) == both("round_pairs")
    assert changed(rules, jobs, missing_eos_reward=-1.0) == both("round_pairs")
    assert changed(rules, jobs, beta=0.1) == both("iterative_dpo")
    assert changed(rules, jobs, reference="moving") == {"round_reference 2", "iterative_dpo 2"}


TARGETS = ("results/rounds/tldr/mine/2/model", "results/samples/tldr/mine.parquet")


@pytest.mark.workflow
def test_a_run_that_is_killed_in_its_second_round_goes_on(tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "copy")
    words = (*TARGETS, "--configfile", TINY, overlay(tmp_path, tldr(mine={"method": "iterative_dpo"})))
    first = folder / "results/rounds/tldr/mine/1/model/manifest.json"
    killed = folder / "results/rounds/tldr/mine/2/samples.parquet"
    with (tmp_path / "output").open("wb") as out:
        process = subprocess.Popen(
            command(folder, "--cores", "2", *words), cwd=folder, stdout=out, stderr=out, start_new_session=True
        )
        try:
            end = time.monotonic() + 1500
            while not killed.exists():
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()[-4000:]
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert first.exists() and not (folder / TARGETS[0] / "manifest.json").exists()
    of_first = first.read_text()
    assert snakemake("--unlock", *words, folder=folder).returncode == 0
    done = snakemake("--cores", "2", *words, folder=folder)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    # The first round was there, and nothing of it was made again.
    assert not re.search(r"wildcards: .*run=mine, round=1", output) and first.read_text() == of_first
    made = {name: read_manifest(path)["content_hash"] for name, path in tables(folder).items()}
    assert len(made) == 2 * 5
    # Undisturbed rounds come to the same, from what they start with.
    weights = [weights_hash(folder / f"results/rounds/tldr/mine/{number}/model") for number in (1, 2)]
    shutil.rmtree(folder / "results/rounds")
    again = snakemake("--cores", "2", *words, folder=folder)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {name: read_manifest(path)["content_hash"] for name, path in tables(folder).items()} == made
    assert [weights_hash(folder / f"results/rounds/tldr/mine/{number}/model") for number in (1, 2)] == weights
    prompts = [
        read_table(tables(folder)[f"{number}/prompts"], "prompts").query("split == 'train'") for number in (1, 2)
    ]
    assert not set(prompts[0]["prompt_id"]) & set(prompts[1]["prompt_id"]) and len(prompts[1]) == 12
    # What each round took stands in the ledger.
    words = ("results/compute.csv", *words[len(TARGETS) :])
    ledger = snakemake("--cores", "2", *words, folder=folder)
    assert ledger.returncode == 0, ledger.stderr[-4000:]
    costs = pd.read_csv(folder / "results/compute.csv").query("run == 'mine'").set_index("stage")
    assert costs.index.tolist() == ["sft", "reward_model", "mine_round_1", "mine_round_2", "sampling", "total"]
    sampled = [
        sum(map(len, read_table(tables(folder)[f"{number}/samples"], "samples")["token_ids"])) for number in (1, 2)
    ]
    assert costs.loc[["mine_round_1", "mine_round_2"], "generated_tokens"].tolist() == sampled
    assert costs["reward"].notna().tolist() == [False] * 5 + [True]


def tables(folder: Path) -> dict[str, Path]:
    """The tables of all rounds, as ROUND/NAME."""
    found = sorted((folder / "results/rounds/tldr/mine").glob("*/*.parquet"))
    return {f"{path.parent.name}/{path.stem}": path for path in found}
