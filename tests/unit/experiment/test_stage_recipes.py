"""Each stage takes the recipe that is cut for it from the config, and no other stage's values."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import pytest
from test_config import merged, read, with_value

from prefopt.analysis.overoptimization import OveroptimizationRecipe
from prefopt.experiment import runs
from prefopt.experiment.config import resolve
from prefopt.experiment.recipes import from_dict, from_json
from prefopt.experiment.stage_recipes import (
    compared,
    evaluated_recipe,
    judge_recipe,
    overoptimization_recipe,
    records_recipe,
    round_recipe,
    stage_recipe,
    training_recipe,
)
from prefopt.store.files import canonical_json


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(read("config.yaml"))


RUNS = {
    "imdb": {"sft": "sft"},
    "tldr": {"sft": "sft", "preferred_ft": "sft", "dpo": "preference", "ppo": "ppo"},
    "hh": {"preferred_ft": "sft", "dpo": "preference"},
}


def recipe_json(config: dict[str, Any], task: str, stage: str, run: str | None = None) -> str:
    """The recipe of a stage, of a run's training where one is given: equal values give equal text."""
    return canonical_json(stage_recipe(config, task, stage) if run is None else training_recipe(config, task, run))


def recipe_type(trainer: str) -> type[Any]:
    name = {"sft": "SFTRecipe", "preference": "PreferenceRecipe", "kto": "KTORecipe", "ppo": "PPORecipe"}[trainer]
    return getattr(importlib.import_module(f"prefopt.training.{trainer}"), name)


@pytest.mark.parametrize(("task", "run"), [(task, run) for task in RUNS for run in RUNS[task]])
@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_each_run_is_accepted_by_its_trainer(task: str, run: str, overlay: str | None) -> None:
    config = resolve(merged(read("config.yaml"), read(overlay) if overlay else {}))
    text = recipe_json(config, task, "train", run)
    recipe = from_json(recipe_type(RUNS[task][run]), text)
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(recipe)))


@pytest.mark.parametrize("model", ["reward_model", "gold_reward_model"])
def test_reward_models_may_be_adapters(config: dict[str, Any], model: str) -> None:
    assert stage_recipe(config, "tldr", model)["adapter"] is None
    adapted = resolve(with_value(f"tasks.tldr.{model}.adapter", {"rank": 4, "alpha": 8}))
    assert stage_recipe(adapted, "tldr", model)["adapter"] == {"rank": 4, "alpha": 8}


def test_a_run_has_the_values_of_its_section_and_its_own(config: dict[str, Any]) -> None:
    own = {"mine": {"method": "dpo", "beta": 0.5, "seed": 7}, "most": {"method": "best_of_n"}}
    config = resolve(with_value("tasks.tldr.runs", own))
    dpo, mine = (training_recipe(config, "tldr", run) for run in ("dpo", "mine"))
    assert mine == {**dpo, "seed": 7, "values": {**dpo["values"], "beta": 0.5}}
    later = {"nll_weight": 0.0, "length_normalized": False}
    assert (
        dpo["values"] == {"loss": "sigmoid", "beta": 0.25, "label_smoothing": 0.0, **later}
        and dpo["objective"] == "dpo"
    )
    recipe = stage_recipe(config, "tldr", "win_rates")
    # By method, the run that is called as its method first.
    assert recipe["runs"] == ["base", "sft", "preferred_ft", "dpo", "mine", "ppo", "best_of_128", "most"]
    assert recipe["n"] == {"best_of_128": 128, "most": 128}
    assert recipe["methods"]["mine"] == "dpo" and recipe["opponents"] == ["sft", "preferred_ft", "dpo", "mine"]
    named = resolve(with_value("tasks.tldr.evaluation.opponents", ["ppo"]))
    assert stage_recipe(named, "tldr", "win_rates")["opponents"] == ["ppo"]


RECIPES = {
    "pretrain": "prefopt.training.pretrain",
    "prepare": "prefopt.data.prepare",
    "reference": "prefopt.training.reference",
    "reward_model": "prefopt.training.reward",
    "gold_reward_model": "prefopt.training.reward",
    "sample": "prefopt.generation.sample",
    "candidates": "prefopt.generation.sample",
    "score": "prefopt.generation.score",
    "best_of_n": "prefopt.generation.best_of_n",
    "best_of_n_curve": "prefopt.analysis.best_of_n_curve",
    "judge": "prefopt.judging.stage",
    "win_rates": "prefopt.analysis.win_rates",
    "examples": "prefopt.analysis.examples",
    "human_study": "prefopt.judging.human.study",
    "human_votes": "prefopt.judging.human.votes",
}


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_each_stage_accepts_its_recipe(stage: str, overlay: str | None) -> None:
    config = resolve(merged(read("config.yaml"), read(overlay) if overlay else {}))
    module = importlib.import_module(RECIPES[stage])
    own = [
        value
        for name, value in vars(module).items()
        if name.endswith("Recipe") and dataclasses.is_dataclass(value) and isinstance(value, type)
    ]
    recipe_type = next((value for value in own if value.__module__ == module.__name__), own[0])
    recipe = from_json(recipe_type, recipe_json(config, "tldr", stage))
    assert json.loads(recipe_json(config, "tldr", stage)) == json.loads(json.dumps(dataclasses.asdict(recipe)))


