"""What Snakemake makes of the rules and the configs, without running a stage."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import REPOSITORY, TINY, counted, only, overlay, planned, snakemake

METHODS = 6
TRAINED_ON_EMBEDDED = dict.fromkeys(
    ("sft", "preferred_ft", "reference", "dpo_with_samples", "reward_model", "ppo_with_samples"), 1
)


def test_the_embedded_default_starts_from_the_shipped_base(tmp_path: Path) -> None:
    jobs = planned("results/tldr_winrates.csv", folder=tmp_path)
    data = {"records": 4, "prepare": 2, "prepare_preferences": 2, "summary": 1}
    expected = {**data, **TRAINED_ON_EMBEDDED, "candidates": 1, "score": 1, "best_of_n": 1}
    assert jobs == {**expected, "sample": METHODS - 1, "judge": METHODS, "win_rates": 1}


def test_all_adds_figures_and_examples(tmp_path: Path) -> None:
    jobs = planned(folder=tmp_path)
    assert {"win_rate_figure", "training_figure", "examples", "best_of_n_figure", "all"} <= jobs.keys()


def test_another_directory_is_used_for_results_only(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    jobs = planned("--directory", elsewhere, "results/tldr_winrates.csv", folder=tmp_path)
    assert jobs["win_rates"] == 1 and "pretrain" not in jobs


def test_records_of_ones_own_train_a_base_and_a_judge(tmp_path: Path) -> None:
    here, data = tmp_path / "here", tmp_path / "shared" / "data"
    here.mkdir()
    data.mkdir(parents=True)
    for name in ("tldr_posts", "tldr_comparisons", "hh_helpful_base", "cnn_dailymail"):
        with gzip.open(data / f"{name}.jsonl.gz", "wt"):
            pass
    jobs = planned("--configfile", REPOSITORY / "config" / "files.yaml", folder=here)
    # The bases of tldr, hh and imdb; news is judged by tldr's judge.
    assert jobs["pretrain"] == 3 and jobs["gold_reward_model"] == 2


def test_files_and_a_learned_judge_are_all_that_a_task_of_ones_own_has_to_say(tmp_path: Path) -> None:
    """What the config's tldr has beside them for embedded records alone (raters, frontier, a second judge) falls away."""
    for name in ("posts.jsonl", "comparisons.jsonl"):
        (tmp_path / name).touch()
    data = {"source": "files", "posts": ["posts.jsonl"], "comparisons": ["comparisons.jsonl"], "gold_fraction": 0.3}
    tldr = {"data": data, "judge": {"kind": "reward_model"}}
    path = overlay(tmp_path, {"tasks": {"tldr": tldr, "hh": None, "cnndm": None, "imdb": None}})
    result = snakemake("--dry-run", "all", "--configfile", path, folder=tmp_path)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    assert re.findall(r"^tasks\.(.*?) falls away", output, re.MULTILINE) == [
        "tldr.frontier",
        "tldr.human.simulated_raters",
        "tldr.other_judges.gold",
    ]
    jobs = counted(output)
    assert {
        jobs[rule] for rule in ("pretrain", "gold_reward_model", "reward_model", "ppo", "human_study", "paper")
    } == {1}
    assert jobs["judge"] == METHODS + 1  # and the steps of DPO
    of_others = ("simulated_votes", "human_votes", "human_agreement", "judge_items", "judge_agreement", "other_judge")
    of_frontier = ("frontier_figure", "frontier", "evaluations", "dominance", "optimal_frontier", "ppo_with_samples")
    assert not jobs.keys() & {*of_others, *of_frontier}


@pytest.mark.parametrize(("name", "files"), [("imdb_files", 1), ("imdb_gpu", 3)])
def test_real_reviews_train_a_base_a_classifier_and_22_runs(tmp_path: Path, name: str, files: int) -> None:
    here, data = tmp_path / "here", tmp_path / "shared" / "data"
    here.mkdir()
    data.mkdir(parents=True)
    for part in ("train", "test", "unsup")[:files]:
        (data / f"imdb_{part}.parquet").touch()
    targets = ["results/imdb_frontier.svg", "results/imdb_dominance.csv"]
    jobs = planned(*targets, "--configfile", REPOSITORY / "config" / f"{name}.yaml", folder=here)
    assert jobs["pretrain"] == jobs["classifier"] == jobs["sft"] == jobs["reward_model"] == 1
    assert jobs["frontier_run"] == 22


def test_the_paper_config_fetches_its_models_and_expands_to_every_job(tmp_path: Path) -> None:
    jobs = planned("all", "--configfile", REPOSITORY / "config" / "paper.yaml", folder=tmp_path)
    # Four models (GPT-2 large, GPT-J and its SFT, Pythia) and the classifier of sentiment.
    assert jobs["fetch"] == 5 and "pretrain" not in jobs and "classifier" not in jobs
    assert jobs["sft"] == jobs["dpo"] == jobs["dpo_with_samples"] == jobs["ppo"] == 1
    assert jobs["gold_reward_model"] == 2 and jobs["frontier_run"] == 22
    assert jobs["judge"] == METHODS + 4 + 1 + 2  # tldr, hh and its steps, news


