"""A change of any key of the config runs the stages that read it, and no other.

Every key is changed, one at a time, in one process (see `compared`); `test_tiny_run` holds some of them against Snakemake's
own dry run of a finished folder.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from inspect import getargs
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from compared import DERIVING, Job, Name, Rules, loaded
from running import REPOSITORY, TINY, overlay
from snakemake.utils import update_config

from prefopt.experiment.config import load_schema, resolve
from prefopt.experiment.targets import PROMPTS

SCHEMA = load_schema()
SHIPPED = REPOSITORY / "workflow" / "models" / "tldr_base"
CHAT = {"base_url": "http://localhost:1/v1", "model": "m", "prompt": "tldr_simple"}
HOSTED = {
    "kind": "chat",
    "chat": {**CHAT, "prices": {"m": {"input": 1.0, "output": 2.0}, "n": {"input": 1.0, "output": 1.0}}},
}

FIRST = {"run": "ppo", "temperature": 1.0}
TRAINERS = "pretrain sft preferred_ft dpo_with_samples reward_model gold_reward_model ppo_with_samples"
SAMPLERS = "sample candidates pair_samples ceiling_samples"
RUNS = "dpo_0.1 ppo_6 ppo_gt_6 ppo_gt_trl_6 unlikelihood_1 preferred_ft_0"
EVERY_RUN = " ".join(f"frontier_run:{run}" for run in RUNS.split())
PREFERRED_FT = "frontier_run:preferred_ft_0"  # names its seed
ENDPOINT = "api_key_env|concurrency|requests_per_minute|timeout|max_retries|budget_usd|store"

# What reads a key: the jobs that are not the same with another value, by the first pattern that fits. A job is named by its
# rule and, where it makes one of several, by its table, run or judge. It is a job of the key's task, unless another is named.
READ_BY = {
    r"compute\.activation_checkpointing": f"{TRAINERS} {EVERY_RUN}",
    r"compute\.dtype": f"{TRAINERS} {EVERY_RUN} {SAMPLERS} reference score best_of_n evaluations",
    r"compute\.token_budget": (
        f"{TRAINERS} {EVERY_RUN} {SAMPLERS} reference score best_of_n evaluations judge_accuracy other_judge:gold"
        " judge_items:gold"
    ),
    # What a job is given does not change what it makes.
    r"compute\.(threads|gpus|nodes|mem_mb|runtime|hardware\..*)": "",
    r".*\.checkpoint_every": "",
    rf".*\.chat\.({ENDPOINT})": "",
    r".*\.chat\.prices\.n\..*": "",
    # Records.
    r"tasks\.(tldr|hh)\.data\.embedded\.(demonstrations|validation_prompts)": (
        "records:demonstrations records:training/demonstrations"
    ),
    r".*\.data\.embedded\.(test_prompts|demonstrations|validation_prompts)": "records:demonstrations",
    r".*\.data\.embedded\.(validation_)?pairs": "records:preferences",
    r".*\.data\.embedded\.gold_(test_)?pairs": "records:gold_preferences",
    r".*\.data\.embedded\.pretraining_documents": "records:pretraining",
    r"tasks\.cnndm\.data\.embedded\.seed": "records:demonstrations",
    r"tasks\.imdb\.data\.embedded\.test": "reviews:reviews",
    r"tasks\.imdb\.data\.embedded\.validation": "reviews:reviews reviews:training/reviews",
    r"tasks\.imdb\.data\.embedded\..*": "reviews:reviews reviews:training/reviews reviews:pretraining",
    r".*\.data\.embedded\.seed": (
        "records:demonstrations records:training/demonstrations records:preferences records:gold_preferences"
        " records:pretraining"
    ),
    r"tasks\.(tldr|hh)\.(lengths|prompt)\..*": "prepare prepare_preferences",
    r"tasks\.cnndm\.(lengths|prompt)\..*": "prepare",
    r"tasks\.imdb\.lengths\..*": "prefixes",
    # Other sources than the one that is taken.
    r".*\.data\.(?!source|embedded).*": "",
    r".*\.(base|sft|true_reward|reward_model|gold_reward_model)\.(path|name|revision)": "",
    # Trainers.
    r".*\.(simpo|orpo|kto|iterative_dpo)\..*": "",  # of no run
    r"tasks\.hh\.gold_reward_model\..*": "",  # no judge of hh is one
    r"tasks\.(?:hh|tldr)\.dpo\.(?:loss|length_normalized)": "dpo_with_samples overoptimization",
    r"tasks\.imdb\.dpo\.(?:loss|length_normalized)": "frontier_run:dpo_0.1 overoptimization",
    r"tasks\.(?:hh|tldr)\.(dpo|ppo)\.(?:beta|kl_target|seed)": r"\1_with_samples evaluations",
    r"tasks\.(?:hh|tldr)\.(dpo|ppo)\..*": r"\1_with_samples",
    r"tasks\.hh\.by_step\..*": "dpo_with_samples",
    r"tasks\.tldr\.by_step\..*": "dpo_with_samples ppo_with_samples",
    r"tasks\.imdb\.preferred_ft\.seed": "",  # the runs name theirs
    r"tasks\.imdb\.(dpo|unlikelihood|preferred_ft|ppo|ppo_gt|ppo_gt_trl)\..*": r"frontier_run:\1",
    r"tasks\.imdb\.runs\.([a-z_]+_[0-9.]+)\.(?!method).*": r"frontier_run:\1",
    r"tasks\.imdb\.classifier\..*|tasks\.imdb\.true_reward\.(max_length|batch_size)": "",  # the reward is a rule
    r".*\.gold_reward_model\.keep": "",  # always the last
    r"tasks\.[a-z]+\.(pretrain|sft|preferred_ft|dpo|reward_model|gold_reward_model|ppo)\.(?!source).*": r"\1",
    # Sampling.
    r"tasks\.(hh|tldr)\.(sampling\.temperatures|evaluation\.validation_prompts)": "sample candidates",
    # What is sampled by step is so on test prompts, as everything else is.
    r"tasks\.hh\.evaluation\.test_prompts": "sample candidates dpo_with_samples",
    r"tasks\.tldr\.evaluation\.test_prompts": "sample candidates dpo_with_samples ppo_with_samples",
    r"tasks\.[a-z]+\.sampling\.vllm\..*": "",
    r"tasks\.(hh|tldr)\.sampling\.engine": "sample candidates ceiling_samples",
    r"tasks\.hh\.sampling\..*": "sample candidates ceiling_samples dpo_with_samples",
    r"tasks\.tldr\.sampling\..*": "sample candidates ceiling_samples dpo_with_samples ppo_with_samples",
    r"tasks\.cnndm\.(sampling\..*|evaluation\.(validation|test)_prompts)": "sample",
    r".*\.best_of_n\.n": "candidates",
    r".*\.best_of_n\.curve": "best_of_n_curve",
    r".*\.best_of_n\.subsets": "",  # every candidate is judged where that is free
    r".*\.pairs\..*": "pair_samples",
    r".*\.(ceiling|frontier)\.(prompts|samples)": "ceiling_samples",
    r".*\.frontier\.(bootstrap|at_kl)": "dominance",
    r".*\.(ceiling|frontier)\..*": "optimal_frontier",
    # Judges.
    r"tasks\.tldr\.other_judges\.hosted\.repeat": "other_judge:hosted judge_items:hosted",
    r".*judge.*\.repeat": "",  # only a chat judge judges some pairs once more
    r"tasks\.tldr\.judge\.(order|seed)": "judge judge_candidates judge_items:main",
    r"tasks\.hh\.judge\.(order|seed)": "judge judge_candidates",
    r"tasks\.cnndm\.judge\.(order|seed)": "judge",
    r"tasks\.tldr\.other_judges\.(hosted|gold)\.(?!kind).*": r"other_judge:\1 judge_items:\1",
    # People.
    r".*\.human\.(failed_checks_allowed|min_seconds)": "human_votes",
    r".*\.human\.simulated_raters\..*": "simulated_votes",
    r".*\.human\.seed": "human_study simulated_votes",
    r".*\.human\..*": "human_study",
    # Tables.
    r"tasks\.imdb\.words\.title": "frontier_figure overoptimization training_figure",
    r"tasks\.(tldr|hh)\.words\.title": "summary frontier_figure overoptimization training_figure",
    r".*\.words\..*": "summary",
    r"tasks\.tldr\.evaluation\.against": "judge judge_candidates other_judge:gold other_judge:hosted examples paper",
    r"tasks\.hh\.evaluation\.against": "judge judge_candidates examples paper",
    r"tasks\.cnndm\.evaluation\.against": "judge examples paper",
    r".*\.runs\.best_of_4\.n": "best_of_n win_rates compute best_of_n_curve",
    r".*\.evaluation\.opponents": "win_rates",
    r".*\.evaluation\.(examples|example_characters)": "examples",
    r"tasks\.tldr\.evaluation\.confidence": (
        "win_rates compute best_of_n_curve judge_accuracy judge_agreement human_agreement win_rate_by_step dominance"
        " diagnosis overoptimization"
    ),
    r"tasks\.hh\.evaluation\.confidence": (
        "win_rates compute best_of_n_curve win_rate_by_step dominance diagnosis overoptimization"
    ),
    r"tasks\.cnndm\.evaluation\.confidence": "win_rates compute",
    r"tasks\.imdb\.evaluation\.confidence": "compute dominance diagnosis overoptimization",
    r"tasks\.imdb\.evaluation\.(bootstrap|at_kl)": "dominance",
    r"tasks\.imdb\.evaluation\.(max_new_tokens|seed)": f"{EVERY_RUN} ceiling_samples",
    r"tasks\.imdb\.evaluation\..*": EVERY_RUN,
}
# Told to a job, of no effect on what it makes: the reason why a key is not compared.
OF_NO_RESULT = {
    r".*\.checkpoint_every": "how often a trainer saves",
    rf".*\.chat\.({ENDPOINT})": "how an endpoint is asked, by whom, what may be spent, and where replies are kept",
    r".*\.data\.(posts|comparisons|demonstrations|preferences|articles|reviews)": "files are compared by their content",
    r".*\.data\.(?!embedded).*": "what the source that is taken does not read",
    r".*true_reward\.(max_length|batch_size)": "a rule reads no classifier's",
    r"compute\.token_budget": "a judge that is no model reads none",
}
# What decides which jobs there are: see `GRAPHS`.
OF_THE_GRAPH = re.compile(
    r"seeds|.*\.(frontier\.reward|reference|models_of|form|source|kind|method|matchups)|tasks\.[a-z]+\.(by_step\.)?runs(\.[a-z_]+(_[0-9.]+)?)?|.*\.hosted\.chat\.model"
)
GRAPHS: dict[str, tuple[dict[str, Any], str]] = {
    "a run less": (
        {"tldr": {"runs": {"ppo": None}, "human": None}},
        "win_rates examples training_figure judge_agreement compute paper all win_rates@cnndm examples@cnndm"
        " win_rate_by_step frontier frontier_figure dominance diagnosis overoptimization",
    ),
    "a learned judge": (
        {"tldr": {"judge": {"kind": "reward_model"}}},
        "judge judge_candidates judge_items:main win_rates paper",
    ),
    "another model behind an endpoint": (
        {"tldr": {"other_judges": {"hosted": {"chat": {"model": "n"}}}}},
        "other_judge:hosted judge_items:hosted",
    ),
    "a judge less": (
        {"tldr": {"other_judges": {"hosted": None}}},
        "judge_agreement human_agreement",
    ),
    "a matchup less": (
        {"tldr": {"human": {"matchups": [{"first": FIRST, "second": {"run": "reference"}, "items": 4}]}}},
        "human_study",
    ),
}


# Keys that have one value alone, and why.
WITHOUT_ANOTHER = {r".*\.gold_reward_model\.keep": "always the last, as its test pairs measure accuracy"}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rules]:
    folder = tmp_path_factory.mktemp("rules")
    with loaded(folder, TINY, overlay(folder, {"tasks": {"tldr": {"other_judges": {"hosted": HOSTED}}}})) as rules:
        yield rules


@pytest.fixture(scope="module")
def jobs(rules: Rules) -> dict[Name, Job]:
    return rules.jobs()


def keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key that is no section, with its value."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from keys(below, (*path, key))
    else:
        yield path, value


def another(value: Any, path: tuple[str, ...]) -> Any:
    """Another value that the key may have; the same where there is none."""
    schema = SCHEMA
    for key in path:
        of_method = next((own for own in schema.get("x-values", {}).values() if key in own), {})
        known = {**of_method, **schema.get("properties", {})}
        schema = known[key] if key in known else schema["additionalProperties"]
    if isinstance(value, list):
        items = ("x.jsonl", "dpo", 0.5, 3, {"path": "x.jsonl"})
        return [*value, next(item for item in items if allowed([*value, item], schema))]
    if isinstance(value, bool):
        return not value
    numbers = [value + 1, value / 2, 2 * value] if isinstance(value, int | float) else []
    others = [
        *numbers,
        *schema.get("enum", []),
        "another",
        "http://localhost:2/v1",
        7,
        0.5,
        0.25,
        {"rank": 2, "alpha": 4},
        ["ppo"],
        {"run": "dpo", "temperature": 1.0},
        "ANOTHER_KEY",
        4000,
    ]
    return next((other for other in others if other != value and allowed(other, schema)), value)


def allowed(value: Any, schema: Mapping[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def with_key(config: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    section = changed
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return changed


def overlaid(config: Mapping[str, Any], tasks: dict[str, Any]) -> dict[str, Any]:
    """What a resolved config becomes with an overlay."""
    whole = copy.deepcopy(dict(config))
    update_config(whole, {"tasks": tasks})
    return resolve(whole)


def named(job: Name, task: str | None) -> str:
    """A job's rule, and what it makes where that is one of several."""
    rule, wildcards = job
    kinds = ("table", "run", "judge") if rule == "frontier_run" else ("table", "judge")
    named = ":".join([rule, *(value for key, value in wildcards if key in kinds)])
    of_task = dict(wildcards).get("task", task)
    return named if task is None or of_task == task else f"{named}@{of_task}"