OTHERS = {
    "imdb": {
        "pretrain": "prefopt.training.pretrain",
        "prefixes": "prefopt.data.prefixes",
        "pair_samples": "prefopt.generation.sample",
        "ceiling_samples": "prefopt.generation.sample",
        "true_rewards": "prefopt.rewards.stage",
        "classifier": "prefopt.training.classifier",
        "reference": "prefopt.training.reference",
        "reward_model": "prefopt.training.reward",
        "optimal_frontier": "prefopt.analysis.optimal_frontier",
        "dominance": "prefopt.analysis.dominance",
        "frontier_figure": "prefopt.analysis.frontier_figure",
        "diagnosis": "prefopt.analysis.diagnosis",
    },
    "hh": {
        "prepare": "prefopt.data.prepare",
        "sample": "prefopt.generation.sample",
        "candidates": "prefopt.generation.sample",
        "win_rate_by_step": "prefopt.analysis.win_rate_by_step",
    },
    "cnndm": {
        "prepare": "prefopt.data.prepare",
        "sample": "prefopt.generation.sample",
        "judge": "prefopt.judging.stage",
        "win_rates": "prefopt.analysis.win_rates",
    },
}


# Those of a frontier, which any task may have.
OF_A_FRONTIER = ("ceiling_samples", "true_rewards", "optimal_frontier", "dominance", "frontier_figure", "diagnosis")


def test_what_reads_the_rewards_of_all_tasks_is_told_whose_they_are() -> None:
    own = {"ipo": {"method": "dpo", "loss": "ipo"}, "averaged": {"method": "dpo", "length_normalized": True}}
    config = resolve(merged({**read("config.yaml"), "seeds": [3, 5]}, {"tasks": {"tldr": {"runs": own}}}))
    recipe = from_json(OveroptimizationRecipe, canonical_json(overoptimization_recipe(config)))
    assert [one for one in recipe.runs if one[0] == "tldr"] == [
        ("tldr", seed, run, run in own) for seed in (3, 5) for run in ("dpo", *own, "ppo")
    ]
    assert recipe.candidates == (("tldr", 3), ("tldr", 5), ("hh", 3), ("hh", 5))
    told = {name: (reward, confidence) for name, _, _, reward, confidence in recipe.tasks}
    assert told == {"tldr": ("oracle", 0.95), "hh": ("oracle", 0.95), "imdb": ("rule", 0.95)}
    own = json.loads(recipe_json(config, "imdb", "diagnosis"))["values"]
    assert "nll_weight" in own["dpo"] and own["unlikelihood"] == ["alpha"] and set(own) == {"dpo", "unlikelihood"}


@pytest.mark.parametrize("stage", OF_A_FRONTIER)
def test_each_stage_of_a_frontier_accepts_the_recipe_of_a_task_with_win_rates(stage: str) -> None:
    config = resolve(read("config.yaml"))
    module = importlib.import_module(OTHERS["imdb"][stage])
    own = next(value for name, value in vars(module).items() if name.endswith("Recipe") and isinstance(value, type))
    text = recipe_json(config, "hh", stage)
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(from_json(own, text))))


@pytest.mark.parametrize(("task", "stage"), [(task, stage) for task in OTHERS for stage in OTHERS[task]])
@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_each_stage_of_the_other_tasks_accepts_its_recipe(task: str, stage: str, overlay: str | None) -> None:
    config = resolve(merged(read("config.yaml"), read(overlay) if overlay else {}))
    module = importlib.import_module(OTHERS[task][stage])
    names = [name for name, value in vars(module).items() if name.endswith("Recipe") and isinstance(value, type)]
    own = [vars(module)[name] for name in names if vars(module)[name].__module__ == module.__name__]
    recipes = [
        value for value in own or [vars(module)[name] for name in names] if not value.__name__.endswith("ByStep")
    ]
    text = recipe_json(config, task, stage)
    assert json.loads(text) == json.loads(json.dumps(dataclasses.asdict(from_json(recipes[0], text))))


@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_records_accept_the_recipe_of_each_of_their_tables(overlay: str | None) -> None:
    from prefopt.data import records, reviews

    config = resolve(merged(read("config.yaml"), read(overlay) if overlay else {}))
    accepted = {"imdb": (reviews.TABLES, reviews.ReviewsRecipe)}
    for task in config["tasks"]:
        tables, recipe_type = accepted.get(task, (records.TABLES, records.RecordsRecipe))
        for table in tables:
            recipe = records_recipe(config, task, table)
            assert recipe == json.loads(json.dumps(dataclasses.asdict(from_dict(recipe_type, recipe))))


