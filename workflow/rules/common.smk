# Helpers of the rules; no rule stands here.
import itertools
import os
import re
from functools import partial
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

from prefopt import resources as repository
from prefopt.runtime.commands import environment, judging_stage, model_stage, option, path_word, quoted, table_stage
from prefopt.store.contents import content_of
from prefopt.experiment.verify import unrecorded

_moved = workflow.modifier.path_modifier


def placed(path):
    """Where a path of the rules lies: below the `prefix:` of a workflow that loads this one as a module, else as it is.

    Snakemake moves inputs, outputs, logs and benchmarks there. What params and commands name goes through here.
    """
    return _moved.replace_prefix(path)


# Folders that are no outputs: where trainers keep their checkpoints, and what belongs to raters.
_folders = {"work": placed("work"), "human": placed("human")}
table_stage = partial(table_stage, folders=_folders)
model_stage = partial(model_stage, folders=_folders)


if workflow.is_main_process and (count := unrecorded(Path(placed("results")))):
    logger.warning(
        f"{count} tables and models in {placed('results')}/ were not made in this folder as far as .snakemake/ knows: "
        "Snakemake sees their times alone. `python -m prefopt verify` says which are not what the config asks for."
    )

# Conda brings a Python of its own; else it is the one that runs Snakemake. Set in the environment and not by a prefix of
# the shell, which would also stand before the rules of a workflow that loads this one as a module.
os.environ.update(
    environment(
        targets.PACKAGE.parent,
        "python" if DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method else sys.executable,
        config,
        os.environ,
    )
)

NOTHING = "(?!)"  # a wildcard's constraint that no text fits
PROMPTS_TABLE = "results/data/{task}/prompts.parquet"
ROUND = "[1-9][0-9]*"

# What a job that runs no model asks for.
TABLE_RESOURCES = {"gpu": 0, "nodes": 1, "mem_mb": 2000, "runtime": 60}
MODEL_THREADS = config["compute"]["threads"]
SHIPPED_BASE = os.path.relpath(repository.SHIPPED_BASE)


def model_needs(stage):
    """Resources of a rule that runs a model, from the model's size and the config; a retry is given more time."""

    def need(key):
        def of_job(wildcards, attempt):
            return needs(config, wildcards.task, stage, getattr(wildcards, "run", None))[key] * (
                attempt if key == "runtime" else 1
            )

        return of_job

    return {**{key: need(key) for key in TABLE_RESOURCES}, **over_nodes(config, stage)}


# Snakemake reruns a job whose params differ from those of the last run. It leaves a params function out that takes
# `input`, `output`, `threads` or `resources`. No function here takes one, so that every param is compared, but for what
# goes through here: where things lie, and values that change no result.
def uncompared(values):
    """Params function whose value a job is given, and whose change reruns nothing."""
    return lambda wildcards, threads: values(wildcards)


def seeded(wildcards):
    """The config with the seed of a job; what is made once for all seeds has the first."""
    return runs.of_seed(config, getattr(wildcards, "seed", ""))


def recipe(stage):
    """Params of a stage: its values from the config as JSON, and those of them that decide its result."""
    return recipe_params(lambda wildcards: stage_recipes.stage_recipe(seeded(wildcards), wildcards.task, stage))


def recipe_params(recipe_of):
    """Params of a stage whose recipe a function of the wildcards gives."""
    return {
        "recipe": uncompared(lambda wildcards: canonical_json(recipe_of(wildcards))),
        "values": lambda wildcards: canonical_json(stage_recipes.compared(recipe_of(wildcards))),
    }


def recipe_of_all(recipe_of):
    """Params function: the values of a stage that reads all tasks, as JSON; all of them decide its result."""
    return lambda wildcards: canonical_json(recipe_of(config))


def made(files):
    """Input function: of what an input function gives by name, that which rules make."""
    return lambda wildcards: {name: path for name, path in files(wildcards).items() if _is_made(path)}


def brought(files):
    """Params function: the content of the rest, which the user brings."""
    return lambda wildcards: content_of({name: path for name, path in files(wildcards).items() if not _is_made(path)})


def arguments_of(files):
    """Params function: all of it as arguments of a stage."""
    return uncompared(
        lambda wildcards: [word for name, path in files(wildcards).items() for word in option(name, _placed(path))]
    )


def _is_made(path):
    return not isinstance(path, str) or path.startswith("results/")


def _placed(path):
    """What a rule makes, or the paths of several, where they lie; what the user brings is found in the working folder."""
    if not _is_made(path):
        return path
    return placed(path) if isinstance(path, str) else [placed(one) for one in path]


