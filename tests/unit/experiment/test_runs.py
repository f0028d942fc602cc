"""What a task's runs are made of."""

from __future__ import annotations

from typing import Any

import pytest
from test_config import read, with_value

from prefopt.errors import UserError
from prefopt.experiment import runs, stage_recipes, targets
from prefopt.experiment.config import resolve
from prefopt.experiment.methods import METHODS, of_group


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(read("config.yaml"))


def test_the_stages_of_every_run(config: dict[str, Any]) -> None:
    assert {run: runs.stages_of(config, "tldr", run) for run in runs.runs(config, "tldr")} == {
        **{"base": [], "sft": ["sft"], "preferred_ft": ["preferred_ft"]},
        **{"dpo": ["sft", "reference_logprobs", "dpo"], "ppo": ["sft", "reward_model", "ppo"]},
        **{"best_of_128": ["sft", "reward_model"]},
    }
    assert runs.stages_of(config, "hh", "dpo") == ["preferred_ft", "reference_logprobs", "dpo"]
    assert runs.stages_of(config, "cnndm", "dpo") == ["sft", "reference_logprobs", "dpo"]


def test_a_reference_policy_need_not_be_a_row() -> None:
    """It is trained with its section's values, and sampled for the greedy answers of the best of N."""
    config = resolve(with_value("tasks.tldr.runs", {"sft": None}))
    assert "sft" not in runs.runs(config, "tldr") and runs.known(config, "tldr")[0] == "sft"
    assert targets.trainers(config, "tldr")[0] == "sft"
    assert runs.values(config, "tldr", "sft") == config["tasks"]["tldr"]["sft"]
    assert "results/samples/tldr/sft.parquet" not in targets.result_files(config)


def test_a_reference_policy_may_be_a_run_of_the_users_own() -> None:
    tldr = {"runs": {"longer": {"method": "sft", "epochs": 9}, "sft": None}, "reference": "longer"}
    config = resolve(with_value("tasks.tldr", tldr))
    assert targets.model_folder(config, "tldr", "reference", "") == "results/models/tldr/longer"
    assert runs.stages_of(config, "tldr", "dpo") == ["longer", "reference_logprobs", "dpo"]
    assert targets.trainers(config, "tldr")[0] == "longer" and "sft" not in targets.trainers(config, "tldr")


def test_what_a_trainer_reads(config: dict[str, Any]) -> None:
    data = "results/data/tldr"
    assert {run: targets.training_files(config, "tldr", run, "") for run in targets.trained(config, "tldr")} == {
        "sft": {"data": f"{data}/training/demonstrations.parquet"},
        "preferred_ft": {"data": f"{data}/preferences.parquet"},
        "dpo": {"data": f"{data}/preferences.parquet", "reference": "results/logprobs/tldr/reference.parquet"},
        "ppo": {"prompts": f"{data}/training/prompts.parquet", "reward_model": "results/models/tldr/reward_model"},
    }


def test_what_kto_reads_and_is_made_of() -> None:
    config = resolve(with_value("tasks.tldr.runs", {"kto": {"method": "kto"}, "dpo": None}))
    assert targets.training_files(config, "tldr", "kto", "seed_1/") == {
        "data": "results/data/tldr/labels.parquet",
        "reference": "results/seed_1/logprobs/tldr/reference_labels.parquet",
    }
    assert runs.stages_of(config, "tldr", "kto") == ["sft", "reference_label_logprobs", "kto"]
    assert targets.reference_tables(config, "tldr") == ["reference_labels"] and targets.learns_labels(config, "tldr")
    assert targets.compute_files(config)["reference"] == [
        "results/logprobs/tldr/reference_labels.parquet",
        "results/logprobs/hh/reference.parquet",
    ]
    # A frontier is of all that starts from the reference policy.
    assert targets.measured(config, "tldr") == ["kto", "ppo"]
    assert not targets.learns_labels(config, "hh") and targets.reference_tables(config, "imdb") == ["reference"]
    swept = resolve(with_value("tasks.imdb.runs.kto", {"method": "kto", "beta": 0.1}))
    assert targets.reference_tables(swept, "imdb") == ["reference", "reference_labels"]
    with pytest.raises(
        UserError, match=r"tasks.imdb.runs.kto.beta is missing; a run of the method 'kto' is made by it"
    ):
        resolve(with_value("tasks.imdb.runs.kto", {"method": "kto"}))
    lacking = with_value("tasks.imdb", {"kto": None, "runs": {"kto": {"method": "kto", "beta": 0.1}}})
    with pytest.raises(UserError, match=r"tasks.imdb.kto is missing; the run 'kto' is of this method"):
        resolve(lacking)


