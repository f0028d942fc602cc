"""The command `plan` and the rules see one and the same config, and ask for what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from running import REPOSITORY, only, overlay, snakemake

from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged
from prefopt.experiment.like import DEFAULTS

PAPER = REPOSITORY / "config" / "paper.yaml"


def test_the_plans_config_is_the_one_that_snakemake_resolves(workflow_copy: Path) -> None:
    snakefile = workflow_copy / "Snakefile"
    snakefile.write_text(snakefile.read_text() + "\nPath('resolved.json').write_text(canonical_json(config))\n")
    # A section that is left out, a list that is replaced, a number that YAML reads as text, a judge that is removed.
    own = overlay(
        workflow_copy,
        {
            "seeds": [3],
            "compute": {"hardware": {"memory_gib": 40}},
            "tasks": {
                "tldr": {"human": None, "runs": only("tldr", "sft", "dpo"), "other_judges": {"simple": None}},
                "imdb": {
                    "runs": {"ppo_12": None, "dpo_2": {"method": "dpo", "beta": 2}},
                    "dpo": {"learning_rate": "5e-6"},
                },
            },
        },
    )
    result = snakemake("--dry-run", "--quiet", "--configfile", PAPER, own, folder=workflow_copy)
    assert result.returncode == 0, result.stderr
    snakemakes = json.loads((workflow_copy / "resolved.json").read_text())
    assert resolve(merged([DEFAULTS, PAPER, own])) == snakemakes
    assert snakemakes["seeds"] == [3] and snakemakes["compute"]["hardware"]["tflops"] == 989


def resources(folder: Path, *arguments: str | Path) -> dict[tuple[str, str], dict[str, int]]:
    """What each job of a dry run asks for, by rule and wildcards."""
    result = snakemake("--dry-run", *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    found = {}
    for job in re.split(r"\n(?=rule )", result.stdout + result.stderr)[1:]:
        rule = re.match(r"rule (\w+):", job)[1]  # type: ignore[index]
        wildcards = re.search(r"^    wildcards: (.*)$", job, re.MULTILINE)
        asked = re.search(r"^    resources: (.*)$", job, re.MULTILINE)[1]  # type: ignore[index]
        found[rule, wildcards[1] if wildcards else ""] = {
            key: int(value) for key, value in re.findall(r"\b(gpu|mem_mb|runtime)=(\d+)", asked)
        }
    return found


@pytest.fixture(scope="module")
def of_the_paper(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, int]]:
    return resources(tmp_path_factory.mktemp("paper"), "all", "--configfile", PAPER)


def test_jobs_of_the_paper_ask_for_what_their_models_need(
    of_the_paper: dict[tuple[str, str], dict[str, int]],
) -> None:
    large, small = of_the_paper["dpo", "seed=, task=tldr, run=dpo"], of_the_paper["sft", "seed=, task=imdb, run=sft"]
    assert large["gpu"] == small["gpu"] == 8
    # Eight processes, of which one loads six billion float32 weights, or GPT-2 large's eighth of them.
    assert 48_000 < large["mem_mb"] < 80_000 and large["mem_mb"] > 1.5 * small["mem_mb"]
    assert of_the_paper["ppo", "seed=, task=tldr, run=ppo"]["runtime"] > 20 * large["runtime"] > 20 * 30
    assert of_the_paper["dpo_with_samples", "seed=, task=hh, run=dpo"]["mem_mb"] < large["mem_mb"]


def test_jobs_that_do_not_train_take_one_gpu_at_most(of_the_paper: dict[tuple[str, str], dict[str, int]]) -> None:
    gpus = {rule: asked["gpu"] for (rule, _), asked in of_the_paper.items() if "gpu" in asked}
    trainers = {
        "sft",
        "preferred_ft",
        "dpo",
        "dpo_with_samples",
        "reward_model",
        "gold_reward_model",
        "ppo",
        "reference",
    }
    assert {rule for rule, count in gpus.items() if count == 8} == trainers
    assert {gpus[rule] for rule in ("sample", "candidates", "score", "best_of_n", "frontier_run", "true_rewards")} == {
        1
    }
    assert gpus["ceiling_samples"] == gpus["pair_samples"] == 1
    # A chat model is asked over the network; the gold model judges beside it.
    assert gpus["judge"] == gpus["judge_candidates"] == gpus["win_rates"] == gpus["prepare"] == 0
    judges = {wildcards: asked["gpu"] for (rule, wildcards), asked in of_the_paper.items() if rule == "other_judge"}
    assert (
        judges["seed=, task=tldr, judge=gold, run=dpo"] == 1 and judges["seed=, task=tldr, judge=simple, run=dpo"] == 0
    )


def test_a_laptops_jobs_fit_a_laptop(tmp_path: Path) -> None:
    asked = resources(tmp_path, "all")
    assert all(job["gpu"] == 0 for job in asked.values() if "gpu" in job)
    assert max(job["mem_mb"] for job in asked.values() if "mem_mb" in job) <= 3000
    overridden = resources(tmp_path, "all", "--configfile", overlay(tmp_path, {"compute": {"mem_mb": 7000}}))
    assert overridden["dpo_with_samples", "seed=, task=tldr, run=dpo"] == {
        **asked["dpo_with_samples", "seed=, task=tldr, run=dpo"],
        "mem_mb": 7000,
    }
    assert overridden["win_rates", "task=tldr"] == asked["win_rates", "task=tldr"]