def record_files(wildcards):
    """The user's own files by kind and number, where the records come from files."""
    data = config["tasks"][wildcards.task]["data"]
    if data["source"] == "records":
        return {f"records_{i}": one["path"] for i, one in enumerate(data["records"]) if one["path"]}
    if data["source"] != "files":
        return {}
    return {f"{key}_{i}": path for key in tasks.RECORD_FILES for i, path in enumerate(data.get(key, []))}


def records_params():
    """Params of a rule that makes a raw table."""
    of_table = lambda wildcards: stage_recipes.records_recipe(config, wildcards.task, wildcards.table)
    return {**recipe_params(of_table), "content": brought(record_files)}


def prepared_tables(wildcards):
    """The tokenized tables of a task; a transfer task has no pairs, and single labels are there where a run asks for them."""
    names = ["demonstrations", "prompts"]
    names += (
        ["preferences", "gold_preferences"] if targets.kind(config["tasks"][wildcards.task]) == "comparison" else []
    )
    names += ["labels"] if targets.learns_labels(config, wildcards.task) else []
    return [f"results/data/{wildcards.task}/{name}.parquet" for name in names]


def scored_prompts(wildcards):
    """The prompts of the completions that have a true reward: of training, or of the ceiling."""
    side = {"pairs": "training/", "ceiling": ""}[wildcards.purpose]
    return f"results/data/{wildcards.task}/{side}prompts.parquet"


def started_from(wildcards):
    """The model that a run's trainer starts from."""
    return runs.entry(config, wildcards.task, wildcards.run).starts_from


def policy(wildcards):
    """The model of a run."""
    return wildcards.run


def policy_of_round(wildcards):
    """The policy that a round of a run samples and trains: the one before it, or what the run starts from."""
    return runs.round_name(wildcards.run, int(wildcards.round) - 1)


def reference_of_round(wildcards):
    """The reference policy of a round's training."""
    moving = runs.values(config, wildcards.task, wildcards.run)["reference"] == "moving"
    return policy_of_round(wildcards) if moving else "reference"


def recipe_of_round(stage):
    """Params of a stage of a round, see `recipe`."""
    return recipe_params(
        lambda wildcards: stage_recipes.round_recipe(
            seeded(wildcards), wildcards.task, wildcards.run, stage, int(wildcards.round)
        )
    )


def runs_in_rounds(labels=None):
    """Function of a task: its runs that are trained in rounds, all or those with such labels."""
    return lambda task: [
        run
        for run in dict.fromkeys(run for run, _ in targets.rounds(config, task))
        if labels in (None, runs.values(config, task, run)["labels"])
    ]


runs_labelled_by_a_judge = runs_in_rounds("judge")


def runs_labelled_by_a_score(task):
    """The others of these runs."""
    return [run for run in runs_in_rounds()(task) if run not in runs_labelled_by_a_judge(task)]


def training_files(wildcards):
    """What a run's trainer reads beside it."""
    return targets.training_files(config, wildcards.task, wildcards.run, wildcards.seed)


def training_params(files):
    """Params of a rule that trains a run, but for its model and code.

    Args:
        files: function of what its trainer reads beside the model.
    """
    return {
        **recipe_params(
            lambda wildcards: stage_recipes.training_recipe(seeded(wildcards), wildcards.task, wildcards.run)
        ),
        "stage": lambda wildcards: runs.entry(config, wildcards.task, wildcards.run).trainer,
        "files": arguments_of(files),
        "files_content": brought(files),
    }


def model_folder(name):
    """Function of the wildcards: the folder of a task's model, made here or brought by the user.

    The name is given, or a function of the wildcards too.
    """
    return lambda wildcards: targets.model_folder(
        config,
        wildcards.task,
        name(wildcards) if callable(name) else name,
        SHIPPED_BASE,
        getattr(wildcards, "seed", ""),
    )


def model_files(name):
    """Input function: a model that a rule makes."""
    return lambda wildcards: [folder for folder in [model_folder(name)(wildcards)] if _is_made(folder)]


def model(name, key="model"):
    """Params of reading a model: its folder, and the content of one that the user brings."""
    folder = model_folder(name)
    given = uncompared(lambda wildcards: path_word(_placed(folder(wildcards))))
    return {key: given, f"{key}_content": brought(lambda wildcards: {key: folder(wildcards)})}


def revision_argument(wildcards):
    """Params function: a pinned commit of a fetched model as an argument; none where it is not pinned."""
    revision = config["tasks"][wildcards.task][wildcards.part]["revision"]
    return ["--revision", revision] if revision else []