def expected(key: str, made: set[str]) -> set[str]:
    """What reads a key, of the jobs that there are; a method of the sweep stands for its runs."""
    for pattern, readers in READ_BY.items():
        if match := re.fullmatch(pattern, key):
            names = match.expand(readers).split()
            runs = {name for name in made for reader in names if re.fullmatch(rf"{re.escape(reader)}_[0-9.]+", name)}
            return runs or set(names)
    return {"no line of READ_BY says what"}


def test_a_change_of_any_key_runs_all_that_read_it_and_no_other(rules: Rules, jobs: dict[Name, Job]) -> None:
    wrong, covered = {}, 0
    for path, value in keys(rules.config):
        key = ".".join(path)
        if OF_THE_GRAPH.fullmatch(key):
            continue
        covered += 1
        other = another(value, path)
        if (other == value) != any(re.fullmatch(pattern, key) for pattern in WITHOUT_ANOTHER):
            wrong[key] = {"another value": other}
        with rules.with_config(with_key(rules.config, path, other)):
            now = rules.jobs()
        own, _ = rules.rerun(jobs, now)
        task = path[1] if path[0] == "tasks" else None
        found = {named(job, task) for job in own}
        made = {named(job, task) for job in now}
        if found != expected(key, made):
            wrong[key] = {"runs": sorted(found), "reads it": sorted(expected(key, made))}
        # What a job is told and not compared by has its reason.
        told = {job for job, facts in now.items() if job in jobs and facts.uncompared != jobs[job].uncompared}
        if told - own and not any(re.fullmatch(pattern, key) for pattern in OF_NO_RESULT):
            wrong[key] = {"told and not compared": sorted(named(job, task) for job in told - own)}
    assert not wrong, "\n".join(f"{key}: {found}" for key, found in wrong.items())
    assert covered > 500


