"""Checks of a config's values against each other, which no schema of single values can make.

Each check yields sentences without the leading "tasks.NAME.".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefopt.experiment import targets
from prefopt.experiment.methods import METHODS, n_of, needs_of, trained_by
from prefopt.experiment.tasks import ENDING, RECORD_FILES, TASKS, source_name

# Sections of models that may be the user's own.
_BROUGHT = ("base", "sft", "true_reward", "reward_model", "gold_reward_model")

Config = dict[str, Any]
Check = Callable[[Config, str], Iterator[str]]


def problems(section: Config, task: str, config: Config) -> Iterator[str]:
    """What is wrong with a task's section of a config."""
    if "human" in targets.judge_kinds(section) and len(config.get("seeds", [0])) > 1:
        yield "judge.kind or one of other_judges is 'human', but people see the first seed's texts alone; name one in seeds."
    if "form" in section and task in TASKS and section["form"] != task:
        yield f"form is {section['form']!r}; {task} is a task of its own, so give yours another name."
    home = section.get("models_of", task)
    # Of a task that is no section that is said alone.
    kinds = {
        name: targets.kind(other) if isinstance(other, dict) else "comparison"
        for name, other in config["tasks"].items()
    }
    if home in TASKS and home not in config["tasks"]:
        yield f"models_of is {home!r}, a task that is left out; leave this one out too, or neither."
    elif home != task and kinds.get(home) != "comparison":
        compared = [name for name, kind in kinds.items() if kind == "comparison"]
        yield f"models_of is {home!r}; allowed: a task that trains models and is not left out, which are {', '.join(compared)}."
    if not section["runs"]:
        yield f"runs holds no run of {section['models_of']} that can be sampled here; name one, or leave the task out by null."
    for check in _CHECKS[targets.kind(section)]:
        yield from check(section, task)


def leave_out_untrained(section: Config, tasks: Config) -> list[str]:
    """Takes out of a task that samples another's models the runs that it does not have.

    Returns:
        A sentence for each of them.
    """
    home = section.get("models_of")
    if home not in tasks:
        return []
    fitting = [run for run, values in tasks[home]["runs"].items() if METHODS[values["method"]].transfers]
    lacking = [run for run in section["runs"] if run not in fitting]
    for run in lacking:
        del section["runs"][run]
    return [
        f"runs.{run} falls away: {home} has no such run that could be sampled here, but {', '.join(fitting) or 'none'}."
        for run in lacking
    ]


def leave_out_embedded(section: Config) -> list[str]:
    """Takes out of a task's section what belongs to embedded records, where it has others.

    Returns:
        A sentence for each thing that is left out.
    """
    source = section["data"]["source"]
    if source == "embedded" or targets.kind(section) == "frontier":
        return []
    left_out = []
    if section.get("frontier", {}).get("reward", "") is None:
        del section["frontier"]
        left_out.append(
            f"frontier falls away with data.source {source!r}: name its reward, gold_reward_model, to have one from pairs "
            f"that are set aside."
        )
    if section.get("human", {}).get("simulated_raters") is not None:
        section["human"]["simulated_raters"] = None
        left_out.append(
            f"human.simulated_raters falls away: with data.source {source!r} there are no hidden facts to simulate raters "
            f"from, and the votes of people count (human: null leaves the study out)."
        )
    for name, judge in list(section["other_judges"].items()):
        if judge["kind"] == "oracle" or judge == section["judge"]:
            del section["other_judges"][name]
            reason = (
                "it is the task's own judge" if judge["kind"] != "oracle" else "an oracle knows embedded records alone"
            )
            left_out.append(f"other_judges.{name} falls away with data.source {source!r}: {reason}.")
    return left_out


