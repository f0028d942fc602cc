"""The recipe of each stage, read from a resolved config: the JSON object of its `--recipe`.

A stage's recipe holds nothing that it does not read, so that a change of one stage's values reruns no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prefopt.experiment import runs, targets
from prefopt.experiment.config import objective_values, round_values
from prefopt.experiment.tasks import RECORD_FILES, TASKS

Config = dict[str, Any]


def stage_recipe(config: Config, task: str, stage: str) -> Config:
    """The values that a stage of a task is started with: the JSON object of its `--recipe`.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        stage: a rule's name; `candidates` and `gold_reward_model` are the stages `sample` and `reward` with values of
            their own.
    """
    return _RECIPES[stage](config, config["tasks"][task], task)


def training_recipe(config: Config, task: str, run: str) -> Config:
    """The values that a run of a task is trained with.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        run: key of its `runs`, or its reference policy.
    """
    method, values = runs.entry(config, task, run), runs.values(config, task, run)
    of_kind = _ppo if method.trainer == "ppo" else _training
    if method.rounds:
        values = {key: value for key, value in values.items() if key not in round_values()}
    if method.trainer == "preference":
        own = {key: values.pop(key) for key in objective_values(runs.method(config, task, run))}
        recipe = {**of_kind(config, values), "objective": method.objective, "values": own}
    else:
        recipe = {**of_kind(config, values), **dict(method.values)}
    section = config["tasks"][task]
    if method.trainer == "ppo":
        recipe["true_reward"] = None if "reward_model" in method.needs else _review_reward(section)
    return _of_sweep(recipe, section) if "interval" in recipe else recipe


def _of_sweep(recipe: Config, section: Config) -> Config:
    """The same training until the last checkpoint of a sweep; those weights are published that are evaluated in the end."""
    interval = recipe.pop("interval")
    steps = interval * section["evaluation"]["checkpoints"]
    lasts = {"updates": steps, "validation_prompts": 0} if "true_reward" in recipe else {"epochs": None, "steps": steps}
    return {**recipe, **lasts, "evaluate_every": interval, "keep": "last"}


def round_recipe(config: Config, task: str, run: str, stage: str, number: int) -> Config:
    """The values of a stage of a round of a run.

    Nothing in it depends on how many rounds there are, so that a further one makes itself alone.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        run: key of its `runs` that is trained in rounds.
        stage: a rule of rules/rounds.smk.
        number: of the round, from 1.
    """
    values = runs.values(config, task, run)
    seed = _seed(config, values)
    of_prompts = {key: values[key] for key in ("prompts", "validation_prompts")}
    if stage == "round_prompts":
        return {**of_prompts, "round": number, "seed": seed}
    if stage == "round_samples":
        return {
            **_engine(config),
            "vllm": targets.vllm(config["tasks"][task]),
            **{key: values[key] for key in ("n", "max_new_tokens", "validation_prompts")},
            "temperatures": [values["temperature"]],
            "stop": config["tasks"][task].get("sampling", {}).get("stop", []),
            "train_prompts": values["prompts"],
            "test_prompts": 0,
            "seed": seed,
        }
    if stage == "round_implicit_rewards":
        return {**_engine(config), "beta": values["beta"], "length_normalized": _is_of_a_token(values)}
    return {**{key: values[key] for key in ("pairs", "length_penalty", "missing_eos_reward")}, "seed": seed}


def evaluated_recipe(config: Config, task: str, run: str) -> Config:
    """The values with which a run of a task's sweep is evaluated while it trains.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        run: key of its `runs`.
    """
    section = config["tasks"][task]
    evaluation = section["evaluation"]
    return {
        "points": runs.in_rounds(config, task).get(run, evaluation["checkpoints"]),
        **_frontier_of(config, task, run),
        "evaluation": {
            **_engine(config),
            **{key: evaluation[key] for key in ("prompts", "samples_per_prompt", "max_new_tokens", "seed")},
        },
        "reward": _review_reward(section),
    }


# How a stage goes about its work, which changes no result: how often it saves, how it asks an endpoint and what it may
# spend there, how a local judge is served (its engine is the address, its content a param of the rules), where vLLM is and
# over how many GPUs it spreads a model.
_OF_NO_RESULT = frozenset(
    {
        *("checkpoint_every", "concurrency", "requests_per_minute", "timeout", "max_retries", "api_key_env"),
        *("budget_usd", "serve", "program", "gpus"),
    }
)
# What decides the records of each source; files themselves are compared by their content.
_OF_SOURCE = {
    "embedded": ("source", "embedded"),
    "files": ("source", "splits", "gold_fraction", "max_malformed"),
    "hub": ("source", "hub", "splits", "gold_fraction", "max_malformed"),
    "records": ("source", "records", "pairs", "ties", "seed", "splits", "gold_fraction", "max_malformed"),
}


# What a judge or a true reward of some kind does not read.
_NOT_READ = {
    "rule": ("max_length", "batch_size", "token_budget"),
    "classifier": ("token_budget",),
    **dict.fromkeys(("oracle", "recorded", "human"), ("token_budget",)),
    # Where replies are kept is where a recorded judge reads them.
    "chat": ("token_budget", "store"),
}


def compared(recipe: Config, kind: str | None = None) -> Config:
    """What of a recipe decides the stage's result: a change of the rest makes nothing again.

    Args:
        recipe: a stage's, or a section of it.
        kind: of the judge or true reward that the section belongs to.
    """
    if "embedded" in recipe:
        values = {key: recipe[key] for key in _OF_SOURCE[recipe["source"]] if key in recipe}
        if "records" in values:
            values["records"] = [{key: one[key] for key in one if key != "path"} for one in values["records"]]
        return values
    kind = recipe.get("kind", kind)
    kept = {
        key: value for key, value in recipe.items() if key not in _OF_NO_RESULT.union(_NOT_READ.get(kind or "", ()))
    }
    if "prompt" in kept:  # a file's content is compared, and its name is part of the judge's
        kept["prompt"] = Path(kept["prompt"]).stem
    return {key: compared(value, kind) if isinstance(value, dict) else value for key, value in kept.items()}


def _training(config: Config, section: Config, **others: Any) -> Config:
    """The recipe of a trainer on fixed examples: its section, and what all trainers share."""
    return {"adapter": None, "steps": None, **_ppo(config, section), **others}


def _ppo(config: Config, section: Config) -> Config:
    """The recipe of PPO, which has no adapter."""
    values = {key: value for key, value in section.items() if key not in ("source", "path", "name", "revision")}
    shared = {"activation_checkpointing": config["compute"]["activation_checkpointing"]}
    return {**_engine(config), **shared, **values, "seed": _seed(config, section)}


def _seed(config: Config, section: Config) -> int:
    """A section's own seed, else that of the job, else the first of all."""
    seed: int = config.get("seed", config["seeds"][0]) if section["seed"] is None else section["seed"]
    return seed