@pytest.mark.parametrize("name", GRAPHS)
def test_other_jobs_run_with_what_reads_them(rules: Rules, jobs: dict[Name, Job], name: str) -> None:
    change, readers = GRAPHS[name]
    with rules.with_config(overlaid(rules.config, change)):
        own, _ = rules.rerun(jobs, rules.jobs())
    (task,) = change
    assert {named(job, task) for job in own} == set(readers.split())


# What every stage that trains or samples reads, and tables over seeds.
SEEDED = (
    "sft preferred_ft dpo_with_samples ppo_with_samples reward_model sample candidates pair_samples ceiling_samples evaluations"
    f" {EVERY_RUN.removesuffix(PREFERRED_FT).strip()}"
)
OVER_SEEDS = "win_rates win_rate_by_step frontier dominance diagnosis overoptimization judge_agreement"


def test_another_seed_makes_all_that_is_trained_or_sampled(rules: Rules, jobs: dict[Name, Job]) -> None:
    with rules.with_config(with_key(rules.config, ("seeds",), [1])):
        own, _ = rules.rerun(jobs, rules.jobs())
    tables = f"{OVER_SEEDS} best_of_n_curve examples human_agreement"
    assert {named(job, None) for job in own} == set(f"{SEEDED} {tables}".split())