def test_objectives_after_the_paper_and_rounds_are_runs_of_one_task(tmp_path: Path) -> None:
    jobs = planned("all", "--configfile", REPOSITORY / "config" / "beyond.yaml", folder=tmp_path)
    assert jobs["dpo_with_samples"] == 8 and "dpo" not in jobs
    assert jobs["simpo_with_samples"] == jobs["kto_with_samples"] == jobs["orpo"] == 1
    # Four runs of three rounds and two of one: of the reward model seven rounds, of the judge three, of the policy itself four.
    rounds = ("round_prompts", "round_samples", "round_pairs", "round_reference", "iterative_dpo")
    assert {jobs[rule] for rule in rounds} == {14} and jobs["sampled_rounds"] == 6
    labels = ("round_scores", "round_judge_labels", "round_implicit_rewards")
    assert [jobs[rule] for rule in labels] == [7, 3, 4] and "round_true_rewards" not in jobs
    assert jobs["run_rewards"] == jobs["sample"] == 21 and "pretrain" not in jobs


def test_objectives_after_the_paper_are_runs_of_the_sweep_of_sentiment(tmp_path: Path) -> None:
    targets = ["results/imdb_frontier.svg", "results/imdb_dominance.csv", "results/imdb_diagnosis.csv"]
    jobs = planned(*targets, "--configfile", REPOSITORY / "config" / "beyond_imdb.yaml", folder=tmp_path)
    # Ten runs that train once; three of five rounds, labelled by the true reward, the reward model and the policy.
    assert jobs["frontier_run"] == 10 and jobs["round_evaluations"] == 3 and jobs["iterative_dpo"] == 15
    labels = ("round_true_rewards", "round_scores", "round_implicit_rewards")
    assert {jobs[rule] for rule in labels} == {5} and jobs["reward_model"] == jobs["reference_labels"] == 1