def _engine(config: Config) -> Config:
    return {key: config["compute"][key] for key in ("dtype", "token_budget")}


def compute_recipe(config: Config) -> Config:
    """The values of the stage `compute`, which reads all tasks: what each run of a task is made of."""

    def of_run(task: str, run: str) -> Config:
        return {"run": run, "stages": runs.stages_of(config, task, run), "n": runs.choices(config, task).get(run)}

    tasks = targets.tasks_of(config, "comparison", "transfer")
    return {
        "runs": {task: [of_run(task, run) for run in runs.runs(config, task)] for task in tasks},
        "reference": {task: runs.reference(config, task) for task in tasks},
        "home": {task: runs.home(config, task) for task in tasks},
        "seeds": len(config["seeds"]),
        "confidence": _confidence(config, config["tasks"]),
    }


def _confidence(config: Config, tasks: Iterable[str]) -> dict[str, float]:
    """That of each task's intervals."""
    return {task: config["tasks"][task]["evaluation"]["confidence"] for task in tasks}


def _is_of_a_token(values: Config) -> bool:
    """Whether a run's loss, and so its implicit reward, is on log-ratios averaged over tokens."""
    return bool(values.get("length_normalized")) or values.get("loss") == "ipo"


def overoptimization_recipe(config: Config) -> Config:
    """The values of the stage `overoptimization`, which reads all tasks: whose its tables are, in their order."""
    sections = config["tasks"]
    numbers = runs.seeds(config)
    return {
        "runs": [
            [task, numbers[seed], run, _is_of_a_token(runs.values(config, task, run))]
            for task, seed, run in targets.optimized(config)
        ],
        "candidates": [[task, numbers[seed]] for task, seed in targets.rewarded_candidates(config)],
        "tasks": [
            [
                *(task, sections[task]["words"]["title"], TASKS[sections[task]["form"]].written),
                *(_true_reward(config, sections[task])["kind"], sections[task]["evaluation"]["confidence"]),
            ]
            for task in targets.optimized_tasks(config)
        ],
        "seed": config["seeds"][0],
    }