def test_a_further_seed_makes_itself_and_the_tables_over_seeds(rules: Rules, jobs: dict[Name, Job]) -> None:
    with rules.with_config(with_key(rules.config, ("seeds",), [*rules.config["seeds"], 1])):
        own, _ = rules.rerun(jobs, rules.jobs())
    of_seed = {name for name in own if dict(name[1]).get("seed") == "seed_1/"}
    assert {rule for rule, _ in of_seed} >= {name.partition(":")[0] for name in SEEDED.split()}
    # Nothing of the first seed, nor of what is made once for all.
    joined = f"{OVER_SEEDS} optimal_frontier compute best_of_n_figure training_figure all"
    assert {rule for rule, _ in own - of_seed} == set(joined.split())


def changed(rules: Rules, jobs: dict[Name, Job], path: str, value: Any) -> set[str]:
    """All that a change of a key runs, with what hangs on it; jobs of the key's task without its name."""
    keys = tuple(path.split("."))
    with rules.with_config(with_key(rules.config, keys, value)):
        _, every = rules.rerun(jobs, rules.jobs())
    return {named(job, keys[1]) for job in every}


def test_test_prompts_train_nothing(rules: Rules, jobs: dict[Name, Job]) -> None:
    """By step DPO is sampled on test prompts while it trains, and a run of the sweep is evaluated on them."""
    for task, key, trained in (
        ("tldr", "test_prompts", {"dpo_with_samples", "ppo_with_samples"}),
        ("hh", "test_prompts", {"dpo_with_samples"}),
        ("imdb", "test", set(EVERY_RUN.split())),
        ("tldr", "gold_pairs", {"gold_reward_model"}),
    ):
        runs = changed(rules, jobs, f"tasks.{task}.data.embedded.{key}", 99)
        trainers = {*TRAINERS.split(), *EVERY_RUN.split(), "reference", "classifier", "pair_samples"}
        assert runs & trainers == trained