def test_runs_that_differ_in_more_than_their_beta_have_frontiers_of_their_own() -> None:
    of_their_own = {
        "ipo_0.1": {"method": "dpo", "beta": 0.1, "loss": "ipo"},
        "ipo_1": {"method": "dpo", "beta": 1, "loss": "ipo"},
        "dpo_again": {"method": "dpo", "beta": 0.1, "loss": "sigmoid", "seed": 3},
        "kto_0.1": {"method": "kto", "beta": 0.1},
    }
    config = resolve(with_value("tasks.imdb.runs", of_their_own))
    assert {run: runs.group(config, "imdb", run) for run in of_their_own} == {
        **{"ipo_0.1": "dpo (loss ipo)", "ipo_1": "dpo (loss ipo)", "dpo_again": "dpo", "kto_0.1": "kto"},
    }
    papers = ["ppo_gt", "ppo_gt_trl", "ppo", "unlikelihood", "preferred_ft"]
    assert targets.frontiers(config, "imdb") == ["dpo", "dpo (loss ipo)", *papers, "kto"]
    assert of_group("dpo (loss ipo)") is METHODS["dpo"]
    assert stage_recipes.evaluated_recipe(config, "imdb", "ipo_1")["method"] == "dpo (loss ipo)"
    for stage in ("dominance", "frontier_figure"):
        assert stage_recipes.stage_recipe(config, "imdb", stage)["methods"][:2] == ["dpo", "dpo (loss ipo)"]
    values = stage_recipes.stage_recipe(config, "imdb", "diagnosis")["values"]
    assert "nll_weight" in values["dpo (loss ipo)"] and "kto" not in values


def test_runs_that_are_sampled_while_they_train(config: dict[str, Any]) -> None:
    assert targets.stepped(config, "hh") == ["dpo"] and targets.stepped(config, "tldr") == ["dpo", "ppo"]
    # Without a frontier, as in the paper's Fig. 3, DPO alone; a frontier is of what starts from the reference policy.
    assert targets.stepped(resolve(with_value("tasks.tldr.frontier", None)), "tldr") == ["dpo"]
    assert targets.stepped(resolve(with_value("tasks.tldr", {"frontier": None, "by_step": None})), "tldr") == []
    every = resolve(with_value("tasks.tldr.by_step.runs", ["sft", "dpo"]))
    assert targets.measured(every, "tldr") == ["dpo"] and targets.measured(config, "tldr") == ["dpo", "ppo"]
    assert targets.measured(config, "cnndm") == [] and len(targets.measured(config, "imdb")) == 22
    by_step = {"runs": ["ppo", "sft"], "points": 2, "temperatures": [1.0]}
    assert targets.stepped(resolve(with_value("tasks.tldr.by_step", by_step)), "tldr") == ["ppo", "sft"]


def test_every_seed_makes_its_own_models_and_what_is_shared_is_made_once() -> None:
    config = resolve(with_value("seeds", [4, 0]))
    assert runs.seeds(config) == {"": 4, "seed_0/": 0}
    assert runs.of_seed(config, "seed_0/")["seed"] == 0 and "seed" not in config
    files = targets.result_files(config)
    for name in ("models/tldr/dpo", "samples/tldr/dpo.parquet", "frontier/imdb/ppo_3.parquet", "models/imdb/sft"):
        assert f"results/{name}" in files and f"results/seed_0/{name}" in files
    for name in ("models/imdb/base", "models/tldr/gold_reward_model", "tldr_winrates.csv"):
        assert f"results/{name}" in files and f"results/seed_0/{name}" not in files
    assert targets.model_folder(config, "tldr", "reference", "", "seed_0/") == "results/seed_0/models/tldr/sft"
    assert targets.model_folder(config, "imdb", "base", "", "seed_0/") == "results/models/imdb/base"
    assert len(targets.verdict_tables(config)) == 2 * 2 * 6