def paper_recipe(config: Config) -> Config:
    """The values of the stage `paper`: the scale of each task with win rates, in words."""
    scale = {}
    for task in targets.tasks_of(config, "comparison", "transfer"):
        if config["tasks"][task]["evaluation"]["against"] is not None:
            continue  # the paper's rates are against the reference texts
        section, base = config["tasks"][task], config["tasks"][runs.home(config, task)]["base"]
        model = {"hub": base["name"], "path": base["path"]}.get(base["source"], f"{base['source']} base")
        source = {"records": "own"}.get(section["data"]["source"], section["data"]["source"])
        scale[task] = f"{source} records, {model}, judge {section['judge']['kind']}"
    return {"scale": scale}


def agreement_recipe(config: Config) -> Config:
    """The values of the stage `judge_agreement`: whose its verdict tables are, in their order."""
    tables = [[task, judge, runs.seeds(config)[seed]] for task, judge, seed, _ in targets.verdict_tables(config)]
    confidence = _confidence(config, targets.tasks_with_judges(config))
    return {"tables": tables, "confidence": confidence, "seed": config["seeds"][0]}


def human_agreement_recipe(config: Config) -> Config:
    """The values of the stage `human_agreement`: whose its tables are, in their order."""
    confidence = _confidence(config, targets.counted_studies(config))
    tables = [[task, judge] for task, judge, _ in targets.study_tables(config)]
    return {"tables": tables, "confidence": confidence, "seed": config["seeds"][0]}


def judge_recipe(config: Config, task: str, judge: Config) -> Config:
    """The values that a judge of a task is made with.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        judge: its section `judge`, or one of `other_judges`.
    """
    suffix = TASKS[config["tasks"][task]["form"]].suffix
    values = {"chat": None, **judge, "suffix": suffix, "token_budget": config["compute"]["token_budget"]}
    if judge["kind"] not in ("chat", "recorded"):
        return values | {"chat": None, "repeat": 0.0}
    chat = {"serve": None, **judge["chat"]}
    if chat["serve"] is not None:
        chat["base_url"] = f"served:{chat['serve']['engine']}"
    return values | {"chat": {**chat, "prices": {chat["model"]: chat["prices"][chat["model"]]}}}


# What of embedded data each raw table holds. No review stands twice, so that each split depends on those before it.
_EMBEDDED = {
    "demonstrations": ("demonstrations", "validation_prompts", "test_prompts"),
    "training/demonstrations": ("demonstrations", "validation_prompts"),
    "preferences": ("pairs", "validation_pairs"),
    "labels": ("pairs", "validation_pairs"),
    "gold_preferences": ("gold_pairs", "gold_test_pairs"),
    "pretraining": ("pretraining_documents", "train", "unlabelled"),
    "training/reviews": ("train", "unlabelled", "validation"),
    "reviews": ("train", "unlabelled", "validation", "test"),
}


def records_recipe(config: Config, task: str, table: str) -> Config:
    """The values that a raw table of a task is made with: of embedded data no row that another table holds.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        table: a raw table.
    """
    data = config["tasks"][task]["data"]
    made = {key: size if key in ("seed", *_EMBEDDED[table]) else 0 for key, size in data["embedded"].items()}
    if targets.kind(config["tasks"][task]) == "frontier":
        return {**data, "embedded": made}
    # Every key that some task's data have; a transfer task's articles are for evaluation only.
    lacking = {"gold_fraction": 0.0, "records": [], "pairs": {}, "ties": "drop", "seed": 0}
    data = {**{kind: [] for kind in RECORD_FILES if kind != "reviews"}, **lacking, **data}
    if "validation_share" in data:
        share = data.pop("validation_share")
        data["splits"] = {"train": 0.0, "validation": share, "test": 1 - share}
    return {**data, "embedded": made}


_STUDY = (
    *("title", "question", "shown", "prompt_heading", "judgments_per_rater", "swapped_repeats", "attention_checks"),
    "seed",
)


def _sides(matchup: Config) -> Config:
    sides = {side: {"temperature": None, **matchup[side]} for side in ("first", "second")}
    return {**matchup, **sides}


def _curve(config: Config, task: str) -> list[int]:
    """The N of a task's curve: those that the config lists, and those of its runs."""
    best_of_n = config["tasks"][task]["best_of_n"]
    return sorted({n for n in best_of_n["curve"] if n <= best_of_n["n"]} | set(runs.choices(config, task).values()))


def _review_reward(section: Config) -> Config:
    source = section["true_reward"]["source"]
    shared = {key: section["true_reward"][key] for key in ("max_length", "batch_size")}
    return {"kind": source if source in targets.PROGRAMS else "classifier", **shared}


