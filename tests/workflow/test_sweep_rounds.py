"""Runs in rounds on a frontier, of a sweep and of another task: what evaluates them, and what a further round makes."""

from __future__ import annotations

import copy
from pathlib import Path

from compared import loaded
from running import TINY, overlay
from snakemake.utils import update_config
from test_rounds import MINE, OWN, STAGES, VALUES, of_round, tldr

from prefopt.experiment.config import resolve


def test_a_run_of_a_sweep_is_evaluated_at_the_end_of_each_round(tmp_path: Path) -> None:
    sweep = {
        "iterative_dpo": {**VALUES, "labels": "true_reward"},
        "runs": {
            **dict.fromkeys(("ppo_gt_6", "ppo_gt_trl_6", "unlikelihood_1", "preferred_ft_0")),
            "mine": {"method": "iterative_dpo", "beta": 0.1},
            "own": {"method": "iterative_dpo", "beta": 0.2, "labels": "implicit", "start": "dpo_0.1"},
        },
    }
    config = {"tasks": {**dict.fromkeys(("tldr", "hh", "cnndm")), "imdb": sweep}}
    with loaded(tmp_path, TINY, overlay(tmp_path, config)) as rules:
        jobs = rules.jobs()
        assert "results/models/imdb/dpo_0.1" in of_round(jobs, "own", 1)["round_samples"].inputs
        evaluated = {dict(cards)["run"]: job for (rule, cards), job in jobs.items() if rule == "round_evaluations"}
        assert sorted(evaluated) == ["mine", "own"]
        policies = [f"results/rounds/imdb/mine/{number}/model" for number in (1, 2)]
        assert {*policies, "results/models/imdb/sft"} <= set(evaluated["mine"].inputs)
        tables = [f"results/frontier/imdb/{run}.parquet" for run in ("mine", "own", "dpo_0.1", "ppo_6")]
        for rule in ("frontier", "dominance", "diagnosis", "overoptimization"):
            (job,) = [job for (name, _), job in jobs.items() if name == rule]
            assert set(tables) <= set(job.inputs)
        (diagnosis,) = [job for (name, _), job in jobs.items() if name == "diagnosis"]
        logs = sorted(path for path in diagnosis.inputs if path.endswith(".jsonl"))
        assert logs == [f"results/training/imdb/{run}.jsonl" for run in ("dpo_0.1", "ppo_6")]
        # A further round makes itself, and what all rounds are read by.
        config = copy.deepcopy(rules.config)
        update_config(config, {"tasks": {"imdb": {"runs": {"mine": {"rounds": 3}}}}})
        with rules.with_config(resolve(config)):
            again, _ = rules.rerun(jobs, rules.jobs())
        made = {(rule, dict(cards).get("run"), dict(cards).get("round")) for rule, cards in again}
        assert {(rule, run, number) for rule, run, number in made if number} == {
            (stage.replace("scores", "true_rewards"), "mine", "3") for stage in STAGES
        }
        assert ("round_evaluations", "mine", None) in made and ("round_evaluations", "own", None) not in made


def test_the_policy_after_each_round_is_sampled_for_the_frontier(tmp_path: Path) -> None:
    """Also where the first round does not start from the reference policy; no win rate is told of rounds."""
    overlaid = tldr(mine=MINE, own=OWN)
    del overlaid["tasks"]["tldr"]["by_step"]
    with loaded(tmp_path, TINY, overlay(tmp_path, overlaid)) as rules:
        jobs = rules.jobs()
    sampled = {dict(cards)["run"]: job for (rule, cards), job in jobs.items() if rule == "sampled_rounds"}
    assert sorted(sampled) == ["mine", "own"]
    policies = {f"results/rounds/tldr/mine/{number}/model" for number in (1, 2)}
    assert {*policies, "results/models/tldr/sft"} <= set(sampled["mine"].inputs)
    for rule in ("frontier", "overoptimization", "diagnosis"):
        (job,) = [job for (name, _), job in jobs.items() if name == rule]
        assert {f"results/frontier/tldr/{run}.parquet" for run in ("dpo", "mine", "own")} <= set(job.inputs)
    (figure,) = [job for (name, _), job in jobs.items() if name == "win_rate_by_step"]
    assert not [path for path in figure.inputs if "mine" in path]