def of_every_run(kind, first=False):
    """Input function: a table of each of the task's runs, for each seed or the first alone."""
    return lambda wildcards: [
        f"results/{seed}{kind}/{wildcards.task}/{run}.parquet"
        for seed in list(runs.seeds(config))[: 1 if first else None]
        for run in runs.runs(config, wildcards.task)
    ]


def of_stepped_runs(kind):
    """Input function: a table of each run that is sampled while it trains, for each seed."""
    return lambda wildcards: [
        f"results/{seed}{kind}/{wildcards.task}/{run}_by_step.parquet"
        for seed in runs.seeds(config)
        for run in targets.stepped(config, wildcards.task)
    ]


def judge_of(wildcards):
    """The judge that a rule's wildcard `judge` names, else the task's own."""
    return targets.judge_section(config, wildcards.task, getattr(wildcards, "judge", "main"))


def judge_files(wildcards):
    """What a job's judge is made from."""
    judge = judge_of(wildcards)
    home = runs.home(config, wildcards.task)
    if judge["kind"] == "reward_model":
        model = targets.model_folder(config, home, "gold_reward_model", SHIPPED_BASE)
        return {"gold_model": model, "gold_accuracy": f"results/judges/{home}.parquet"}
    if judge["kind"] in ("chat", "recorded"):
        return {"template": os.path.relpath(targets.judge_prompt(judge))}
    if judge["kind"] == "human":
        return {"votes": f"results/human/{wildcards.task}/votes.parquet"}
    return {}


def served_files(wildcards):
    """The model of a local judge, whose path the recipe holds."""
    judge = judge_of(wildcards)
    return {"served": judge["chat"]["serve"]["model"]} if targets.is_served(judge) else {}


def against_files(wildcards):
    """The samples that completions are held against; nothing where that is the reference texts."""
    against = config["tasks"][wildcards.task]["evaluation"]["against"]
    if against is None:
        return {}
    return {"against": f"results/{wildcards.seed}samples/{wildcards.task}/{against['run']}.parquet"}


def against_arguments(wildcards):
    """Params function: these as arguments of a stage."""
    against = config["tasks"][wildcards.task]["evaluation"]["against"]
    files = against_files(wildcards)
    return ["--against", placed(files["against"]), "--against-temperature", against["temperature"]] if files else []


def judge_needs(stage):
    """Resources of judging, those of a model where the judge is one; any other reads tables, or waits for an endpoint."""
    of_model = model_needs(stage)

    def need(key):
        def of_job(wildcards, attempt):
            judge = judge_of(wildcards)
            if judge["kind"] == "reward_model":
                return of_model[key](wildcards, attempt)
            served = of_served(judge["chat"]["serve"]) if targets.is_served(judge) else {}
            return {**TABLE_RESOURCES, **served, "runtime": 240 * attempt}[key]

        return of_job

    return {key: need(key) for key in TABLE_RESOURCES}


def judge_params(module):
    """Params of a rule that judges by a stage's module."""
    return {
        "code": lambda wildcards: fingerprint(module, apart=targets.other_judges(judge_of(wildcards))),
        "judge": arguments_of(judge_files),
        "judge_content": brought(lambda wildcards: {**judge_files(wildcards), **served_files(wildcards)}),
        # The GPUs of a local judge are the server's, which its first job starts, and not that job's.
        "lease": uncompared(lambda wildcards: ["--no-lease"] if targets.is_served(judge_of(wildcards)) else []),
        **recipe_params(lambda wildcards: stage_recipes.judge_recipe(config, wildcards.task, judge_of(wildcards))),
    }


def compared_samples(wildcards):
    """Samples of the runs that people compare."""
    sides = [matchup[side] for matchup in targets.matchups(config, wildcards.task) for side in ("first", "second")]
    compared = dict.fromkeys(side["run"] for side in sides if side["run"] != targets.REFERENCE)
    return [f"results/samples/{wildcards.task}/{run}.parquet" for run in compared]


def exported_votes(wildcards):
    """What raters have sent back, or what simulated ones would."""
    if config["tasks"][wildcards.task]["human"]["simulated_raters"]:
        return f"results/human/{wildcards.task}/simulated_votes"
    return targets.exported_votes(wildcards.task)


def compute_files(wildcards):
    """What every stage that runs a model recorded of itself."""
    return targets.compute_files(config)


def human_table(wildcards):
    """What people and judges say of the same pairs, where people or simulated raters have voted."""
    return {"human": "results/human_agreement.csv"} if targets.study_tables(config) else {}