def _true_reward(config: Config, section: Config) -> Config:
    """What no run has learned from: of reviews their rule or classifier, else what `frontier` names."""
    others = {"max_length": 0, "batch_size": 0, "token_budget": config["compute"]["token_budget"]}
    own = _review_reward(section) if "true_reward" in section else {"kind": section["frontier"]["reward"]}
    return {**others, **own}


def _frontier(section: Config) -> Config:
    """Values of the optimal frontier, of dominance, and of how the reference policy is sampled for them."""
    if "ceiling" not in section:
        sampled = {key: section["sampling"][key] for key in ("max_new_tokens", "stop", "seed")}
        return {**section["frontier"], **sampled}
    sampled = {key: section["evaluation"][key] for key in ("max_new_tokens", "seed", "bootstrap", "at_kl")}
    return {**section["ceiling"], **sampled, "stop": []}


def _frontier_of(config: Config, task: str, run: str) -> Config:
    """Whose frontier a run is of, and the value in which its runs differ; None where there is none."""
    varies, values = runs.entry(config, task, run).varies, runs.values(config, task, run)
    return {
        "method": runs.group(config, task, run),
        "seed": _seed(config, values),
        "conservativeness": values[varies] if varies else None,
    }


def evaluations_recipe(config: Config, task: str, run: str) -> Config:
    """The values with which the samples of a run that were drawn while it trained are read.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        run: one of `targets.measured`.
    """
    return {
        **_engine(config),
        "run": run,
        **_frontier_of(config, task, run),
        "reward": _true_reward(config, config["tasks"][task]),
    }


def _sampling(config: Config, task: Config, **others: Any) -> Config:
    prompts = {key: task["evaluation"][key] for key in ("validation_prompts", "test_prompts")}
    asked = {key: task["sampling"][key] for key in ("temperatures", "max_new_tokens", "stop")}
    values = {**asked, **prompts, "train_prompts": 0, "n": 1, "seed": _seed(config, task["sampling"])}
    return {**_engine(config), "vllm": targets.vllm(task), **values, **others}


