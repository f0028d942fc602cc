"""Every stage that runs a model, and what it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from prefopt.experiment import runs, targets
from prefopt.experiment.methods import trained
from prefopt.planning import samplers, trainers
from prefopt.planning.estimate import Estimate
from prefopt.planning.task import Task

Config = dict[str, Any]

_STAGES: dict[str, Callable[[Task, str, str | None], Estimate]] = {
    "pretrain": trainers.pretrain,
    **dict.fromkeys(trained(), trainers.of_run),
    "reward_model": trainers.reward_model,
    "gold_reward_model": trainers.gold_reward_model,
    "classifier": trainers.classifier,
    "frontier_run": trainers.frontier_run,
    "reference": samplers.reference,
    "sample": samplers.sample,
    "candidates": samplers.candidates,
    "pair_samples": samplers.pair_samples,
    "ceiling_samples": samplers.ceiling_samples,
    "evaluations": samplers.evaluations,
    "score": samplers.score,
    "judge": samplers.judge,
    "judge_candidates": samplers.judge,
    "best_of_n": samplers.best_of_n,
    "true_rewards": samplers.true_rewards,
    "candidate_rewards": samplers.candidate_rewards,
}


def estimate(config: Config, task: str, stage: str, name: str | None = None) -> Estimate:
    """What a job of a stage takes.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        stage: a rule's name.
        name: of `frontier_run`, `sample` and a method's rule the run (default: the one that is called as its method).

    Raises:
        UserError: the size of its model is not known.
    """
    return _STAGES[stage](Task(config, task), stage, name)


# Made once for all seeds.
_ONCE = ("pretrain", "gold_reward_model", "classifier")


def estimates(config: Config, task: str) -> list[Estimate]:
    """Every training, sampling and scoring stage of a task; runs of a sweep as one entry a method, a job for each seed."""
    seeds = len(config["seeds"])
    return [
        dataclasses.replace(one, jobs=one.jobs * (1 if one.stage in _ONCE else seeds))
        for one in _of_one_seed(config, task)
    ]


def _of_one_seed(config: Config, task: str) -> list[Estimate]:
    section = config["tasks"][task]
    made = [_trained(config, task, name) for name in targets.trainers(config, task)]
    if targets.kind(section) == "frontier":
        stages = ["pair_samples", "ceiling_samples", "reference"]
        stages += [] if section["true_reward"]["source"] == "rule" else ["true_rewards"]
        return [*made, *(estimate(config, task, stage) for stage in stages), *_sweep(config, task)]
    stages = ["reference"] if targets.caches_reference(config, task) else []
    stages += ["candidates", "score"] if targets.has_candidates(config, task) else []
    measured = targets.measured(config, task)
    if measured:
        learned = section["frontier"]["reward"] == "gold_reward_model"
        stages += ["ceiling_samples", *(["true_rewards"] if learned else [])]
        stages += ["candidate_rewards"] if learned and targets.has_candidates(config, task) else []
    return [
        *made,
        *(estimate(config, task, stage) for stage in stages),
        *(_renamed(estimate(config, task, "sample", run), f"sample {run}") for run in runs.policies(config, task)),
        *(_renamed(estimate(config, task, "evaluations", run), f"evaluations {run}") for run in measured),
    ]


def _trained(config: Config, task: str, name: str) -> Estimate:
    """A model that is trained: the base, a run or a scorer."""
    stage = "pretrain" if name == "base" else name
    if name not in runs.known(config, task):
        return estimate(config, task, stage)
    return _renamed(estimate(config, task, runs.method(config, task, name), name), name)


def _sweep(config: Config, task: str) -> list[Estimate]:
    by_method: dict[str, list[str]] = {}
    for run in runs.runs(config, task):
        by_method.setdefault(runs.method(config, task, run), []).append(run)
    return [
        _renamed(estimate(config, task, "frontier_run", equal[0]), f"frontier_run {method}", len(equal))
        for method, equal in by_method.items()
    ]


def _renamed(one: Estimate, stage: str, jobs: int = 1) -> Estimate:
    return dataclasses.replace(one, stage=stage, jobs=jobs)