def test_a_count_of_embedded_data_changes_the_tables_that_hold_its_rows(config: dict[str, Any]) -> None:
    """More test prompts leave what is trained on as it is, and so do gold pairs."""
    names = ["demonstrations", "training/demonstrations", "preferences", "gold_preferences", "pretraining"]

    def different(key: str) -> set[str]:
        changed = resolve(with_value(f"tasks.tldr.data.embedded.{key}", 999))
        return {name for name in names if records_recipe(config, "tldr", name) != records_recipe(changed, "tldr", name)}

    both = {"demonstrations", "training/demonstrations"}
    assert different("seed") == set(names)
    assert different("demonstrations") == different("validation_prompts") == both
    assert different("test_prompts") == {"demonstrations"}
    assert different("pairs") == different("validation_pairs") == {"preferences"}
    assert different("gold_pairs") == different("gold_test_pairs") == {"gold_preferences"}
    assert different("pretraining_documents") == {"pretraining"}


def test_values_that_change_no_result_are_not_compared(config: dict[str, Any]) -> None:
    """How often a trainer saves, what an endpoint costs and how it is asked; what a source or judge does not read."""
    dpo = training_recipe(config, "tldr", "dpo")
    assert compared(dpo) == {key: value for key, value in dpo.items() if key != "checkpoint_every"}
    for run in (
        training_recipe(config, "imdb", "ppo_gt_6")["true_reward"],
        evaluated_recipe(config, "imdb", "ppo_6")["reward"],
    ):
        assert run.keys() - compared(run).keys() == {"max_length", "batch_size"}
    chat = resolve(merged(read("config.yaml"), read("chat_judge.yaml")))["tasks"]["tldr"]["judge"]
    left_out = {"concurrency", "requests_per_minute", "timeout", "max_retries", "api_key_env", "budget_usd", "serve"}
    for kind, more in (("chat", {"store"}), ("recorded", set())):
        recipe = judge_recipe(config, "tldr", {**chat, "kind": kind})
        assert recipe.keys() - compared(recipe).keys() == {"token_budget"}
        assert recipe["chat"].keys() - compared(recipe)["chat"].keys() == left_out | more
        assert list(recipe["chat"]["prices"]) == [chat["chat"]["model"]]
    gold = judge_recipe(config, "tldr", config["tasks"]["tldr"]["other_judges"]["gold"])
    assert compared(gold) == gold
    records = records_recipe(config, "tldr", "preferences")
    assert compared(records) == {"source": "embedded", "embedded": records["embedded"]}
    files = compared({**records, "source": "files", "posts": ["posts.jsonl"]})
    assert files == {key: records[key] for key in ("splits", "gold_fraction", "max_malformed")} | {"source": "files"}
    own = {**records, "source": "records", "records": [{"path": "a.jsonl", "count": 3}], "seed": 1}
    decided = ("splits", "gold_fraction", "max_malformed", "pairs", "ties")
    # A file is compared by its content.
    assert compared(own) == {
        **{key: records[key] for key in decided},
        **{"source": "records", "records": [{"count": 3}], "seed": 1},
    }


@pytest.mark.parametrize("overlay", [None, "paper.yaml"])
def test_every_run_of_the_sweep_is_accepted_by_its_trainer(overlay: str | None) -> None:
    from prefopt.training.by_step import EvaluationsByStep
    from prefopt.training.evaluation import EvaluationRecipe

    config = resolve(merged(read("config.yaml"), read(overlay) if overlay else {}))
    for run in runs.runs(config, "imdb"):
        recipe = from_dict(EvaluationsByStep, evaluated_recipe(config, "imdb", run))
        kind = runs.entry(config, "imdb", run).trainer
        trainer = from_json(recipe_type(kind), recipe_json(config, "imdb", "train", run))
        from_dict(EvaluationRecipe, recipe.evaluation)
        interval = runs.values(config, "imdb", run)["interval"]
        assert (trainer.updates if kind == "ppo" else trainer.steps) == interval * recipe.points
        assert (trainer.evaluate_every, trainer.keep, trainer.seed) == (interval, "last", recipe.seed)
        if kind == "ppo":
            assert trainer.kl_target == recipe.conservativeness and trainer.validation_prompts == 0
            assert (trainer.true_reward is None) == (recipe.method == "ppo")
    assert [training_recipe(config, "imdb", f"preferred_ft_{seed}")["seed"] for seed in (0, 1)] == [0, 1]