def _check_paths(section: Config, task: str) -> Iterator[str]:
    paths = [(f"data.{key}", path) for key in RECORD_FILES for path in section["data"].get(key, [])]
    paths += [(f"data.records[{i}]", one["path"] or "") for i, one in enumerate(section["data"].get("records", []))]
    for name in _BROUGHT:
        if section.get(name, {}).get("source") == "path":
            paths.append((f"{name}.path", section[name]["path"] or ""))
    chats = {key: judge["chat"] for key, judge in judges(section).items() if "chat" in judge}
    paths += [(f"{key}.chat.prompt", chat.get("prompt", "")) for key, chat in chats.items()]
    for key, path in paths:
        if re.search("[{}]", path):
            yield f"{key} names {path!r}; a path may hold no braces, which Snakemake reads as wildcards: rename it."


def _check_votes(section: Config, task: str) -> Iterator[str]:
    for path in targets.exported_votes(task):
        if re.search("[{}]", path):
            yield f"human counts the file {path!r}, whose braces Snakemake reads as wildcards: rename it."


def _check_data(section: Config, task: str) -> Iterator[str]:
    data = section["data"]
    total = sum(data.get("splits", {"all": 1}).values())
    if abs(total - 1) > 1e-6:
        shares = " + ".join(f"{share:g}" for share in data["splits"].values())
        yield f"data.splits is {shares} = {total:g}; allowed: shares that add up to 1."
    if data["source"] == "files":
        for group in TASKS[section["form"]].files:
            if not any(data[key] for key in group):
                named = " and ".join(f"data.{key}" for key in group)
                verb, give = ("are", "one") if len(group) > 1 else ("is", "it")
                yield f"data.source is 'files', but {named} {verb} empty; give {give} a path."
        for key in RECORD_FILES:
            for path in data.get(key, []):
                if not Path(path).is_file():
                    yield f"data.{key} names {path!r}; no such file is seen from the working directory."
    if data["source"] == "hub":
        for key in TASKS[section["form"]].hub:
            if data["hub"][key] is None:
                yield f"data.hub.{key} is null; with data.source 'hub' it must be the name of a data set."
    if data["source"] == "records":
        yield from _check_records(data["records"])


def _check_records(records: list[Config]) -> Iterator[str]:
    """Each source of records names one place, and no key that is not read of it."""
    if not records:
        yield "data.records is empty, and data.source is 'records'; give it a path or the name of a data set."
    names = [source_name(one) for one in records]
    for index, one in enumerate(records):
        key, path = f"data.records[{index}]", one["path"]
        if (path is None) == (one["hub"] is None):
            yield f"{key} has {'neither path nor hub' if path is None else 'both path and hub'}; give one of them."
            continue
        if path is not None and not Path(path).exists():
            yield f"{key}.path names {path!r}; no such file or folder is seen from the working directory."
        elif path is not None and not Path(path).is_dir() and not ENDING.search(path):
            yield f"{key}.path names {path!r}; allowed: a folder, or a file that ends like those of data.posts."
        unread = [] if path is None else ["configuration", "revision"]
        unread += ["split"] if path is not None and not Path(path).is_dir() else []
        for name in unread:
            if one[name] is not None:
                yield f"{key}.{name} is {one[name]!r}, which is not read of {path!r}; leave it out."
        if one["weight"] is not None and one["count"] is not None:
            yield f"{key} has both weight and count; give one of them."
        if source_name(one) in names[:index]:
            yield f"{key} names {source_name(one)!r} a second time; leave one out."


def _check_sampling(section: Config, task: str) -> Iterator[str]:
    for key, value in section["sampling"]["vllm"].items():
        if value is not None and targets.vllm(section) is None:
            yield f"sampling.vllm.{key} is {value!r}, but sampling.engine is 'builtin'; set it to vllm, or leave this out."


def _check_judge(section: Config, task: str) -> Iterator[str]:
    for key, judge in judges(section).items():
        yield from _check_one_judge(section, key, judge)


def judges(section: Config) -> Config:
    """A task's judges by their keys; a sweep has none."""
    if "judge" not in section:
        return {}
    return {
        "judge": section["judge"],
        **{f"other_judges.{name}": judge for name, judge in section["other_judges"].items()},
    }


