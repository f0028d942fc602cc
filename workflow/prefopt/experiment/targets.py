"""What a config asks for: the kind of each task, its models and where they lie, and the files of a whole run.

The Snakefile's input functions read it; like `prefopt.experiment.config` it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from prefopt.experiment.methods import of_group
from prefopt.experiment.runs import (
    choices,
    entry,
    group,
    home,
    in_rounds,
    is_brought,
    known,
    method,
    needs,
    policies,
    reference,
    round_name,
    round_of,
    runs,
    seeds,
    values,
)
from prefopt.experiment.tasks import MIXTURE, TASKS
from prefopt.resources import PROMPTS

Config = dict[str, Any]

REFERENCE = "reference"  # a side of a matchup: the reference text of the prompt
PACKAGE = Path(__file__).parents[1]

# Models that are made once for all seeds.
_PARTS = ("base", "true_reward", "reward_model", "gold_reward_model")  # whose sections say where they come from
# Sources of a sweep's true reward that are no model.
_LEARNED = ("classifier", "ngrams")  # from the task's labelled reviews
PROGRAMS = ("rule", "ngrams")
SAMPLED = ("sample", "candidates", "round_samples", "ceiling_samples")  # stages that vLLM may sample
_ONCE = ("base", "gold_reward_model", "classifier")

# Tables of the reference policy's log-probabilities, as methods need them, and the names of their files.
REFERENCE_TABLES = {"reference_logprobs": "reference", "reference_label_logprobs": "reference_labels"}
# What looks at a policy while it trains: what samples it, and what evaluates a run of a sweep.
_SAMPLED, _EVALUATED = "prefopt.training.by_step:_sampled", "prefopt.training.by_step:_evaluated"
BY_STEP = frozenset({_SAMPLED, _EVALUATED})
# What only PPO against the true reward learns from.
_TRUE_REWARD = "prefopt.training.ppo:_rewarded_by"
# What makes the judge of each kind.
_JUDGES = {
    "oracle": "prefopt.judging.oracle:OracleJudge",
    "reward_model": "prefopt.judging.reward_model:load_judge",
    "human": "prefopt.judging.people:load_votes",
    "chat": "prefopt.judging.judges:_chat_judge",
    "recorded": "prefopt.judging.judges:_chat_judge",
}


def other_readers(config: Config, task: str) -> frozenset[str]:
    """Code of the stage `records` that reads other tasks' records, or this task's from another source."""
    section = config["tasks"][task]
    source = section["data"]["source"]
    own = MIXTURE if source == "records" else TASKS[section["form"]].readers[source != "embedded"]
    return frozenset([MIXTURE, *(reader for one in TASKS.values() for reader in one.readers)]) - {own}


def other_judges(judge: Config) -> frozenset[str]:
    """Code of judging stages that makes judges of other kinds."""
    return frozenset(_JUDGES.values()) - {_JUDGES[judge["kind"]]}


def kind(section: Config) -> Literal["comparison", "transfer", "frontier"]:
    """What is asked of a task: win rates of its runs, win rates of another task's models, or reward against KL."""
    if "ceiling" in section:
        return "frontier"
    return "transfer" if "models_of" in section else "comparison"


def measures_frontier(section: Config) -> bool:
    """Whether reward against KL is measured: of a sweep, and where `frontier` asks for it."""
    return kind(section) == "frontier" or "frontier" in section


def measured(config: Config, task: str) -> list[str]:
    """The runs of a task's frontier: all of a sweep; else those that are sampled by steps or rounds from the reference on."""
    if kind(config["tasks"][task]) == "frontier":
        return runs(config, task)
    if "frontier" not in config["tasks"][task]:
        return []
    from_reference = (run for run in stepped(config, task) if entry(config, task, run).starts_from == "reference")
    sampled = {*from_reference, *sampled_rounds(config, task)}
    return [run for run in runs(config, task) if run in sampled]


def frontiers(config: Config, task: str) -> list[str]:
    """What a task's frontiers are of (see `runs.group`), in the order in which they are compared."""
    found = dict.fromkeys(group(config, task, run) for run in measured(config, task))
    return sorted(found, key=lambda name: of_group(name).swept)


def measured_metrics(config: Config, task: str) -> list[str]:
    """The metrics file of the training of each of these runs that is trained at once, for each seed."""
    return [
        f"results/{seed}training/{task}/{run}.jsonl" for seed in seeds(config) for run in measured_at_once(config, task)
    ]


def measured_at_once(config: Config, task: str) -> list[str]:
    """The measured runs of a task that are evaluated while they train; any other is at the end of each of its rounds."""
    return [run for run in measured(config, task) if run not in in_rounds(config, task)]