def test_the_sweep_is_the_papers(config: dict[str, Any]) -> None:
    found: dict[str, list[float]] = {}
    for run in runs.runs(config, "imdb"):
        recipe = evaluated_recipe(config, "imdb", run)
        found.setdefault(recipe["method"], []).append(recipe["conservativeness"])
    nats = [3, 6, 9, 12]
    assert found == {
        "dpo": [0.05, 0.1, 1, 5],
        "ppo": nats,
        "ppo_gt": nats,
        "ppo_gt_trl": nats,
        "unlikelihood": [0.05, 0.1, 0.5, 1],
        "preferred_ft": [None, None],
    }


def test_trls_former_defaults(config: dict[str, Any]) -> None:
    """PPOConfig of TRL 0.4.7: minibatches of one completion, four passes, no clipping of the gradient."""
    trainer = training_recipe(config, "imdb", "ppo_gt_trl_6")
    expected = {"learning_rate": 1e-5, "kl_coef": 0.2, "kl_target": 6, "kl_horizon": 10000, "gamma": 1, "lam": 0.95}
    expected |= {"clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "epochs": 4, "normalize_rewards": False}
    assert {key: trainer[key] for key in expected} == expected
    assert trainer["prompts_per_update"] * trainer["samples_per_prompt"] == 256 == trainer["minibatches"]
    assert trainer["max_grad_norm"] >= 1e6


def test_a_change_of_a_stage_changes_no_other_recipe(config: dict[str, Any]) -> None:
    changed = resolve(with_value("tasks.tldr.dpo.beta", 0.5))
    assert all(recipe_json(config, "tldr", stage) == recipe_json(changed, "tldr", stage) for stage in RECIPES)
    different = {
        run for run in RUNS["tldr"] if training_recipe(config, "tldr", run) != training_recipe(changed, "tldr", run)
    }
    assert different == {"dpo"}


def test_the_top_level_seed_leaves_data_base_and_judge_alone(config: dict[str, Any]) -> None:
    changed = resolve(with_value("seeds", [1]))
    same = {stage for stage in RECIPES if recipe_json(config, "tldr", stage) == recipe_json(changed, "tldr", stage)}
    assert same == {"pretrain", "prepare", "reference", "gold_reward_model", "score", "best_of_n", "judge"} | {
        "human_study",
        "human_votes",
    }


def test_a_section_may_name_a_seed_of_its_own(config: dict[str, Any]) -> None:
    changed = resolve(with_value("tasks.tldr.dpo.seed", 7))
    assert training_recipe(changed, "tldr", "dpo")["seed"] == 7
    assert training_recipe(changed, "tldr", "ppo")["seed"] == training_recipe(config, "tldr", "dpo")["seed"] == 0


def test_the_judge_never_publishes_the_weights_that_suit_its_own_test_pairs(config: dict[str, Any]) -> None:
    assert stage_recipe(config, "tldr", "gold_reward_model")["keep"] == "last"


def test_candidates_are_drawn_at_temperatures_above_zero(config: dict[str, Any]) -> None:
    recipe = stage_recipe(config, "tldr", "candidates")
    assert recipe["n"] == 128 and recipe["temperatures"] == [0.25, 0.5, 0.75, 1.0]
    assert stage_recipe(config, "tldr", "sample")["n"] == 1


ROUND = {
    "round_prompts": "prefopt.data.round_prompts:RoundPromptsRecipe",
    "round_samples": "prefopt.generation.sample:SampleRecipe",
    "round_implicit_rewards": "prefopt.generation.implicit_rewards:ImplicitRewardsRecipe",
    "round_pairs": "prefopt.data.sampled_pairs:SampledPairsRecipe",
}


@pytest.mark.parametrize("stage", ROUND)
def test_each_stage_of_a_round_accepts_its_recipe_which_does_not_know_how_many_there_are(stage: str) -> None:
    module, name = ROUND[stage].split(":")
    recipe_type = getattr(importlib.import_module(module), name)
    recipes = [
        round_recipe(resolve(with_value("tasks.tldr.runs.mine", own)), "tldr", "mine", stage, 2)
        for own in ({"method": "iterative_dpo"}, {"method": "iterative_dpo", "rounds": 9})
    ]
    assert recipes[0] == recipes[1] == json.loads(json.dumps(dataclasses.asdict(from_dict(recipe_type, recipes[0]))))


def test_a_round_is_trained_as_dpo_is() -> None:
    own = {"dpo": {"method": "dpo"}, "mine": {"method": "iterative_dpo", "loss": "ipo", "beta": 0.5, "rounds": 9}}
    config = resolve(with_value("tasks.tldr.runs", own))
    dpo, mine = (training_recipe(config, "tldr", run) for run in ("dpo", "mine"))
    assert mine.keys() == dpo.keys() and mine["objective"] == "dpo"
    assert mine["values"] == {**dpo["values"], "loss": "ipo", "beta": 0.5}