def subset_files(wildcards):
    """The candidates that are judged, the best of seeded subsets; nothing where it is free and all are judged."""
    if not targets.judges_subsets(config, wildcards.task):
        return {}
    return {"judged": f"results/{wildcards.seed}candidates/{wildcards.task}_subsets.parquet"}


def judged_candidates(wildcards):
    """The candidates that are judged."""
    return subset_files(wildcards).get("judged", f"results/{wildcards.seed}candidates/{wildcards.task}.parquet")


def one_sample_files(wildcards):
    """Samples and verdicts of the first run of DPO, whose worth the best of N is compared with; nothing without one."""
    every = runs.runs(config, wildcards.task)
    run = next((run for run in every if runs.method(config, wildcards.task, run) == "dpo"), None)
    if run is None:
        return {}
    return {
        "one_sample": f"results/{wildcards.seed}samples/{wildcards.task}/{run}.parquet",
        "one_sample_verdicts": f"results/{wildcards.seed}verdicts/{wildcards.task}/{run}.parquet",
    }


def curves_of_tasks(wildcards):
    """The Best-of-N curves of each task that has candidates, one for each seed."""
    return [
        f"results/{seed}candidates/{task}_curve.csv"
        for task in config["tasks"]
        if targets.has_candidates(config, task)
        for seed in runs.seeds(config)
    ]


def summaries_of_curves(wildcards):
    """The summary of the data of each of these tasks."""
    return [f"results/data/{task}/summary.json" for task in config["tasks"] if targets.has_candidates(config, task)]


def true_reward_files(wildcards):
    """The model that is the true reward of a task with a frontier; nothing where a program is."""
    section = config["tasks"][wildcards.task]
    if "true_reward" not in section:
        learned = targets.model_folder(config, wildcards.task, "gold_reward_model", SHIPPED_BASE)
        return {"true_reward_model": learned} if section["frontier"]["reward"] == "gold_reward_model" else {}
    if section["true_reward"]["source"] == "rule":
        return {}
    return {"true_reward_model": targets.model_folder(config, wildcards.task, "true_reward", SHIPPED_BASE)}


def swept_files(wildcards):
    """What a run of a sweep reads beside its model: what it learns from, and the true reward."""
    return {**training_files(wildcards), **true_reward_files(wildcards)}


def evaluation_files(wildcards):
    """The rewards of what a run wrote while it trained: the true one, and the learned one where the task has it."""
    learned = {"reward_model": model_folder("reward_model")(wildcards)}
    return {
        **(learned if targets.learns_reward(config, wildcards.task) else {}),
        **true_reward_files(wildcards),
    }


def optimized_files(wildcards):
    """What the stage `overoptimization` reads: evaluations of all tasks, and candidates with both their rewards."""
    candidates = [f"results/{seed}candidates/{task}" for task, seed in targets.rewarded_candidates(config)]
    files = {
        "evaluations": [
            f"results/{seed}frontier/{task}/{run}.parquet" for task, seed, run in targets.optimized(config)
        ],
        "summaries": [f"results/data/{task}/summary.json" for task in targets.optimized_tasks(config)],
        "candidates": [f"{start}.parquet" for start in candidates],
        "scores": [f"{start}_scores.parquet" for start in candidates],
        "true": [f"{start}_true_rewards.parquet" for start in candidates],
    }
    return {name: paths for name, paths in files.items() if paths}


def runs_of_sweep(wildcards):
    """The evaluations of each run of a frontier, for each seed."""
    return [
        f"results/{seed}frontier/{wildcards.task}/{run}.parquet"
        for seed in runs.seeds(config)
        for run in targets.measured(config, wildcards.task)
    ]


def ceiling_scores(wildcards):
    """The true rewards of the reference policy's samples, for each seed."""
    return [f"results/{seed}ceiling/{wildcards.task}_scores.parquet" for seed in runs.seeds(config)]


def learned_table(name):
    """Input function: a task's pairs or labels."""
    return lambda wildcards: targets.learned_table(config, wildcards.task, name, wildcards.seed)


def by_step(kind, table):
    """Params of a trainer that looks at its policy while it trains.

    Args:
        kind: of the table that is made, an argument of trainers.
        table: its path.
    """

    def recipe_of(wildcards):
        if kind == "evaluations":
            return stage_recipes.evaluated_recipe(seeded(wildcards), wildcards.task, wildcards.run)
        return stage_recipes.stage_recipe(seeded(wildcards), wildcards.task, "by_step")

    def arguments(wildcards):
        of_job = {"seed": wildcards.seed, "task": wildcards.task, "run": wildcards.run}
        prompts, made = (placed(path.format(**of_job)) for path in (PROMPTS_TABLE, table))
        values = canonical_json(recipe_of(wildcards))
        return ["--by-step", values, "--run", wildcards.run, "--sampled-prompts", prompts, f"--{kind}", made]

    return {
        "by_step": uncompared(arguments),
        "by_step_values": lambda wildcards: canonical_json(stage_recipes.compared(recipe_of(wildcards))),
    }


