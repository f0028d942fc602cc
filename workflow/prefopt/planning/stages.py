"""Every stage that runs a model, and what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from prefopt.experiment import targets
from prefopt.experiment.methods import sampled, trained_by
from prefopt.planning import samplers, trainers
from prefopt.planning.estimate import Estimate
from prefopt.planning.task import Task

Config = dict[str, Any]

_STAGES: dict[str, Callable[[Task, str, str | None], Estimate]] = {
    "pretrain": trainers.pretrain,
    **dict.fromkeys(trained_by("sft"), trainers.fine_tuning),
    "dpo": trainers.dpo,
    "reward_model": trainers.reward_model,
    "gold_reward_model": trainers.gold_reward_model,
    "classifier": trainers.classifier,
    "ppo": trainers.ppo,
    "frontier_run": trainers.frontier_run,
    "reference": samplers.reference,
    "sample": samplers.sample,
    "candidates": samplers.candidates,
    "pair_samples": samplers.pair_samples,
    "ceiling_samples": samplers.ceiling_samples,
    "score": samplers.score,
    "judge": samplers.judge,
    "judge_candidates": samplers.judge,
    "best_of_n": samplers.best_of_n,
    "true_rewards": samplers.true_rewards,
}


def estimate(config: Config, task: str, stage: str, name: str | None = None) -> Estimate:
    """What a job of a stage takes.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        stage: a rule's name.
        name: of `sample` the method, of `frontier_run` the run.

    Raises:
        UserError: the size of its model is not known.
    """
    return _STAGES[stage](Task(config, task), stage, name)


def estimates(config: Config, task: str) -> list[Estimate]:
    """Every training, sampling and scoring stage of a task; runs of a sweep as one entry a method."""
    section = config["tasks"][task]
    made = ["pretrain" if name == "base" else name for name in targets.trainers(config, task)]
    if targets.kind(section) == "frontier":
        stages = [*made, "pair_samples", "ceiling_samples", "reference"]
        stages += [] if section["true_reward"]["source"] == "rule" else ["true_rewards"]
        return [estimate(config, task, stage) for stage in stages] + _sweep(config, task)
    stages = [*made, *(["reference"] if targets.caches_reference(config, task) else [])]
    stages += ["candidates", "score"] if targets.has_candidates(config, task) else []
    samples = [method for method in section["methods"] if method in sampled()]
    return [
        *(estimate(config, task, stage) for stage in stages),
        *(_renamed(estimate(config, task, "sample", method), f"sample {method}") for method in samples),
    ]


def _sweep(config: Config, task: str) -> list[Estimate]:
    by_method: dict[str, list[str]] = {}
    for run in targets.runs(config, task):
        by_method.setdefault(config["tasks"][task]["runs"][run]["method"], []).append(run)
    return [
        _renamed(estimate(config, task, "frontier_run", runs[0]), f"frontier_run {method}", len(runs))
        for method, runs in by_method.items()
    ]


def _renamed(one: Estimate, stage: str, jobs: int = 1) -> Estimate:
    return dataclasses.replace(one, stage=stage, jobs=jobs)