def fill_served(judge: Config, config: Config) -> None:
    """Gives a served chat judge what follows from its being served: no key, no price, and a name."""
    chat = judge.get("chat", {})
    if "serve" in chat and "model" in chat["serve"]:
        chat.setdefault("model", Path(chat["serve"]["model"]).name)
        chat |= {"api_key_env": None, "prices": {chat["model"]: {"input": 0.0, "output": 0.0}}}
        if chat["serve"]["gpus"] is None:
            chat["serve"]["gpus"] = config["compute"]["gpus"]


def _check_one_judge(section: Config, key: str, judge: Config) -> Iterator[str]:
    kind, data = judge["kind"], section["data"]
    if key == "judge" and kind == "human" and len(section["sampling"]["temperatures"]) > 1:
        yield (
            f"sampling.temperatures holds {len(section['sampling']['temperatures'])} temperatures; with judge.kind "
            f"'human' it must hold one, since people vote on test prompts only and none can be selected on others."
        )
    if kind == "oracle" and data["source"] != "embedded":
        yield (
            f"{key}.kind is 'oracle', which needs data.source 'embedded' and not {data['source']!r}; "
            f"allowed here: reward_model, chat, recorded or human."
        )
    if kind == "reward_model" and targets.kind(section) == "comparison":
        yield from _check_gold(data, f"{key}.kind 'reward_model'")
    if kind in ("chat", "recorded"):
        if "chat" not in judge:
            yield f"{key}.chat is missing; {key}.kind is {kind!r}, which needs this section."
            return
        if {"serve", "base_url"} <= judge["chat"].keys():
            yield f"{key}.chat names both serve and base_url; leave one of them out: a served judge has its own address."
        address = "serve" if "serve" in judge["chat"] else "base_url"
        missing = [name for name in (address, "model", "prompt") if name not in judge["chat"]]
        for name in missing:
            yield f"{key}.chat.{name} is missing; {key}.kind is {kind!r}, which needs it."
        if missing:
            return
        if judge["chat"]["model"] not in judge["chat"]["prices"]:
            yield (
                f"{key}.chat.prices has no price of {judge['chat']['model']!r}; give USD per million tokens as "
                f"{{input: X, output: Y}}, and 0 for a server of your own."
            )
        if not targets.judge_prompt(judge).is_file():
            yield (
                f"{key}.chat.prompt is {judge['chat']['prompt']!r}; allowed: "
                f"{', '.join(sorted(path.stem for path in targets.PROMPTS.glob('*.txt')))}, or the path of a file."
            )


def _check_gold(data: Config, reason: str) -> Iterator[str]:
    """There are pairs for the gold reward model."""
    if data["source"] == "embedded":
        for size in ("gold_pairs", "gold_test_pairs"):
            if data["embedded"][size] == 0:
                yield f"data.embedded.{size} is 0; with {reason} it must be at least 1."
    elif data["gold_fraction"] == 0:
        yield f"data.gold_fraction is 0; with {reason} it must be above 0, e.g. 0.5."


def _check_human(section: Config, task: str) -> Iterator[str]:
    if "human" not in section:
        for key, judge in judges(section).items():
            if judge["kind"] == "human":
                yield f"human is missing; {key}.kind is 'human', which needs this section."
        return
    human = section["human"]
    for key in ("question", "matchups"):
        if key not in human:
            yield f"human.{key} is missing; a study needs it."
    for index, matchup in enumerate(human.get("matchups", [])):
        for side in ("first", "second"):
            reference, given = matchup[side]["run"] == targets.REFERENCE, "temperature" in matchup[side]
            if reference == given:
                yield (
                    f"human.matchups[{index}].{side}.temperature is {'given' if given else 'missing'}; a run needs "
                    f"one, the reference has none."
                )