def rewarded(config: Config, task: str) -> list[str]:
    """The runs whose samples the frontier's reward is told of, of a task with win rates."""
    section = config["tasks"][task]
    return runs(config, task) if kind(section) == "comparison" and measures_frontier(section) else []


def tasks_of(config: Config, *kinds: str) -> list[str]:
    """Names of the tasks of these kinds, in the config's order."""
    return [task for task, section in config["tasks"].items() if kind(section) in kinds]


def model_folder(config: Config, task: str, name: str, shipped: str, seed: str = "") -> str:
    """Folder of a task's model, made by a rule or brought by the user.

    Args:
        config: a resolved config.
        task: key of `tasks`.
        name: base, reference, a run, a round of one (`runs.round_name`), reward_model, gold_reward_model or true_reward.
        shipped: folder of the base model that the repository holds.
        seed: folder of the seed, see `runs.seeds`.
    """
    task = home(config, task)
    section = config["tasks"][task]
    if name == "reference":
        name = reference(config, task)
    if name in section["runs"] and entry(config, task, name).trainer is None:
        name = entry(config, task, name).starts_from
    if name in in_rounds(config, task):
        name = round_name(name, in_rounds(config, task)[name])
    if of_round := round_of(name):
        run, number = of_round
        if number:
            return f"{round_folder(task, run, number, seed)}/model"
        name = values(config, task, run)["start"] or reference(config, task)
    if name == "true_reward" and section["true_reward"]["source"] == "classifier":
        return f"results/models/{task}/classifier"
    if name == "true_reward" and section["true_reward"]["source"] == "ngrams":
        return f"results/data/{task}/ngrams.parquet"
    sources = {part: section.get(part) for part in _PARTS}
    if name not in sources and (name == reference(config, task) or name in section["runs"]):
        sources[name] = values(config, task, name)
    source = sources.get(name) or {}
    if source.get("source") == "shipped":
        return shipped
    if source.get("source") == "path":
        folder: str = source["path"]
        return folder
    if source.get("source") == "hub":
        return f"results/models/{task}/fetched_{name if name in _PARTS else 'sft'}"
    return f"results/{'' if name in _ONCE else seed}models/{task}/{name}"


def round_folder(task: str, run: str, number: int | str, seed: str) -> str:
    """The folder of a round: its tables, and the model that it ends with."""
    return f"results/{seed}rounds/{task}/{run}/{number}"


def rounds(config: Config, task: str) -> list[tuple[str, int]]:
    """Run and number of every round of a task's runs that are trained so."""
    if kind(config["tasks"][task]) == "transfer":
        return []
    return [(run, number) for run, count in in_rounds(config, task).items() for number in range(1, count + 1)]


def round_files(config: Config, task: str) -> list[str]:
    """What a task's rounds make and keep, for each seed: tables that took a model, pairs, and a model each."""
    tables = [f"{name}.parquet" for name in ("samples", "scores", "preferences", "reference")]
    return [
        f"{round_folder(task, run, number, seed)}/{name}"
        for seed in seeds(config)
        for run, number in rounds(config, task)
        for name in (*tables, "model")
    ]


def trained(config: Config, task: str) -> list[str]:
    """The runs whose models this workflow trains at once; those of a sweep leave evaluations, and only its reference a model.

    What is trained in rounds has a model for each of them: see `rounds`.
    """
    by_kind = {"comparison": known(config, task), "frontier": [reference(config, task)], "transfer": []}
    own = by_kind[kind(config["tasks"][task])]
    at_once = (run for run in own if not entry(config, task, run).rounds)
    return [run for run in at_once if entry(config, task, run).trainer and not is_brought(config, task, run)]


def trainers(config: Config, task: str) -> list[str]:
    """Names of the models that this workflow trains for a task; none comes before one that it is made from."""
    section = config["tasks"][task]
    if kind(section) == "transfer":
        return []
    own = trained(config, task)
    rewarded = [name for name in own if "reward_model" in needs(config, task, name)]
    return [
        *(["base"] if section["base"]["source"] == "scratch" else []),
        *(name for name in own if name not in rewarded),
        *(["reward_model"] if learns_reward(config, task) and section["reward_model"]["source"] == "train" else []),
        *rewarded,
        *(["gold_reward_model"] if learns_gold(section) and section["gold_reward_model"]["source"] == "train" else []),
        *(["classifier"] if section.get("true_reward", {}).get("source") == "classifier" else []),
    ]