def test_another_judge_waits_for_its_own_method_alone(rules: Rules, jobs: dict[Name, Job]) -> None:
    with rules.with_config(with_key(rules.config, ("tasks", "tldr", "dpo", "beta"), 0.7)):
        _, every = rules.rerun(jobs, rules.jobs())
    judged = {dict(wildcards)["run"] for rule, wildcards in every if rule == "other_judge"}
    assert judged == {"dpo"}


def test_what_is_brought_may_move_and_not_change(rules: Rules, jobs: dict[Name, Job], tmp_path: Path) -> None:
    """What is brought is the same under another path, and another with another content."""
    base, posts = shutil.copytree(SHIPPED, tmp_path / "base"), tmp_path / "posts.jsonl"
    scorer = shutil.copytree(SHIPPED, tmp_path / "scorer")
    copied = shutil.copy(PROMPTS / "tldr_simple.txt", tmp_path)
    posts.write_text("{}\n")
    tldr = {
        "base": {"source": "path", "path": str(base)},
        "reward_model": {"source": "path", "path": str(scorer)},
        "judge": {"kind": "chat", "chat": {**HOSTED["chat"], "prompt": str(copied)}},
        "data": {"source": "files", "posts": [str(posts)], "comparisons": [str(posts)], "gold_fraction": 0.5},
        "human": None,
        "frontier": None,
    }
    config = overlaid(rules.config, {"tldr": tldr})

    def runs(change: dict[str, Any]) -> set[str]:
        with rules.with_config(config):
            before = rules.jobs()
        with rules.with_config(overlaid(config, {"tldr": change})):
            own, _ = rules.rerun(before, rules.jobs())
        return {named(job, "tldr") for job in own} - {"paper"}  # which names the base

    moved = shutil.copytree(base, tmp_path / "moved")
    other_scorer = shutil.copytree(scorer, tmp_path / "other scorer")
    (tmp_path / "below").mkdir()
    elsewhere = [str(shutil.copy(path, tmp_path / "below")) for path in (copied, posts)]
    assert runs({"base": {"path": str(moved)}}) == set()
    assert runs({"reward_model": {"path": str(other_scorer)}}) == set()
    assert runs({"judge": {"chat": {"prompt": elsewhere[0]}}}) == set()
    assert runs({"data": {"posts": [elsewhere[1]]}}) == set()
    (moved / "model.safetensors").write_bytes(b"other weights")
    (other_scorer / "model.safetensors").write_bytes(b"other weights")
    Path(elsewhere[0]).write_text("Which is better? {post} {first} {second}")
    Path(elsewhere[1]).write_text("{}\n{}\n")
    assert runs({"reward_model": {"path": str(other_scorer)}}) == {"ppo_with_samples", "score"}
    tables = {"records:demonstrations", "records:training/demonstrations", "records:preferences"}
    assert runs({"base": {"path": str(moved)}}) >= {"prepare", "prepare_preferences", "sft", "preferred_ft", "sample"}
    assert runs({"judge": {"chat": {"prompt": elsewhere[0]}}}) == {"judge", "judge_candidates"}
    assert runs({"data": {"posts": [elsewhere[1]]}}) == tables | {"records:gold_preferences"}


