"""The runs of a task: names of the user's own, each a method with values; rows of its tables, lines of its figures."""

from __future__ import annotations

import re
from typing import Any

from prefopt.experiment.methods import METHODS, Method, Need, needs_of

Config = dict[str, Any]

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"  # of a run
SEED = "(seed_[0-9]+/)?"  # the folder of a seed, see `seeds`


def seeds(config: Config) -> dict[str, int]:
    """The config's seeds by the folder below `results/` of what they make; the first seed's is `results/` itself."""
    return {f"seed_{seed}/" if i else "": seed for i, seed in enumerate(config["seeds"])}


def of_seed(config: Config, folder: str) -> Config:
    """A config whose training and sampling have the seed of a folder, see `seeds`."""
    return {**config, "seed": seeds(config)[folder]}


def home(config: Config, task: str) -> str:
    """The task whose models this one samples: itself, unless it transfers another's."""
    name: str = config["tasks"][task].get("models_of", task)
    return name


def reference(config: Config, task: str) -> str:
    """The run that is the reference policy of a task; it need not be a row of its tables."""
    name: str = config["tasks"][home(config, task)].get("reference", "sft")
    return name


def runs(config: Config, task: str) -> list[str]:
    """Names of a task's runs, in the order of its tables."""
    return list(config["tasks"][task]["runs"])


def known(config: Config, task: str) -> list[str]:
    """The same, before them the reference policy where it is the task's own and no row of its tables."""
    own = [reference(config, task)] if home(config, task) == task else []
    return list(dict.fromkeys([*own, *runs(config, task)]))


def method(config: Config, task: str, run: str) -> str:
    """The method of a run; a reference policy that is no row of the tables has the name of its method.

    Raises:
        KeyError: there is no run of this name.
    """
    known = config["tasks"][home(config, task)]["runs"]
    if run not in known and run == reference(config, task):
        return run
    name: str = known[run]["method"]
    return name


def entry(config: Config, task: str, run: str) -> Method:
    """What is known of a run's method."""
    return METHODS[method(config, task, run)]


def values(config: Config, task: str, run: str) -> Config:
    """The values of a run: those of its method's section, and over them those that it names itself."""
    section, name = config["tasks"][home(config, task)], method(config, task, run)
    own = {key: value for key, value in section["runs"].get(run, {}).items() if key != "method"}
    return {**section.get(name, {}), **own}


def group(config: Config, task: str, run: str) -> str:
    """What a frontier is of, the runs of a method that differ in what it varies and in their seed alone: "dpo".

    Other values of a run's own stand behind it: "dpo (loss ipo)", see `methods.of_group`.
    """
    name = method(config, task, run)
    section = config["tasks"][home(config, task)].get(name, {})
    own = values(config, task, run)
    others = [key for key in own if key not in (METHODS[name].varies, "seed") and own[key] != section.get(key)]
    return f"{name} ({', '.join(f'{key} {own[key]}' for key in others)})" if others else name


def needs(config: Config, task: str, run: str) -> tuple[Need, ...]:
    """What is made before a run, beside the model that it starts from."""
    return needs_of(method(config, task, run), values(config, task, run))


def in_rounds(config: Config, task: str) -> dict[str, int]:
    """The number of rounds of each run of a task that is trained in rounds."""
    known = (run for run in runs(config, task) if entry(config, task, run).rounds)
    return {run: values(config, task, run)["rounds"] for run in known}


def policies(config: Config, task: str) -> list[str]:
    """Runs whose samples are a policy's own; the others choose among candidates."""
    return [run for run in runs(config, task) if "candidates" not in entry(config, task, run).needs]


def choices(config: Config, task: str) -> dict[str, int]:
    """The N of each run that is the best of N candidates."""
    chosen = (run for run in runs(config, task) if "candidates" in entry(config, task, run).needs)
    return {run: values(config, task, run)["n"] for run in chosen}


def is_brought(config: Config, task: str, run: str) -> bool:
    """Whether the model of a run, which else were trained here, is the user's own; a base's section says where that is from."""
    trained = entry(config, task, run).trainer is not None
    return trained and values(config, task, run).get("source", "train") != "train"


def stages_of(config: Config, task: str, run: str) -> list[str]:
    """What is trained for a run, in its order, by the names of the models; `reference_..logprobs` is a cached table.

    A round of a run is called as `round_name` says. Nothing before the base is counted: it is given to all of them alike.
    """
    one, own = entry(config, task, run), values(config, task, run)
    before = [reference(config, task)] if one.starts_from == "reference" else []
    before += stages_of(config, task, own["start"]) if own.get("start") else []
    made = [need for need in needs(config, task, run) if need != "candidates"]
    trained = [run] if one.trainer else []
    if one.rounds:
        trained = [round_name(run, number) for number in range(1, own["rounds"] + 1)]
    return list(dict.fromkeys([*before, *made, *trained]))


def round_name(run: str, number: int) -> str:
    """What a round of a run is called where a model's name may stand; round 0 is the policy that the run starts from."""
    return f"{run}_round_{number}"


def round_of(name: str) -> tuple[str, int] | None:
    """Run and number of a round that is called so (see `round_name`); None of any other name."""
    match = re.fullmatch(r"(.+)_round_([0-9]+)", name)
    return (match[1], int(match[2])) if match else None


def opponents(config: Config, task: str) -> list[str]:
    """The runs that every other is compared with: those that the config names, else those of the paper's methods."""
    given: list[str] | None = config["tasks"][task]["evaluation"]["opponents"]
    by_method = [run for name in METHODS for run in runs(config, task) if method(config, task, run) == name]
    return [run for run in by_method if entry(config, task, run).opponent] if given is None else given