def learned_table(config: Config, task: str, name: str, seed: str) -> str:
    """A task's pairs or labels; a sweep's are its reference policy's completions, others for each seed."""
    return f"results/{seed if kind(config['tasks'][task]) == 'frontier' else ''}data/{task}/{name}.parquet"


def training_files(config: Config, task: str, run: str, seed: str) -> dict[str, str]:
    """What a run's trainer reads beside the model that it starts from, by the argument of its stage."""
    data, one = f"results/data/{task}", entry(config, task, run)
    if one.trainer == "ppo":
        files = {"prompts": f"{data}/training/prompts.parquet"}
    elif dict(one.values).get("completion") == "response":
        files = {"data": f"{data}/training/demonstrations.parquet"}
    else:
        files = {"data": learned_table(config, task, "labels" if one.trainer == "kto" else "preferences", seed)}
    for name in REFERENCE_TABLES:
        if name in one.needs:
            files["reference"] = f"results/{seed}logprobs/{task}/{REFERENCE_TABLES[name]}.parquet"
    if "reward_model" in one.needs:
        files["reward_model"] = model_folder(config, task, "reward_model", "", seed)
    return files


def trainer_code(config: Config, task: str, run: str) -> tuple[Any, ...]:
    """Arguments of `fingerprint` for a run's trainer, which looks at its policy and is rewarded as that run asks alone."""
    one = entry(config, task, run)
    swept = kind(config["tasks"][task]) == "frontier" and run != reference(config, task)
    apart = BY_STEP - ({_EVALUATED} if swept else {_SAMPLED} if run in stepped(config, task) else set())
    learned = {_TRUE_REWARD} if "reward_model" in one.needs else set()
    return f"prefopt.training.{one.trainer}", PACKAGE, apart | learned


def judge_kinds(section: Config) -> set[str]:
    """Kinds of all the judges of a task; a sweep has none."""
    own = [section["judge"]] if "judge" in section else []
    return {judge["kind"] for judge in [*own, *section.get("other_judges", {}).values()]}


def learns_reward(config: Config, task: str) -> bool:
    """Whether some run of a task needs its reward model."""
    return any("reward_model" in needs(config, task, run) for run in runs(config, task))


def learns_gold(section: Config) -> bool:
    """Whether a task needs the gold reward model: as a judge, or as the reward of its frontier."""
    return "reward_model" in judge_kinds(section) or section.get("frontier", {}).get("reward") == "gold_reward_model"


def vllm(section: Config) -> Config | None:
    """What vLLM may use, where it samples a task's policies; a sweep samples by the engine here."""
    sampling = section.get("sampling", {"engine": "builtin"})
    return sampling["vllm"] if sampling["engine"] == "vllm" else None


def sampler(section: Config, stage: str) -> Config | None:
    """The same where it samples what a stage draws."""
    return vllm(section) if stage in SAMPLED else None


def is_served(judge: Config) -> bool:
    """Whether the jobs of a judge start it themselves (see `judging.serving`)."""
    return judge["kind"] == "chat" and "serve" in judge["chat"]


def judge_prompt(judge: Config) -> Path:
    """The file of a chat judge's prompt: one that the repository holds, or the user's own."""
    name: str = judge["chat"]["prompt"]
    return Path(name) if name.endswith(".txt") else PROMPTS / f"{name}.txt"


def judge_section(config: Config, task: str, judge: str) -> Config:
    """A task's judge: "main" is the one of its tables, any other name is a key of `other_judges`."""
    section: Config = config["tasks"][task]
    found: Config = section["judge"] if judge == "main" else section["other_judges"][judge]
    return found


def tasks_with_judges(config: Config) -> list[str]:
    """Tasks that have more judges than one."""
    return [task for task in tasks_of(config, "comparison", "transfer") if config["tasks"][task]["other_judges"]]


def verdict_tables(config: Config) -> list[tuple[str, str, str, str]]:
    """Task, judge, seed and path of every verdict table of tasks that have more judges than one."""
    return [
        (task, judge, seed, f"results/{seed}verdicts/{task}/{'' if judge == 'main' else judge + '/'}{run}.parquet")
        for seed in seeds(config)
        for task in tasks_with_judges(config)
        for judge in ("main", *config["tasks"][task]["other_judges"])
        for run in runs(config, task)
    ]


def matchups(config: Config, task: str) -> list[Config]:
    """Whom people compare; a matchup of a run or temperature that is not sampled is left out."""
    section = config["tasks"][task]

    def sampled(side: Config) -> bool:
        if side["run"] == REFERENCE:
            return True
        return side["run"] in section["runs"] and side["temperature"] in section["sampling"]["temperatures"]

    every = section["human"]["matchups"] if "human" in section else []
    return [matchup for matchup in every if sampled(matchup["first"]) and sampled(matchup["second"])]