_RECIPES: dict[str, Callable[[Config, Config, str], Config]] = {
    "pretrain": lambda config, task, name: _training(config, task["pretrain"]),
    "summary": lambda config, task, name: {**task["words"], "written": TASKS[task["form"]].written},
    "prepare": lambda config, task, name: {
        **task["lengths"],
        "suffix": TASKS[task["form"]].suffix,
        "style": task["prompt"]["style"],
        "system": task["prompt"]["system"],
        "new_suffix": task["prompt"]["suffix"],
        "evaluation_only": targets.kind(task) == "transfer",
    },
    "reference": lambda config, task, name: _engine(config),
    "reference_labels": lambda config, task, name: _engine(config),
    "by_step": lambda config, task, name: {
        "points": task["by_step"]["points"],
        "sampling": _sampling(
            config, task, validation_prompts=0, temperatures=task["by_step"]["temperatures"], vllm=None
        ),
    },
    "win_rate_by_step": lambda config, task, name: {
        "task": name,
        "runs": targets.stepped(config, name),
        "seeds": config["seeds"],
        "confidence": task["evaluation"]["confidence"],
    },
    "reward_model": lambda config, task, name: _training(config, task["reward_model"]),
    "gold_reward_model": lambda config, task, name: _training(config, task["gold_reward_model"]),
    "sample": lambda config, task, name: _sampling(config, task),
    # At temperature 0 all candidates would be equal; Best-of-N takes the greedy completion there.
    "candidates": lambda config, task, name: _sampling(
        config,
        task,
        n=task["best_of_n"]["n"],
        temperatures=[temperature for temperature in task["sampling"]["temperatures"] if temperature > 0],
    ),
    "score": lambda config, task, name: _engine(config),
    "best_of_n": lambda config, task, name: _engine(config),
    "judge_accuracy": lambda config, task, name: {
        "token_budget": config["compute"]["token_budget"],
        "confidence": task["evaluation"]["confidence"],
    },
    "judge": lambda config, task, name: judge_recipe(config, name, task["judge"]),
    "win_rates": lambda config, task, name: {
        "task": name,
        "confidence": task["evaluation"]["confidence"],
        "seed": config["seeds"][0],
        "seeds": config["seeds"],
        "runs": runs.runs(config, name),
        "methods": {run: runs.method(config, name, run) for run in runs.runs(config, name)},
        "n": runs.choices(config, name),
        "opponents": runs.opponents(config, name),
        "judge": {"kind": task["judge"]["kind"]},
    },
    "subsets": lambda config, task, name: {
        "n": _curve(config, name),
        "subsets": task["best_of_n"]["subsets"],
        "seed": config["seeds"][0],
    },
    "best_of_n_curve": lambda config, task, name: {
        "task": name,
        "n": _curve(config, name),
        "subsets": task["best_of_n"]["subsets"] if targets.judges_subsets(config, name) else None,
        "confidence": task["evaluation"]["confidence"],
        "seed": config["seeds"][0],
    },
    "prefixes": lambda config, task, name: task["lengths"],
    # The preferences are among completions as the policy writes them, at temperature 1.
    "pair_samples": lambda config, task, name: {
        **_engine(config),
        "vllm": None,
        "temperatures": [1.0],
        "stop": [],
        "n": task["pairs"]["completions"],
        "max_new_tokens": task["pairs"]["max_new_tokens"],
        "train_prompts": task["pairs"]["train_prompts"],
        "validation_prompts": task["pairs"]["validation_prompts"],
        "test_prompts": 0,
        "seed": _seed(config, task["pairs"]),
    },
    # Of all pairs none is drawn.
    "sampled_pairs": lambda config, task, name: {
        "pairs": "all",
        "length_penalty": 0.0,
        "missing_eos_reward": None,
        "seed": 0,
    },
    "ceiling_samples": lambda config, task, name: {
        **_engine(config),
        "vllm": targets.vllm(task),
        "temperatures": [1.0],
        "stop": _frontier(task)["stop"],
        "n": _frontier(task)["samples"],
        "max_new_tokens": _frontier(task)["max_new_tokens"],
        "train_prompts": 0,
        "validation_prompts": 0,
        "test_prompts": _frontier(task)["prompts"],
        "seed": _seed(config, _frontier(task)),
    },
    "true_rewards": lambda config, task, name: _true_reward(config, task),
    "classifier": lambda config, task, name: _training(config, task["classifier"]),
    "ngrams": lambda config, task, name: {"max_length": task["lengths"]["max_length"]},
    "optimal_frontier": lambda config, task, name: {
        key: _frontier(task)[key] for key in ("largest_beta", "smallest_beta", "betas", "min_effective_samples")
    },
    "frontier": lambda config, task, name: {"seeds": config["seeds"]},
    "frontier_figure": lambda config, task, name: {
        "task": name,
        "methods": targets.frontiers(config, name),
        "title": task["words"]["title"],
        "written": TASKS[task["form"]].written,
        "true_reward": _true_reward(config, task)["kind"],
    },
    "dominance": lambda config, task, name: {
        "methods": targets.frontiers(config, name),
        "seeds": config["seeds"],
        "confidence": task["evaluation"]["confidence"],
        "bootstrap": _frontier(task)["bootstrap"],
        "seed": config["seeds"][0],
        "at_kl": _frontier(task)["at_kl"],
    },
    "diagnosis": lambda config, task, name: {
        "task": name,
        "runs": targets.measured(config, name),
        "logged": targets.measured_at_once(config, name),
        "seeds": config["seeds"],
        "confidence": task["evaluation"]["confidence"],
        "seed": config["seeds"][0],
        "values": {
            runs.group(config, name, run): objective_values(runs.method(config, name, run))
            for run in targets.measured(config, name)
            if runs.entry(config, name, run).objective
        },
    },
    "training_figure": lambda config, task, name: {"title": task["words"]["title"]},
    "human_study": lambda config, task, name: {
        "task": name,
        "suffix": TASKS[task["form"]].suffix,
        **{key: task["human"][key] for key in _STUDY},
        "simulated": task["human"]["simulated_raters"] is not None,
        "matchups": [{"raters_per_item": 1, **_sides(matchup)} for matchup in targets.matchups(config, name)],
    },
    "simulated_votes": lambda config, task, name: {
        **task["human"]["simulated_raters"],
        "seed": task["human"]["seed"],
    },
    "human_votes": lambda config, task, name: {
        **{key: task["human"][key] for key in ("min_seconds", "failed_checks_allowed")},
        "simulated": task["human"]["simulated_raters"] is not None,
    },
    "examples": lambda config, task, name: {
        "task": name,
        "runs": runs.runs(config, name),
        "count": task["evaluation"]["examples"],
        "seed": config["seeds"][0],
        "max_characters": task["evaluation"]["example_characters"],
        "against": task["words"]["reference"] if task["evaluation"]["against"] else "",
    },
}
