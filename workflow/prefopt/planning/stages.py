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
    "round_evaluations": trainers.round_evaluations,
    "sampled_rounds": trainers.sampled_rounds,
    "reference": samplers.reference,
    "reference_labels": samplers.reference_labels,
    "sample": samplers.sample,
    "candidates": samplers.candidates,
    "pair_samples": samplers.pair_samples,
    "ceiling_samples": samplers.ceiling_samples,
    "evaluations": samplers.evaluations,
    "round_samples": samplers.round_samples,
    "round_scores": samplers.round_scores,
    "round_true_rewards": samplers.round_true_rewards,
    "round_implicit_rewards": samplers.round_implicit_rewards,
    "round_judge_labels": samplers.round_judge_labels,
    "round_reference": samplers.round_reference,
    "run_rewards": samplers.run_rewards,
    "score": samplers.score,
    "judge_accuracy": samplers.judge_accuracy,
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
        stages = ["pair_samples", "ceiling_samples", *targets.reference_tables(config, task)]
        stages += [] if section["true_reward"]["source"] in targets.PROGRAMS else ["true_rewards"]
        evaluated = [
            _renamed(estimate(config, task, "round_evaluations", run), f"round_evaluations {run}")
            for run in runs.in_rounds(config, task)
        ]
        return [
            *(*made, *(estimate(config, task, stage) for stage in stages), *_sweep(config, task)),
            *(*_rounds(config, task), *evaluated),
        ]
    stages = targets.reference_tables(config, task)
    stages += ["candidates", "score"] if targets.has_candidates(config, task) else []
    measured, learned = targets.measured(config, task), section.get("frontier", {}).get("reward") == "gold_reward_model"
    if measured:
        stages += ["ceiling_samples", *(["true_rewards"] if learned else [])]
        stages += ["candidate_rewards"] if learned and targets.has_candidates(config, task) else []
    rewarded = targets.rewarded(config, task) if learned else []
    return [
        *made,
        *(estimate(config, task, stage) for stage in stages),
        *_rounds(config, task),
        *(_renamed(estimate(config, task, "sample", run), f"sample {run}") for run in runs.policies(config, task)),
        *(
            _renamed(estimate(config, task, "sampled_rounds", run), f"sampled_rounds {run}")
            for run in targets.sampled_rounds(config, task)
        ),
        *(_renamed(estimate(config, task, "evaluations", run), f"evaluations {run}") for run in measured),
        *(_renamed(estimate(config, task, "run_rewards", run), f"run_rewards {run}") for run in rewarded),
    ]


# What labels a round's completions, by the run's `labels`.
_LABELLED_BY = {
    "reward_model": "round_scores",
    "true_reward": "round_true_rewards",
    "implicit": "round_implicit_rewards",
    "judge": "round_judge_labels",
}


def _rounds(config: Config, task: str) -> list[Estimate]:
    """The stages of a round of each run that is trained in rounds, as many jobs as it has rounds; an oracle is left out."""
    if not targets.rounds(config, task):
        return []
    made = [
        _renamed(estimate(config, task, stage, run), run if stage == method else f"{stage} {run}", rounds)
        for run, rounds in runs.in_rounds(config, task).items()
        for method in [runs.method(config, task, run)]
        for stage in (
            "round_samples",
            _LABELLED_BY[runs.values(config, task, run)["labels"]],
            "round_reference",
            method,
        )
    ]
    return [one for one in made if one.flops]


def _trained(config: Config, task: str, name: str) -> Estimate:
    """A model that is trained: the base, a run or a scorer."""
    if name == "base":  # what the run of this name samples from
        return estimate(config, task, "pretrain")
    if name not in runs.known(config, task):
        return estimate(config, task, name)
    return _renamed(estimate(config, task, runs.method(config, task, name), name), name)


def _sweep(config: Config, task: str) -> list[Estimate]:
    by_method: dict[str, list[str]] = {}
    for run in targets.measured_at_once(config, task):
        by_method.setdefault(runs.method(config, task, run), []).append(run)
    return [
        _renamed(estimate(config, task, "frontier_run", equal[0]), f"frontier_run {method}", len(equal))
        for method, equal in by_method.items()
    ]


def _renamed(one: Estimate, stage: str, jobs: int = 1) -> Estimate:
    return dataclasses.replace(one, stage=stage, jobs=jobs)