def _check_sections(section: Config, task: str) -> Iterator[str]:
    needed = {}
    reference = section.get("reference")
    if reference is not None and reference not in section["runs"]:
        needed[reference] = f"reference is {reference!r}"
    for run, values in section["runs"].items():
        method = METHODS[values["method"]]
        if "reward_model" in needs_of(values["method"], {**section.get(values["method"], {}), **values}):
            needed.setdefault("reward_model", f"the run {run!r} learns from it")
        if method.section:
            needed.setdefault(values["method"], f"the run {run!r} is of this method")
    if "reward_model" in targets.judge_kinds(section):
        needed["gold_reward_model"] = "a judge's kind is 'reward_model'"
    elif targets.learns_gold(section):
        needed["gold_reward_model"] = "frontier.reward is 'gold_reward_model'"
    for name, reason in needed.items():
        if name not in section and name in (*METHODS, "reward_model", "gold_reward_model"):
            yield f"{name} is missing; {reason}, which needs this section."


# Names of models and files that are no runs.
_TAKEN = ("reference", "reward_model", "gold_reward_model", "true_reward", "classifier", "pretrain", "all")


def _check_names(section: Config, task: str) -> Iterator[str]:
    """No run takes the place of a model or file, and none has the name of a method that it is not of."""
    for run, values in section["runs"].items():
        if run in METHODS and run != values["method"]:
            yield f"runs.{run} is of the method {values['method']!r}; a run that is called as a method must be of it."
        if run in _TAKEN or run.startswith("fetched_") or re.search("_(step|round)_", run) or run.endswith("_by_step"):
            yield f"runs.{run} has a name that other files have; give it another."


def _check_comparison(section: Config, task: str) -> Iterator[str]:
    """What the runs of a task with win rates name is there."""
    runs, reference = section["runs"], section["reference"]
    of_sft = [*trained_by("sft"), *(run for run, values in runs.items() if METHODS[values["method"]].trainer == "sft")]
    if reference not in of_sft:
        yield f"reference is {reference!r}; allowed: {', '.join(dict.fromkeys(of_sft))}."
    yield from _check_named(section, "evaluation.opponents", section["evaluation"]["opponents"])
    by_step = section.get("by_step", {}).get("runs") or []
    yield from _check_named(section, "by_step.runs", by_step)
    for index, run in enumerate(by_step):
        if run in runs and METHODS[runs[run]["method"]].trainer is None:
            yield f"by_step.runs[{index}] is {run!r}, for which nothing is trained; leave it out."
        if run in runs and METHODS[runs[run]["method"]].rounds and "frontier" not in section:
            yield (
                f"by_step.runs[{index}] is {run!r}, which is trained in rounds and sampled after each for `frontier` alone; "
                f"set this too, or leave it out."
            )
    most = section.get("best_of_n", {}).get("n", math.inf)
    for run, values in runs.items():
        if section.get(values["method"], {}).get("source", "train") != "train" and len(values) > 1:
            key = next(key for key in values if key != "method")
            source = f"{values['method']}.source"
            yield f"runs.{run}.{key} is not read, since {source} is {section[values['method']]['source']!r}; leave it out."
        if "candidates" not in METHODS[values["method"]].needs or "best_of_n" not in section:
            continue
        n = values.get("n", most)
        if n > most:
            yield f"runs.{run}.n is {n}; allowed: at most best_of_n.n, the number of candidates, which is {most}."
        if n_of(run) not in (None, n):
            yield f"runs.{run}.n is {n}; a run that is called so has the n of its name."
        if not any(temperature > 0 for temperature in section["sampling"]["temperatures"]):
            yield f"runs.{run} is the best of several, which needs a temperature above 0 in sampling.temperatures."
    for run, values in runs.items():
        if n_of(run) and "candidates" not in METHODS[values["method"]].needs:
            yield f"runs.{run} is of the method {values['method']!r}; a run that is called so must be of best_of_n."


def _check_against(section: Config, task: str) -> Iterator[str]:
    """What completions are held against is sampled, and by no people, who see the reference text."""
    against, temperatures = section["evaluation"]["against"], section["sampling"]["temperatures"]
    if against is None:
        return
    yield from _check_run(section, "evaluation.against.run", against["run"])
    if against["temperature"] not in temperatures:
        yield (
            f"evaluation.against.temperature is {against['temperature']:g}; allowed: one of sampling.temperatures, "
            f"which are {', '.join(f'{temperature:g}' for temperature in temperatures)}."
        )
    if "human" in targets.judge_kinds(section):
        yield "evaluation.against is a run, but a judge of the kind 'human' votes on human.matchups; leave one of them out."


