# Helpers of the rules; no rule stands here.
import os
import shlex
from pathlib import Path

from snakemake.settings.types import DeploymentMethod


def stage_environment():
    """Shell commands before every stage: the package, and the Python that runs Snakemake unless conda brings one."""
    path = shlex.quote(str(Path(workflow.basedir) / "workflow"))
    commands = f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}; "
    if DeploymentMethod.CONDA not in workflow.deployment_settings.deployment_method:
        commands += f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    # Snakemake formats the prefix.
    return commands.replace("{", "{{").replace("}", "}}")


shell.prefix(stage_environment())

# What a job that runs a model asks for; one that does not takes little of anything.
MODEL_RESOURCES = {
    "gpu": config["compute"]["gpus"],
    "mem_mb": config["compute"]["mem_mb"],
    "runtime": config["compute"]["runtime"],
}
TABLE_RESOURCES = {"gpu": 0, "mem_mb": 2000, "runtime": 60}
MODEL_THREADS = config["compute"]["threads"]


def recipe(stage):
    """Params function: the stage's values from the config as JSON, so that another stage's change reruns nothing."""
    return lambda wildcards: recipe_json(config, wildcards.task, stage)


def record_files(wildcards):
    """The user's own files, where the records come from files."""
    data = config["tasks"][wildcards.task]["data"]
    if data["source"] != "files":
        return []
    return [path for key in ("posts", "comparisons", "demonstrations", "preferences") for path in data[key]]


def model_folder(name):
    """Params function: the folder of a task's model, made by a rule or brought by the user."""
    return lambda wildcards: _model_folder(wildcards.task, name)


def model_files(name):
    """Input function: a model that a rule makes as its folder, any other as its files, whose changes are seen."""

    def files(wildcards):
        folder = _model_folder(wildcards.task, name)
        if folder.startswith("results/"):
            return folder
        kinds = {".json", ".safetensors", ".model", ".txt"}
        found = sorted(str(path) for path in Path(folder).glob("*") if path.suffix in kinds)
        return found or f"{folder}/config.json"

    return files


def _model_folder(task, name):
    if name in ("base", "sft"):
        section = config["tasks"][task][name]
        if section["source"] == "shipped":
            # Relative, so that a moved checkout does not look like another model.
            return os.path.relpath(f"{workflow.basedir}/workflow/models/{task}_base")
        if section["source"] == "path":
            return section["path"]
        if section["source"] == "hub":
            return f"results/models/{task}/fetched_{name}"
    return f"results/models/{task}/{name}"


def revision_argument(wildcards):
    """Params function: a pinned commit of a fetched model as an argument; none where it is not pinned."""
    revision = config["tasks"][wildcards.task][wildcards.part]["revision"]
    return ["--revision", revision] if revision else []


def trainers(task):
    """Names of the task's models that this workflow trains, in the order of the paper."""
    section = config["tasks"][task]
    methods = section["methods"]
    rewarded = any(method == "ppo" or method.startswith("best_of_") for method in methods)
    trained = {
        "base": section["base"]["source"] == "scratch",
        "sft": section["sft"]["source"] == "train",
        "preferred_ft": "preferred_ft" in methods,
        "dpo": "dpo" in methods,
        "reward_model": rewarded,
        "ppo": "ppo" in methods,
        "gold_reward_model": section["judge"]["kind"] == "reward_model",
    }
    return [name for name, wanted in trained.items() if wanted]


def metrics_of_trainers(wildcards):
    """Metrics of each trainer of the task."""
    names = ["pretrain" if name == "base" else name for name in trainers(wildcards.task)]
    return [f"results/training/{wildcards.task}/{name}.jsonl" for name in names]


def of_every_method(kind):
    """Input function: a table of each of the task's methods."""
    return lambda wildcards: [
        f"results/{kind}/{wildcards.task}/{method}.parquet" for method in config["tasks"][wildcards.task]["methods"]
    ]


def gold_files(wildcards):
    """What the judge `reward_model` is and was trained on; nothing for any other judge."""
    if config["tasks"][wildcards.task]["judge"]["kind"] != "reward_model":
        return {}
    return {
        "gold_model": f"results/models/{wildcards.task}/gold_reward_model",
        "gold_data": f"results/data/{wildcards.task}/gold_preferences.parquet",
    }


def gold_arguments(wildcards, input):
    """The same as arguments of the stage `judge`."""
    return " ".join(f"--{key.replace('_', '-')} {input[key]}" for key in gold_files(wildcards))


def one_sample_files(wildcards):
    """DPO's samples and verdicts, whose worth the best of N is compared with; nothing where there is no DPO."""
    if "dpo" not in config["tasks"][wildcards.task]["methods"]:
        return {}
    return {
        "one_sample": f"results/samples/{wildcards.task}/dpo.parquet",
        "one_sample_verdicts": f"results/verdicts/{wildcards.task}/dpo.parquet",
    }


def one_sample_arguments(wildcards, input):
    """The same as arguments of the stage `best_of_n_curve`."""
    return " ".join(f"--{key.replace('_', '-')} {input[key]}" for key in one_sample_files(wildcards))


def tasks_with_candidates():
    """Tasks of which some method is Best-of-N."""
    return [
        task for task, section in config["tasks"].items() if any(m.startswith("best_of_") for m in section["methods"])
    ]


def curves_of_tasks(wildcards):
    """The Best-of-N curve of each task that has one."""
    return [f"results/candidates/{task}_curve.csv" for task in tasks_with_candidates()]


def results_of_all_tasks():
    """Tables and figures of every task, and all that they are made of: a deleted model or table is made again."""
    files = [f"results/best_of_n.{ending}" for ending in ("csv", "svg", "png")] if tasks_with_candidates() else []
    for task, section in config["tasks"].items():
        files += [f"results/{task}_winrates.{ending}" for ending in ("csv", "manifest.json", "svg", "png")]
        files += [f"results/{task}_comparisons.csv", f"results/{task}_examples.md"]
        files += [f"results/{task}_training.svg"] if trainers(task) else []
        files += [f"results/models/{task}/{name}" for name in trainers(task)]
        files += [
            f"results/{kind}/{task}/{name}.parquet" for kind in ("samples", "verdicts") for name in section["methods"]
        ]
    return files