def studies(config: Config) -> list[str]:
    """Tasks that have a study with people."""
    return [task for task in tasks_of(config, "comparison", "transfer") if matchups(config, task)]


def exported_votes(task: str) -> list[str]:
    """What raters of a task have sent back, in the working directory."""
    return sorted(str(path) for path in Path("human", "votes", task).glob("*.json"))


def counted_studies(config: Config) -> list[str]:
    """Tasks whose votes are there, or are simulated."""
    return [
        task for task in studies(config) if config["tasks"][task]["human"]["simulated_raters"] or exported_votes(task)
    ]


def study_tables(config: Config) -> list[tuple[str, str, str]]:
    """Task, judge and path of the verdicts of every judge, but people, on what people compare."""
    return [
        (task, judge, f"results/human/{task}/verdicts_{judge}.parquet")
        for task in counted_studies(config)
        for judge in ("main", *config["tasks"][task]["other_judges"])
        if judge_section(config, task, judge)["kind"] != "human"
    ]


def study_files(config: Config) -> list[str]:
    """The raters' pages, and what became of their votes where there are any."""
    files = [
        f"results/human/{task}/{name}" for task in studies(config) for name in ("pages", "items.parquet", "key.json")
    ]
    counted = counted_studies(config)
    files += [f"results/human/{task}/{name}" for task in counted for name in ("votes.parquet", "raters.csv")]
    return [*files, "results/human_agreement.csv"] if counted and study_tables(config) else files


def optimized(config: Config) -> list[tuple[str, str, str]]:
    """Task, seed and run of every run whose reward is measured while it trains, in the order of their evaluations."""
    return [(task, seed, run) for task in config["tasks"] for seed in seeds(config) for run in measured(config, task)]


def optimized_tasks(config: Config) -> list[str]:
    """The tasks of these runs."""
    return list(dict.fromkeys(task for task, _, _ in optimized(config)))


def rewarded_candidates(config: Config) -> list[tuple[str, str]]:
    """Task and seed of all candidates that have a learned and a true reward."""
    tasks = [task for task in optimized_tasks(config) if has_candidates(config, task)]
    return [(task, seed) for task in tasks for seed in seeds(config)]


def training_metrics(config: Config, task: str) -> list[str]:
    """The metrics file of each of a task's trainers, and of each round."""
    of_rounds = [round_name(run, number) for run, number in rounds(config, task)]
    return [
        f"results/{'' if name in _ONCE else seed}training/{task}/{'pretrain' if name == 'base' else name}.jsonl"
        for seed in seeds(config)
        for name in (*trainers(config, task), *of_rounds)
        if seed == "" or name not in _ONCE
    ]


def models(config: Config, task: str) -> list[str]:
    """The folders of a task's models, for each seed."""
    every = [(seed, name) for seed in seeds(config) for name in trainers(config, task)]
    return [f"results/{seed}models/{task}/{name}" for seed, name in every if seed == "" or name not in _ONCE]


def reference_tables(config: Config, task: str) -> list[str]:
    """Names of the files of the reference policy's log-probabilities that models of a task need.

    All runs of a sweep are given those of its pairs.
    """
    own = kind(config["tasks"][task])
    if own == "transfer":
        return []
    needed = {need for run in runs(config, task) for need in entry(config, task, run).needs}
    needed |= {"reference_logprobs"} if own == "frontier" else set()
    return [name for table, name in REFERENCE_TABLES.items() if table in needed]


def learns_labels(config: Config, task: str) -> bool:
    """Whether a run of a task learns from single labels."""
    return "reference_labels" in reference_tables(config, task)


def has_candidates(config: Config, task: str) -> bool:
    """Whether some run of the task is Best-of-N."""
    return kind(config["tasks"][task]) == "comparison" and bool(choices(config, task))


def judges_subsets(config: Config, task: str) -> bool:
    """Whether only the best candidates of seeded subsets are judged, because the judge costs money or time."""
    return config["tasks"][task]["judge"]["kind"] in ("chat", "recorded", "human")


def stepped(config: Config, task: str) -> list[str]:
    """The runs that are sampled while they train: those that the config names, else those of DPO (Fig. 3)."""
    by_step = config["tasks"][task].get("by_step")
    if by_step is None:
        return []
    given: list[str] | None = by_step["runs"]
    if given is not None:
        return [run for run in given if run not in in_rounds(config, task)]
    moving = "frontier" in config["tasks"][task]

    def by_default(run: str) -> bool:
        one = entry(config, task, run)
        at_once = bool(one.trainer) and not one.rounds
        return method(config, task, run) == "dpo" or (moving and at_once and one.starts_from == "reference")

    return [run for run in runs(config, task) if by_default(run)]