def _check_named(section: Config, key: str, named: list[str] | None) -> Iterator[str]:
    """Runs that a key names are runs of the task."""
    for index, run in enumerate(named or []):
        yield from _check_run(section, f"{key}[{index}]", run)


def _check_run(section: Config, key: str, run: str) -> Iterator[str]:
    if run not in section["runs"]:
        yield f"{key} is {run!r}; allowed: the task's runs, which are {', '.join(section['runs'])}."


def _check_transfer(section: Config, task: str) -> Iterator[str]:
    yield from _check_named(section, "evaluation.opponents", section["evaluation"]["opponents"])


def _settings(section: Config) -> Iterator[tuple[str, str, Config]]:
    """Key, method and values of each method's section, and of each run that has values of its own."""
    yield from ((name, name, section[name]) for name in METHODS if name in section)
    for run, own in section["runs"].items():
        if len(own) > 1:
            yield f"runs.{run}", own["method"], {**section.get(own["method"], {}), **own}


def _check_values(section: Config, task: str) -> Iterator[str]:
    """Values that a run names, or that its method's section gives it, go together."""
    for run, own in section["runs"].items():
        name, varies = own["method"], METHODS[own["method"]].varies
        if varies and name in section and varies not in {**section[name], **own}:
            yield f"runs.{run}.{varies} is missing; a run of the method {name!r} is made by it."
    for where, name, values in _settings(section):
        trainer = METHODS[name].trainer
        if trainer == "ppo" and values["minibatches"] > values["prompts_per_update"]:
            yield (
                f"{where}.minibatches is {values['minibatches']}; allowed: at most {where}.prompts_per_update, "
                f"which is {values['prompts_per_update']}."
            )
        if METHODS[name].objective != "dpo":
            continue
        if values["loss"] in ("ipo", "hinge") and values["label_smoothing"] > 0:
            yield f"{where}.label_smoothing is {values['label_smoothing']}; with {where}.loss {values['loss']!r} it must be 0."
        if values["loss"] == "ipo" and values["length_normalized"]:
            yield f"{where}.length_normalized is true; with {where}.loss 'ipo' it is so anyway: leave it out."


def _check_rounds(section: Config, task: str) -> Iterator[str]:
    """Runs in rounds start from a policy that there is, and are labelled by a reward that there is and is not zero."""
    for run, own in section["runs"].items():
        if not METHODS[own["method"]].rounds or own["method"] not in section:
            continue
        values = {**section[own["method"]], **own}
        start = values["start"]
        at_once = [name for name, other in section["runs"].items() if _is_trained_at_once(other)]
        if start is not None and start not in at_once:
            yield f"runs.{run}.start is {start!r}; allowed: a run that is trained at once, which are {', '.join(at_once)}."
        starts = "null" if start is None else repr(start)
        if values["labels"] == "implicit" and (
            start is None or METHODS[section["runs"].get(start, own)["method"]].objective != "dpo"
        ):
            yield (
                f"runs.{run}.labels is 'implicit', but runs.{run}.start is {starts}; name a run of DPO, since the implicit "
                f"reward of any other policy is zero or none that it was trained by."
            )
        if values["labels"] == "true_reward" and not targets.measures_frontier(section):
            yield f"runs.{run}.labels is 'true_reward', but frontier is missing; this section says which reward it is."
        if values["labels"] == "judge" and "judge" not in section:
            yield f"runs.{run}.labels is 'judge', but a sweep has none; allowed: reward_model, true_reward or implicit."
        elif values["labels"] == "judge" and section["judge"]["kind"] == "human":
            yield f"runs.{run}.labels is 'judge', but judge.kind is 'human'; people vote on test prompts alone: name another."
        made = section["data"]["embedded"]
        rows_of = {"prompts": "demonstrations", "validation_prompts": "validation_prompts"}
        if targets.kind(section) == "frontier":
            rows_of = {"prompts": "train", "validation_prompts": "validation"}
        for key, rows in rows_of.items():
            if section["data"]["source"] == "embedded" and values[key] > made[rows]:
                yield f"runs.{run}.{key} is {values[key]}; allowed: at most data.embedded.{rows}, which is {made[rows]}."


