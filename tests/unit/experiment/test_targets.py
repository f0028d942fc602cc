"""Which models and files a config asks for."""

from __future__ import annotations

from typing import Any

import pytest
from test_config import read, with_value

from prefopt.experiment import runs, targets
from prefopt.experiment.config import resolve


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(read("config.yaml"))


def test_the_reference_is_the_model_that_the_config_names(config: dict[str, Any]) -> None:
    assert targets.model_folder(config, "tldr", "reference", "shipped") == "results/models/tldr/sft"
    assert targets.model_folder(config, "tldr", "base", "shipped") == "shipped"
    assert targets.model_folder(config, "imdb", "base", "shipped") == "results/models/imdb/base"


def test_a_model_of_the_users_own_is_used_where_it_lies_and_not_trained(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = resolve(with_value("tasks.tldr.sft", {"source": "path", "path": str(tmp_path)}))
    assert targets.model_folder(config, "tldr", "reference", "shipped") == str(tmp_path)
    assert targets.trainers(config, "tldr") == ["preferred_ft", "dpo", "reward_model", "ppo", "gold_reward_model"]
    fetched = resolve(with_value("tasks.tldr.sft", {"source": "hub", "name": "someone/sft"}))
    assert targets.model_folder(fetched, "tldr", "sft", "shipped") == "results/models/tldr/fetched_sft"


def test_reward_models_of_the_users_own(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = resolve(with_value("tasks.tldr.reward_model", {"source": "path", "path": str(tmp_path)}))
    for seed in ("", "seed_1/"):
        assert targets.model_folder(config, "tldr", "reward_model", "shipped", seed) == str(tmp_path)
        assert targets.training_files(config, "tldr", "ppo", seed)["reward_model"] == str(tmp_path)
    assert targets.trainers(config, "tldr") == ["sft", "preferred_ft", "dpo", "ppo", "gold_reward_model"]
    config = resolve(with_value("tasks.tldr.gold_reward_model", {"source": "hub", "name": "someone/judge"}))
    assert (
        targets.model_folder(config, "cnndm", "gold_reward_model", "")
        == "results/models/tldr/fetched_gold_reward_model"
    )
    assert targets.trainers(config, "tldr") == ["sft", "preferred_ft", "dpo", "reward_model", "ppo"]
    assert targets.training_files(config, "tldr", "ppo", "seed_1/")["reward_model"] == (
        "results/seed_1/models/tldr/reward_model"
    )


def test_a_run_that_is_left_out_needs_no_model(config: dict[str, Any]) -> None:
    assert targets.trainers(config, "tldr") == [
        "sft",
        "preferred_ft",
        "dpo",
        "reward_model",
        "ppo",
        "gold_reward_model",
    ]
    without = dict.fromkeys(("base", "preferred_ft", "ppo", "best_of_128"))
    few = resolve(with_value("tasks.tldr.runs", without))
    assert targets.trainers(few, "tldr") == ["sft", "dpo", "gold_reward_model"]
    assert targets.matchups(few, "tldr") == [] and targets.studies(few) == []
    assert not targets.has_candidates(few, "tldr")


def test_metrics_stand_in_the_order_of_the_runs_that_are_evaluated_by_step() -> None:
    names = {"dpo_2": {"method": "dpo", "beta": 2}}
    config = resolve({**with_value("tasks.hh.runs", names), "seeds": [0, 1]})
    assert targets.measured(config, "hh") == ["dpo", "dpo_2"]
    assert targets.measured_metrics(config, "hh") == [
        *("results/training/hh/dpo.jsonl", "results/training/hh/dpo_2.jsonl"),
        *("results/seed_1/training/hh/dpo.jsonl", "results/seed_1/training/hh/dpo_2.jsonl"),
    ]
    assert targets.measured_metrics(config, "imdb")[0] == "results/training/imdb/dpo_0.05.jsonl"
    assert targets.measured_metrics(config, "cnndm") == []
    assert targets.rewarded_candidates(config) == [(task, seed) for task in ("tldr", "hh") for seed in ("", "seed_1/")]
    assert [one for one in targets.optimized(config) if one[0] == "hh"] == [
        *(("hh", "", "dpo"), ("hh", "", "dpo_2"), ("hh", "seed_1/", "dpo"), ("hh", "seed_1/", "dpo_2"))
    ]


def test_the_sweep_is_the_runs_that_are_not_null() -> None:
    config = resolve(with_value("tasks.imdb.runs", {"ppo_12": None, "dpo_2": {"method": "dpo", "beta": 2}}))
    names = runs.runs(config, "imdb")
    assert len(names) == 22 and "ppo_12" not in names and "dpo_2" in names
    files = targets.result_files(config)
    assert "results/frontier/imdb/dpo_2.parquet" in files and "results/imdb_dominance.csv" in files
    assert "results/frontier/imdb/ppo_12.parquet" not in files
    assert "results/imdb_diagnosis.csv" in files and "results/tldr_diagnosis.md" in files
    assert "results/cnndm_diagnosis.csv" not in files
    assert targets.trainers(config, "imdb") == ["base", "sft", "reward_model"]
    without = {f"ppo_{target}": None for target in (3, 6, 9, 12)}
    assert "reward_model" not in targets.trainers(resolve(with_value("tasks.imdb.runs", without)), "imdb")


def in_rounds(**values: Any) -> dict[str, Any]:
    return resolve(with_value("tasks.tldr.runs.mine", {"method": "iterative_dpo", **values}))


def test_the_model_of_a_run_in_rounds_is_its_last_rounds() -> None:
    config = in_rounds(rounds=2)
    folder = "results/seed_1/rounds/tldr/mine"
    assert targets.model_folder(config, "tldr", "mine", "", "seed_1/") == f"{folder}/2/model"
    assert targets.model_folder(config, "cnndm", "mine", "", "seed_1/") == f"{folder}/2/model"
    assert targets.model_folder(config, "tldr", "mine_round_1", "", "seed_1/") == f"{folder}/1/model"
    assert targets.model_folder(config, "tldr", "mine_round_0", "") == "results/models/tldr/sft"
    assert targets.model_folder(in_rounds(start="dpo"), "tldr", "mine_round_0", "") == "results/models/tldr/dpo"
    # It is no model that is trained at once, nor sampled while it trains.
    assert "mine" not in targets.trainers(config, "tldr") and "mine" not in targets.stepped(config, "tldr")
    assert targets.rounds(config, "tldr") == [("mine", 1), ("mine", 2)] and targets.rounds(config, "imdb") == []
    files = targets.result_files(config)
    assert {f"results/rounds/tldr/mine/{number}/model" for number in (1, 2)} <= set(files)
    assert "results/rounds/tldr/mine/2/preferences.parquet" in files and not any("mine/3" in path for path in files)
    assert targets.training_metrics(config, "tldr")[-2:] == [
        f"results/training/tldr/mine_round_{number}.jsonl" for number in (1, 2)
    ]


def test_what_a_run_in_rounds_is_made_of() -> None:
    rounds = ["mine_round_1", "mine_round_2"]
    assert runs.stages_of(in_rounds(rounds=2), "tldr", "mine") == ["sft", "reward_model", *rounds]
    own = in_rounds(rounds=2, labels="implicit", start="dpo")
    assert runs.stages_of(own, "tldr", "mine") == ["sft", "reference_logprobs", "dpo", *rounds]
    # Labels that are no reward model's need none.
    others = {"ppo": None, "best_of_128": None}
    for labels, learned in (("reward_model", True), ("true_reward", False)):
        config = resolve(
            with_value("tasks.tldr.runs", {**others, "mine": {"method": "iterative_dpo", "labels": labels}})
        )
        assert ("reward_model" in targets.trainers(config, "tldr")) == learned


def test_rewards_are_told_of_every_run_of_a_task_with_a_frontier(config: dict[str, Any]) -> None:
    assert targets.rewarded(config, "tldr") == runs.runs(config, "tldr")
    assert targets.rewarded(config, "cnndm") == targets.rewarded(config, "imdb") == []
    without = resolve(with_value("tasks.tldr.frontier", None))
    assert targets.rewarded(without, "tldr") == [] and "rewards" in targets.compute_files(without), "those of hh"