def sampled_rounds(config: Config, task: str) -> list[str]:
    """The runs of a task with win rates whose policy is sampled after each round, for its frontier."""
    section = config["tasks"][task]
    if kind(section) != "comparison" or "frontier" not in section:
        return []
    given = section["by_step"]["runs"]
    return [run for run in in_rounds(config, task) if given is None or run in given]


def compute_files(config: Config) -> dict[str, list[str]]:
    """What the stage `compute` reads, by argument: what every stage that runs a model recorded of itself."""

    def of_seeds(paths: Iterable[str]) -> list[str]:
        every = list(paths)
        return [f"results/{seed}{path}" for seed in seeds(config) for path in every]

    compared = tasks_of(config, "comparison", "transfer")
    candidates = [task for task in compared if has_candidates(config, task)]
    # The best of N at temperature 0 is the reference policy's greedy answer.
    sampled = {task: [reference(config, task)] if task in candidates else [] for task in compared}
    samples = [
        f"samples/{task}/{run}.parquet"
        for task in compared
        for run in dict.fromkeys([*sampled[task], *policies(config, task)])
    ]
    files = {
        "models": [path for task in config["tasks"] for path in models(config, task)],
        "reference": of_seeds(
            f"logprobs/{task}/{name}.parquet" for task in compared for name in reference_tables(config, task)
        ),
        "samples": of_seeds(samples),
        "candidates": of_seeds(f"candidates/{task}{end}.parquet" for task in candidates for end in ("", "_scores")),
        "rounds": [path for task in config["tasks"] for path in round_files(config, task)],
        "rewards": of_seeds(f"rewards/{task}/{run}.parquet" for task in compared for run in rewarded(config, task)),
        "written": of_seeds(f"samples/{task}/{run}.parquet" for task in compared for run in rewarded(config, task)),
        "win_rates": [f"results/{task}_winrates.csv" for task in compared],
        "curves": of_seeds(f"candidates/{task}_curve.csv" for task in candidates),
        "runs": of_seeds(
            f"frontier/{task}/{run}.parquet" for task in tasks_of(config, "frontier") for run in runs(config, task)
        ),
    }
    return {name: paths for name, paths in files.items() if paths}


def result_files(config: Config) -> list[str]:
    """Tables and figures of every task, and all that they are made of: a deleted model or table is made again."""
    files = [f"results/best_of_n.{ending}" for ending in ("csv", "svg", "png", "pdf")]
    if not any(has_candidates(config, task) for task in config["tasks"]):
        files = []
    files.append("results/compute.csv")
    if tasks_of(config, "comparison", "transfer"):
        files += ["results/compute.svg", "results/compute.png", "results/compute.pdf", "results/paper_vs_here.md"]
    if optimized(config):
        files += [f"results/overoptimization{ending}" for ending in (".csv", "_fits.csv", ".svg", ".png", ".pdf")]
    files += study_files(config)
    files += ["results/judge_agreement.csv"] if tasks_with_judges(config) else []
    for task, section in config["tasks"].items():
        if measures_frontier(section):
            files += [f"results/{task}_{name}.csv" for name in ("frontier", "ceiling", "dominance", "diagnosis")]
            files.append(f"results/{task}_diagnosis.md")
            files += [f"results/{task}_frontier.{ending}" for ending in ("svg", "png", "pdf")]
            files += [
                f"results/{seed}frontier/{task}/{run}.parquet"
                for seed in seeds(config)
                for run in measured(config, task)
            ]
        if kind(section) == "frontier":
            files += [f"results/{task}_classifier.csv"] if section["true_reward"]["source"] in _LEARNED else []
        else:
            files += [f"results/{task}_winrates.{ending}" for ending in ("csv", "manifest.json", "svg", "png", "pdf")]
            files += [f"results/{task}_{name}" for name in ("winrates_by_seed.csv", "comparisons.csv", "examples.md")]
            files += [
                f"results/{seed}{table}/{task}/{name}.parquet"
                for seed in seeds(config)
                for table in ("samples", "verdicts")
                for name in runs(config, task)
            ]
        if stepped(config, task):
            files += [f"results/{task}_winrate_by_step.{ending}" for ending in ("csv", "svg", "png", "pdf")]
        files += [f"results/{task}_training.svg"] if trainers(config, task) else []
        files += models(config, task)
        files += round_files(config, task)
    return files