def _is_trained_at_once(own: Config) -> bool:
    method = METHODS[own["method"]]
    return method.trainer is not None and not method.rounds


def _check_lengths(section: Config, task: str) -> Iterator[str]:
    lengths = section["lengths"]
    if lengths["max_prompt_length"] >= lengths["max_length"]:
        yield (
            f"lengths.max_prompt_length is {lengths['max_prompt_length']}; allowed: less than "
            f"lengths.max_length, which is {lengths['max_length']}."
        )
    if section.get("base", {}).get("source") in ("scratch", "shipped"):
        longest = section["pretrain"]["max_positions"]
        if lengths["max_length"] > longest:
            yield (
                f"lengths.max_length is {lengths['max_length']}; allowed: at most the base's "
                f"pretrain.max_positions, which is {longest}."
            )
        yield from _check_new_tokens(section, "sampling", after="max_prompt_length")


def _check_prompt(section: Config, task: str) -> Iterator[str]:
    prompt = section["prompt"]
    for key, style in (("system", "chat"), ("suffix", "plain")):
        if prompt[key] is not None and prompt["style"] != style:
            yield f"prompt.{key} is given, which is read where prompt.style is {style!r}; set this too, or leave it out."
    for run, values in section["runs"].items():
        if prompt["style"] == "chat" and "method" in values and METHODS[values["method"]].shots:
            yield f"runs.{run} puts examples before each prompt, which is for prompt.style 'plain'; leave it out by null."


def _check_new_tokens(section: Config, *names: str, after: str) -> Iterator[str]:
    """The longest completions of these sections, and of all that samples while it trains, after the longest prompt."""
    room = section["pretrain"]["max_positions"] - section["lengths"][after]
    sampling = [(name, section[name]) for name in names] + [(where, values) for where, _, values in _settings(section)]
    for name, values in sampling:
        if values.get("max_new_tokens", 0) > room:
            yield (
                f"{name}.max_new_tokens is {values['max_new_tokens']}; allowed: at most {room}, so that it fits into "
                f"pretrain.max_positions after a {'prefix' if after == 'max_prefix' else 'prompt'} of lengths.{after}."
            )


def _check_prefix_lengths(section: Config, task: str) -> Iterator[str]:
    lengths, longest = section["lengths"], section["pretrain"]["max_positions"]
    if not lengths["min_prefix"] <= lengths["max_prefix"] < lengths["max_length"]:
        yield (
            f"lengths.max_prefix is {lengths['max_prefix']}; allowed: from lengths.min_prefix, "
            f"{lengths['min_prefix']}, to less than lengths.max_length, {lengths['max_length']}."
        )
    if section["base"]["source"] != "scratch":
        return
    if lengths["max_length"] > longest:
        yield f"lengths.max_length is {lengths['max_length']}; allowed: at most pretrain.max_positions, {longest}."
    yield from _check_new_tokens(section, "pairs", "evaluation", after="max_prefix")


def _check_models(section: Config, task: str) -> Iterator[str]:
    shape = section["pretrain"]
    if shape["hidden_size"] % shape["heads"]:
        yield f"pretrain.hidden_size is {shape['hidden_size']}; allowed: a multiple of pretrain.heads, {shape['heads']}."
    for name in _BROUGHT:
        model = section.get(name, {"source": None})
        if model["source"] == "path" and model["path"] is None:
            yield f"{name}.path is null; with {name}.source 'path' it must be a local folder of a model."
        elif model["source"] == "path" and not (Path(model["path"]) / "config.json").is_file():
            yield f"{name}.path is {model['path']!r}, where no config.json lies; it must be a folder of a model."
        if model["source"] == "hub" and model["name"] is None:
            yield f"{name}.name is null; with {name}.source 'hub' it must be the name of a model there."


