"""Each stage takes the recipe that is cut for it from the config, and no other stage's values."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import pytest
from test_config import merged, read, with_value

from prefopt.config import resolve
from prefopt.recipes import from_json
from prefopt.stage_recipes import recipe_json, stage_recipe


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return resolve(read("config.yaml"))


RECIPES = {
    "records": "prefopt.data.records",
    "pretrain": "prefopt.training.pretrain",
    "prepare": "prefopt.data.prepare",
    "sft": "prefopt.training.sft",
    "preferred_ft": "prefopt.training.sft",
    "reference": "prefopt.training.reference",
    "dpo": "prefopt.training.dpo",
    "reward_model": "prefopt.training.reward",
    "gold_reward_model": "prefopt.training.reward",
    "ppo": "prefopt.training.ppo",
    "sample": "prefopt.generation.sample",
    "candidates": "prefopt.generation.sample",
    "score": "prefopt.generation.score",
    "best_of_n": "prefopt.generation.best_of_n",
    "best_of_n_curve": "prefopt.analysis.best_of_n_curve",
    "judge": "prefopt.judging.stage",
    "win_rates": "prefopt.analysis.win_rates",
    "examples": "prefopt.analysis.examples",
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


def test_a_change_of_a_stage_changes_no_other_recipe(config: dict[str, Any]) -> None:
    changed = resolve(with_value("tasks.tldr.dpo.beta", 0.5))
    different = {
        stage for stage in RECIPES if recipe_json(config, "tldr", stage) != recipe_json(changed, "tldr", stage)
    }
    assert different == {"dpo"}


def test_the_top_level_seed_leaves_data_base_and_judge_alone(config: dict[str, Any]) -> None:
    changed = resolve(with_value("seed", 1))
    same = {stage for stage in RECIPES if recipe_json(config, "tldr", stage) == recipe_json(changed, "tldr", stage)}
    assert same == {"records", "pretrain", "prepare", "reference", "gold_reward_model", "score", "best_of_n", "judge"}


def test_a_section_may_name_a_seed_of_its_own(config: dict[str, Any]) -> None:
    changed = resolve(with_value("tasks.tldr.dpo.seed", 7))
    assert stage_recipe(changed, "tldr", "dpo")["seed"] == 7
    assert stage_recipe(changed, "tldr", "ppo")["seed"] == stage_recipe(config, "tldr", "dpo")["seed"] == 0


def test_the_judge_never_publishes_the_weights_that_suit_its_own_test_pairs(config: dict[str, Any]) -> None:
    assert stage_recipe(config, "tldr", "gold_reward_model")["keep"] == "last"


def test_candidates_are_drawn_at_temperatures_above_zero(config: dict[str, Any]) -> None:
    recipe = stage_recipe(config, "tldr", "candidates")
    assert recipe["n"] == 128 and recipe["temperatures"] == [0.25, 0.5, 0.75, 1.0]
    assert stage_recipe(config, "tldr", "sample")["n"] == 1