def test_a_served_judge_may_move_and_judges_anew_where_it_is_another(
    rules: Rules, jobs: dict[Name, Job], tmp_path: Path
) -> None:
    model = shutil.copytree(SHIPPED, tmp_path / "judge")
    chat = {"serve": {"model": str(model)}, "prompt": "tldr_simple"}
    config = overlaid(rules.config, {"tldr": {"judge": {"kind": "chat", "chat": chat}}})

    def runs(serve: dict[str, Any]) -> set[str]:
        with rules.with_config(config):
            before = rules.jobs()
        with rules.with_config(overlaid(config, {"tldr": {"judge": {"chat": {"serve": serve}}}})):
            own, _ = rules.rerun(before, rules.jobs())
        return {named(job, "tldr") for job in own}

    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copytree(model, tmp_path / "elsewhere" / "judge")
    assert runs({"model": str(moved)}) == runs({"program": "/opt/engine"}) == runs({"gpus": 4}) == set()
    anew = {"judge", "judge_candidates", "judge_items:main"}
    assert runs({"engine": "vllm"}) == anew
    (moved / "model.safetensors").write_bytes(b"other weights")
    assert runs({"model": str(moved)}) == anew


def test_sources_of_records_are_compared_by_their_content_and_what_is_taken(
    rules: Rules, jobs: dict[Name, Job], tmp_path: Path
) -> None:
    path, folder = tmp_path / "a.jsonl", tmp_path / "saved"
    path.write_text("{}\n")
    folder.mkdir()
    (folder / "data.arrow").write_bytes(b"rows")
    sources = [{"path": str(path)}, {"path": str(folder)}]
    own = {"source": "records", "records": sources, "gold_fraction": 0.5}
    config = overlaid(rules.config, {"hh": {"frontier": None, "data": own, "judge": {"kind": "reward_model"}}})

    def runs(change: dict[str, Any]) -> set[str]:
        with rules.with_config(config):
            before = rules.jobs()
        with rules.with_config(overlaid(config, {"hh": {"data": change}})):
            own, _ = rules.rerun(before, rules.jobs())
        return {named(job, "hh") for job in own}

    kinds = ("demonstrations", "training/demonstrations", "preferences", "gold_preferences", "pretraining")
    tables = {f"records:{kind}" for kind in kinds}
    moved = [str(shutil.copy(path, tmp_path / "b.jsonl")), str(shutil.copytree(folder, tmp_path / "moved"))]
    assert runs({"records": [{"path": path} for path in moved]}) == set()
    changes: tuple[dict[str, Any], ...] = (
        {"records": [{**sources[0], "count": 3}, sources[1]]},
        {"records": [sources[0], {**sources[1], "as": "test"}]},
        {"records": sources[::-1]},
        {"pairs": {"margin": 1}},
        {"ties": "both"},
        {"seed": 1},
    )
    for change in changes:
        assert runs(change) == tables
    (tmp_path / "moved" / "data.arrow").write_bytes(b"others")
    assert runs({"records": [{"path": path} for path in moved]}) == tables