def test_a_local_model_can_be_the_base(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_text("{}")
    path = overlay(tmp_path, {"tasks": {"tldr": {"base": {"source": "path", "path": "model"}}}})
    assert "pretrain" not in planned("results/tldr_winrates.csv", "--configfile", path, folder=tmp_path)


def test_only_what_the_methods_need_is_trained(tmp_path: Path) -> None:
    path = overlay(tmp_path, {"tasks": {"tldr": {"runs": only("tldr", "sft", "dpo"), "other_judges": {"gold": None}}}})
    jobs = planned("results/tldr_winrates.svg", "results/tldr_training.svg", "--configfile", path, folder=tmp_path)
    assert not jobs.keys() & {"preferred_ft", "reward_model", "ppo", "candidates", "gold_reward_model"}


def test_kto_adds_a_table_of_labels_and_what_the_reference_policy_says_of_it(tmp_path: Path) -> None:
    path = overlay(tmp_path, {"tasks": {"tldr": {"runs": {"kto": {"method": "kto"}}}}})
    plain = planned("results/tldr_winrates.csv", folder=tmp_path)
    more = planned("results/tldr_winrates.csv", "--configfile", path, folder=tmp_path)
    added = {
        "records": 1,
        "prepare_preferences": 1,
        "reference_labels": 1,
        "kto_with_samples": 1,
        "sample": 1,
        "judge": 1,
    }
    assert more == plain | {rule: plain.get(rule, 0) + count for rule, count in added.items()}


def test_a_task_that_is_null_makes_nothing(tmp_path: Path) -> None:
    path = overlay(tmp_path, {"tasks": {"imdb": None, "hh": None, "cnndm": None}})
    jobs = planned("all", "--configfile", path, folder=tmp_path)
    assert (jobs["dpo_with_samples"], jobs["win_rates"], jobs["paper"], jobs["compute_figure"]) == (1, 1, 1, 1)
    assert (jobs["win_rate_by_step"], jobs["frontier_figure"]) == (1, 1)
    assert not jobs.keys() & {"reviews", "frontier_run", "dpo"}
    path = overlay(tmp_path, {"tasks": {"tldr": None, "hh": None, "cnndm": None}})
    jobs = planned("all", "--configfile", path, folder=tmp_path)
    assert jobs["frontier_run"] == 22 and jobs["compute"] == 1
    assert not jobs.keys() & {"records", "win_rates", "judge", "paper", "compute_figure"}


def test_a_chat_model_judges_by_config_alone(tmp_path: Path) -> None:
    targets = [f"results/{task}_winrates.csv" for task in ("tldr", "hh", "cnndm")]
    plain = planned(*targets, "results/best_of_n.csv", folder=tmp_path)
    overlay_of_chat = REPOSITORY / "config/chat_judge.yaml"
    chat = planned(*targets, "results/best_of_n.csv", "--configfile", overlay_of_chat, folder=tmp_path)
    # A paid judge sees the best of seeded subsets, and nothing that tldr's runs write while they train; nothing else differs.
    assert (plain.pop("dpo_with_samples"), plain.pop("ppo_with_samples")) == (2, 1)
    assert chat == {**plain, "subsets": 2, "dpo": 1, "dpo_with_samples": 1, "ppo": 1}


def test_a_study_needs_votes_before_it_has_results(tmp_path: Path) -> None:
    path = overlay(tmp_path, {"tasks": {"tldr": {"human": {"simulated_raters": None}}}})
    jobs = planned("all", "--configfile", path, folder=tmp_path)
    assert jobs["human_study"] == 1 and not jobs.keys() & {"human_votes", "human_agreement", "simulated_votes"}
    (tmp_path / "human/votes/tldr").mkdir(parents=True)
    (tmp_path / "human/votes/tldr/tldr-r01.json").write_text("{}")
    jobs = planned("all", "--configfile", path, folder=tmp_path)
    assert jobs["human_votes"] == jobs["human_agreement"] == 1 and "simulated_votes" not in jobs
    # People as the judge of a table: one method, one temperature, every test prompt.
    judged = {
        **{"judge": {"kind": "human"}, "runs": only("tldr", "sft"), "sampling": {"temperatures": [0.25]}},
        "human": {
            **{"simulated_raters": None},
            "matchups": [{"first": {"run": "sft", "temperature": 0.25}, "second": {"run": "reference"}, "items": 192}],
        },
    }
    path = overlay(tmp_path, {"tasks": {"tldr": judged, "cnndm": None}})
    jobs = planned("results/tldr_winrates.csv", "--configfile", path, folder=tmp_path)
    assert jobs["human_study"] == jobs["human_votes"] == jobs["judge"] == 1 and "ppo" not in jobs


def test_best_of_any_n_is_read_from_the_same_candidates(tmp_path: Path) -> None:
    runs = {"best_of_4": {"method": "best_of_n", "n": 4}, "mine": {"method": "best_of_n", "n": 16}, "all": None}
    path = overlay(tmp_path, {"tasks": {"tldr": {"runs": runs}}})
    targets = [f"results/samples/tldr/{run}.parquet" for run in ("best_of_4", "mine", "best_of_128")]
    jobs = planned(*targets, "--configfile", path, folder=tmp_path)
    assert jobs["candidates"] == 1 and jobs["best_of_n"] == 3


def test_the_shipped_base_is_made_by_the_rule_behind_scratch(tmp_path: Path) -> None:
    assert planned("shipped_base", folder=tmp_path) == {"records": 1, "pretrain": 1, "shipped_base": 1}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"tasks": {"tldr": {"dpo": {"beta": 0}}}},
            "config: tasks.tldr.dpo.beta is 0; allowed: a number above 0.",
        ),
        (
            {"tasks": {"tldr": {"judge": {"kind": "gpt-4"}}}},
            "config: tasks.tldr.judge.kind is 'gpt-4'; allowed: oracle, reward_model, chat, recorded or human.",
        ),
        (
            {"sead": 1},
            "config: sead (1) is not a key; did you mean 'seeds'? Allowed: compute, seeds, tasks.",
        ),
    ],
)
def test_a_bad_config_ends_at_once_with_one_sentence(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    result = snakemake("--dry-run", "--configfile", overlay(tmp_path, values), folder=tmp_path)
    assert result.returncode == 1
    lines = (result.stdout + result.stderr).splitlines()
    said = [line for line in lines if not line.startswith(("Config file", "Using workflow"))]
    assert said == [sentence]


def test_values_on_the_command_line_are_checked_too(tmp_path: Path) -> None:
    result = snakemake("--dry-run", "--config", "seeds=[-1]", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith(
        "config: seeds[0] is -1; allowed: a whole number at least 0 and at most 4294967295.\n"
    )


def test_lint_finds_nothing(workflow_copy: Path) -> None:
    result = snakemake("--lint", folder=workflow_copy)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_are_formatted() -> None:
    command = [
        sys.executable,
        "-m",
        "snakefmt",
        "--line-length",
        "120",
        "--check",
        "Snakefile",
        "workflow/Snakefile",
        "workflow/rules",
    ]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("profile", "gpus", "asked"),
    [
        ("default", 1, ["gpu=1"]),
        ("gpu", 1, ["gpu=1"]),
        # A limit cuts a larger request down.
        ("gpu", 16, ["gpu=8"]),
        ("slurm", 16, ["gpu=16", "slurm_partition=main", "slurm_extra=--signal=TERM@120"]),
    ],
)
def test_what_jobs_ask_for_with_each_profile(tmp_path: Path, profile: str, gpus: int, asked: list[str]) -> None:
    path = overlay(tmp_path, {"compute": {"gpus": gpus}})
    chosen = ["--workflow-profile", REPOSITORY / "profiles" / profile]
    result = snakemake("--dry-run", "results/models/tldr/dpo", *chosen, "--configfile", TINY, path, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    job = (result.stdout + result.stderr).partition("rule dpo_with_samples:")[2]
    (line,) = re.findall("resources: (.*)", job)
    assert set(asked) <= set(line.split(", ")) and "runtime=30" in line