def one_of(names):
    """A wildcard's constraint; one that nothing fits where there is no name."""
    return "|".join(re.escape(name) for name in names) or NOTHING


def tasks_with_reward(source):
    """The sweeps whose true reward comes from there."""
    sweeps = targets.tasks_of(config, "frontier")
    return [task for task in sweeps if config["tasks"][task]["true_reward"]["source"] == source]


def with_runs(of_task, suffix=""):
    """A constraint of the wildcard `task`: the tasks for which a function gives runs, and behind them these runs alone.

    A run's name may stand for one method in one task and for another in another.
    """
    found = {task: list(of_task(task)) for task in config["tasks"]}
    ending = rf"({suffix})?(\.parquet|\.jsonl|/|$)"
    return "|".join(rf"{task}(?=/({one_of(names)}){ending})" for task, names in found.items() if names) or NOTHING


def trained_at_once():
    """The methods of which a rule trains a run; what is trained in rounds has rules of its own."""
    return [name for name in methods.trained() if not methods.METHODS[name].rounds]


def trained_runs(method, sampled):
    """Function of a task: its runs of a method that are trained here, those that are sampled meanwhile or the others."""
    return lambda task: [
        run
        for run in targets.trained(config, task)
        if runs.method(config, task, run) == method and (run in targets.stepped(config, task)) == sampled
    ]


def swept_runs(task):
    """The runs of a sweep that are evaluated while they train."""
    return targets.measured_at_once(config, task) if task in targets.tasks_of(config, "frontier") else []


def swept_in_rounds(task):
    """The runs of a sweep that are evaluated at the end of each round."""
    return runs_in_rounds()(task) if task in targets.tasks_of(config, "frontier") else []


def models_of_rounds(wildcards):
    """The policies with which the rounds of a run end."""
    return [
        f"{targets.round_folder(wildcards.task, run, number, wildcards.seed)}/model"
        for run, number in targets.rounds(config, wildcards.task)
        if run == wildcards.run
    ]


def sampled_runs(task):
    """Runs whose samples are a policy's own, the reference policy among them."""
    return [run for run in runs.known(config, task) if "candidates" not in runs.entry(config, task, run).needs]


# Tables below results/ that are made in shards where a scatter process has several, by that process.
SCATTERED = {
    "sampling": rf"{runs.SEED}(samples/({with_runs(sampled_runs)})/{runs.NAME}|candidates/[a-z]+|(pairs|ceiling)/[a-z]+_samples|rounds/[a-z0-9_]+/{runs.NAME}/{ROUND}/samples)",
    "scoring": rf"{runs.SEED}((candidates|pairs|ceiling)/[a-z]+_scores|rewards/[a-z0-9_]+/{runs.NAME}|rounds/({with_runs(runs_labelled_by_a_score)})/{runs.NAME}/{ROUND}/scores)",
    "judging": rf"{runs.SEED}(verdicts/[a-z]+/([a-z0-9_]+/)?{runs.NAME}|candidates/[a-z]+_verdicts|rounds/({with_runs(runs_labelled_by_a_judge)})/{runs.NAME}/{ROUND}/scores)",
}


def shard_count(process):
    """How many shards a scatter process has."""
    return len(getattr(scatter, process)("{scatteritem}"))


def shard_table(process, table):
    """The output of a job that makes a table, or a shard of it, which is deleted once all are gathered.

    What was sampled before is left until it is replaced: a stage keeps the rows of temperatures that stay.
    """
    if shard_count(process) == 1:
        return update(table) if process == "sampling" else table
    return temp(of_shard(process, table.replace("results/", "results/shards/", 1)))


def of_shard(process, path):
    """A path of each shard, the path itself where the work is not cut."""
    folder, ending = path.rsplit(".", 1)
    return path if shard_count(process) == 1 else f"{folder}/{{scatteritem}}.{ending}"


def shard_argument(wildcards):
    """Params function: the shard that a job makes as an argument; none where the work is not cut."""
    return ["--shard", wildcards.scatteritem] if hasattr(wildcards, "scatteritem") else []


def shards_of_table(wildcards):
    """All shards of a table."""
    process = next(name for name, pattern in SCATTERED.items() if re.fullmatch(pattern, wildcards.table))
    return getattr(gather, process)(f"results/shards/{wildcards.table}/{{scatteritem}}.parquet")