def _check_evaluation(section: Config, task: str) -> Iterator[str]:
    if section["data"]["source"] == "embedded":
        for key in ("validation_prompts", "test_prompts"):
            wanted, made = section["evaluation"][key], section["data"]["embedded"][key]
            if wanted > made:
                yield f"evaluation.{key} is {wanted}; allowed: at most data.embedded.{key}, which is {made}."


def _check_sizes(section: Config, task: str) -> Iterator[str]:
    made = section["data"]["embedded"]
    if section["data"]["source"] == "embedded":
        for name, key, split in (
            ("pairs", "train_prompts", "train"),
            ("pairs", "validation_prompts", "validation"),
            ("evaluation", "prompts", "test"),
        ):
            if section[name][key] > made[split]:
                yield f"{name}.{key} is {section[name][key]}; allowed: at most data.embedded.{split}, {made[split]}."


def _check_ceiling(section: Config, task: str) -> Iterator[str]:
    name, evaluated = ("ceiling", "prompts") if "ceiling" in section else ("frontier", "test_prompts")
    if name not in section:
        return
    values, limit = section[name], section["evaluation"][evaluated]
    if values["prompts"] > limit:
        yield f"{name}.prompts is {values['prompts']}; allowed: at most evaluation.{evaluated}, which is {limit}."
    if values["smallest_beta"] >= values["largest_beta"]:
        yield f"{name}.smallest_beta is {values['smallest_beta']:g}; allowed: less than {name}.largest_beta."


def _check_frontier(section: Config, task: str) -> Iterator[str]:
    """A frontier is of runs that are sampled at temperature 1 while they train, by a reward that there is."""
    if "frontier" not in section:
        return
    if "by_step" not in section:
        yield "by_step is missing; frontier measures what a run writes while it trains, which this section asks for."
    elif 1.0 not in section["by_step"]["temperatures"]:
        yield "by_step.temperatures lacks 1.0; with frontier it must hold it, since a KL is told at temperature 1."
    reward, data = section["frontier"]["reward"], section["data"]
    if reward == "oracle" and data["source"] != "embedded":
        yield (
            f"frontier.reward is 'oracle', which needs data.source 'embedded' and not {data['source']!r}; allowed here: "
            f"gold_reward_model."
        )
    if reward == "gold_reward_model" and "reward_model" not in targets.judge_kinds(section):
        yield from _check_gold(data, "frontier.reward 'gold_reward_model'")


def _check_true_reward(section: Config, task: str) -> Iterator[str]:
    if section["true_reward"]["source"] == "rule" and section["data"]["source"] != "embedded":
        yield (
            f"true_reward.source is 'rule', which needs data.source 'embedded' and not {section['data']['source']!r}; "
            f"allowed here: ngrams, classifier, path or hub."
        )


_CHECKS: dict[str, tuple[Check, ...]] = {
    "comparison": (
        _check_paths,
        _check_votes,
        _check_data,
        _check_judge,
        _check_human,
        _check_sections,
        _check_names,
        _check_comparison,
        _check_against,
        _check_ceiling,
        _check_frontier,
        _check_values,
        _check_rounds,
        _check_prompt,
        _check_sampling,
        _check_lengths,
        _check_models,
        _check_evaluation,
    ),
    "transfer": (
        _check_paths,
        _check_votes,
        _check_data,
        _check_judge,
        _check_human,
        _check_transfer,
        _check_against,
        _check_prompt,
        _check_sampling,
        _check_lengths,
        _check_evaluation,
    ),
    "frontier": (
        _check_paths,
        _check_data,
        _check_prefix_lengths,
        _check_models,
        _check_sizes,
        _check_ceiling,
        _check_sections,
        _check_names,
        _check_values,
        _check_rounds,
        _check_true_reward,
    ),
}
