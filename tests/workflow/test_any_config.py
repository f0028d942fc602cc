"""Configs that nobody thought of, drawn by chance: each is refused in a sentence, or planned and made into jobs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from compared import loaded

from prefopt.errors import UserError
from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged, origins
from prefopt.planning.report import report
from prefopt.planning.stages import estimates
from prefopt.resources import DEFAULTS

SHIPPED = {task: list(section["runs"]) for task, section in resolve(merged([DEFAULTS]))["tasks"].items()}
BETA = {"beta": 0.2}
COMPARED: list[dict[str, Any]] = [
    *({"method": name} for name in ("base", "base_2shot", "sft", "preferred_ft", "dpo", "simpo", "orpo", "kto", "ppo")),
    *({"method": "best_of_n", "n": n} for n in (1, 16)),
    {"method": "iterative_dpo"},
    {"method": "dpo", "loss": "ipo", "adapter": {"rank": 4}},
    {"method": "iterative_dpo", "labels": "judge", "rounds": 1},
    {"method": "iterative_dpo", "labels": "implicit", "start": "dpo", "reference": "moving"},
]
SWEPT: list[dict[str, Any]] = [
    *({"method": name, **BETA} for name in ("dpo", "simpo", "orpo", "kto", "iterative_dpo")),
    *({"method": name, "kl_target": 2.0} for name in ("ppo", "ppo_gt")),
    *({"method": "unlikelihood", "alpha": 0.3}, {"method": "preferred_ft"}),
]
OPTIONS: dict[str, list[Any]] = {
    "judge": [{"kind": "reward_model"}, {"kind": "oracle"}],
    "other_judges": [{}, {"another": {"kind": "reward_model"}}],
    "by_step": [None, {"points": 3}],
    "frontier": [None, {}, {"reward": "gold_reward_model"}],
    "human": [None],
    "sampling": [{"temperatures": [1.0]}, {"engine": "vllm"}],
    "base": [{"source": "scratch"}],
}
EVERYWHERE: list[dict[str, Any]] = [{}, {"seeds": [3, 1]}, {"compute": {"gpus": 2}}, {"compute": {"dtype": "bfloat16"}}]


def drawn(chance: random.Random) -> dict[str, Any]:
    """An overlay: some tasks and runs left out, others added, some options changed."""
    tasks: dict[str, Any] = {}
    for task, runs in SHIPPED.items():
        if chance.random() < 0.3:
            tasks[task] = None
            continue
        kinds = {"imdb": SWEPT, "cnndm": []}.get(task, COMPARED)
        named = {run: None for run in runs if chance.random() < 0.15}
        tasks[task] = {
            "runs": named | {f"own_{i}": chance.choice(kinds) for i in range(chance.randint(0, 2) if kinds else 0)}
        }
        if kinds is COMPARED:
            tasks[task] |= {key: chance.choice(values) for key, values in OPTIONS.items() if chance.random() < 0.2}
    if chance.random() < 0.3:
        tasks["mine"] = {"like": chance.choice(list(SHIPPED))}
    return {"tasks": tasks, **chance.choice(EVERYWHERE)}


@pytest.mark.parametrize("seed", range(12))
def test_a_config_is_refused_or_planned_and_made_into_jobs(seed: int, tmp_path: Path) -> None:
    chance, overlay = random.Random(seed), tmp_path / "overlay.json"
    for _ in range(8):
        overlay.write_text(json.dumps(drawn(chance)))
        try:
            config = resolve(merged([DEFAULTS, overlay]), [overlay])
        except UserError:
            continue
        assert list(origins([DEFAULTS, overlay]))
        assert report(config, {task: estimates(config, task) for task in config["tasks"]})
        with loaded(tmp_path, overlay) as rules:
            jobs = rules.jobs()
            made = [path for job in jobs.values() for path in job.inputs if path.startswith("results/")]
            assert made and all(rules.maker(path) is not None for path in made)
        return
    raise AssertionError("of eight configs none was allowed: what is drawn is too odd")