def test_one_params_function_alone_is_not_compared(rules: Rules) -> None:
    """Values that are not compared go through `uncompared`, which takes `threads`; no function takes another of these."""
    taken = {
        (getargs(item.__code__).args[-1], item.__qualname__)
        for rule in rules.workflow.rules
        for _, item in rule.params._allitems()
        if callable(item) and set(getargs(item.__code__).args) & DERIVING
    }
    assert taken == {("threads", "uncompared.<locals>.<lambda>")}


def test_snakemake_compares_the_same(rules: Rules, jobs: dict[Name, Job]) -> None:
    """Inputs and params as Snakemake itself works them out for some jobs."""
    for name, job in jobs.items():
        rule, wildcards = rules.workflow.get_rule(name[0]), dict(name[1])
        inputs, *_ = rule.expand_input(wildcards)
        outputs, _ = rule.expand_output(wildcards)
        of_job = SimpleNamespace(resources=SimpleNamespace(_cores=1))
        params, compared = rule.expand_params(wildcards, inputs, outputs, of_job)
        assert sorted(map(str, inputs)) == list(job.inputs)
        assert sorted(map(repr, compared)) == sorted(param.partition(" ")[2] for param in job.compared)
        assert len(params) == len(job.compared) + len(job.uncompared)


def test_a_further_run_of_the_sweep_makes_itself_and_the_tables(
    jobs: dict[Name, Job], tmp_path: Path, rules: Rules
) -> None:
    """Rules know the names of runs when they are read, so these are read again, which is the end of those before."""
    runs = {"imdb": {"runs": {"dpo_2": {"method": "dpo", "beta": 2}}}}
    tasks = {"tldr": {"other_judges": {"hosted": HOSTED}}, **runs}
    with loaded(tmp_path, TINY, overlay(tmp_path, {"tasks": tasks})) as read_again:
        own, _ = read_again.rerun(jobs, read_again.jobs())
    readers = "frontier_run:dpo_2 frontier dominance diagnosis overoptimization compute all"
    assert {named(job, "imdb") for job in own} == set(readers.split())
