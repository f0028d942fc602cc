"""The command `preset`: an overlay with what follows from the size of a config's models and from the machine.

It is a file like any other overlay and no key of the config, so that the same config asks for the same results on every
machine.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import UserError
from prefopt.experiment import runs, targets
from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged
from prefopt.experiment.methods import METHODS
from prefopt.planning.architecture import language_model_parameters
from prefopt.planning.estimate import Estimate, hardware
from prefopt.planning.stages import estimates
from prefopt.planning.task import Task
from prefopt.resources import DEFAULTS

Config = dict[str, Any]

CPU = "cpu"
PRESETS: Config = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
# Sections of models that are no runs, and what trains them.
_SCORERS = {"reward_model": "reward", "gold_reward_model": "reward", "classifier": "classifier"}
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `preset`."""
    parser.add_argument("machine", choices=[CPU, *PRESETS["gpus"]], help="what jobs run on")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a job that trains (default: 1)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="CPU cores (default: this machine's)")
    parser.add_argument("--memory", type=float, help="GiB of the host, without a GPU (default: this machine's)")
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="overlays of config/config.yaml, as Snakemake takes them"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the overlay.

    Raises:
        UserError: the config is not right, the size of a model is not known, or nothing fits.
    """
    for name in ("gpus", "cores"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; allowed: a whole number at least 1.")
    on_gpu = args.machine != CPU
    memory = args.memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    machine = _gpu(args.machine, args.gpus, args.cores) if on_gpu else _cpu(args.cores, memory)
    overlay, notes = derived(machine, args.configfile)
    named = "".join(f" {path}" for path in args.configfile)
    lines = [
        f"Of `python -m prefopt preset {args.machine}`. Name it before overlays of your own, whose values come first:",
        f"snakemake ... --configfile preset.yaml{named}",
        *notes,
    ]
    print("\n".join(f"# {line}" for line in lines))
    print(yaml.safe_dump(overlay, sort_keys=False), end="")


def _gpu(card: str, gpus: int, cores: int) -> Config:
    of_card = {**PRESETS["gpus"][card], "utilisation": PRESETS["utilisation"]}
    return {"threads": max(1, cores // gpus), "gpus": gpus, "dtype": "bfloat16", "hardware": of_card}


def _cpu(cores: int, memory: float) -> Config:
    from prefopt.lm.precision import bfloat16_instructions  # torch is slow to import, and not needed for a GPU's plan

    dtype, times = ("bfloat16", 2) if bfloat16_instructions() else ("float32", 1)
    rates = {"tflops": 0.1 * cores * times, "bandwidth_gbps": 20.0, "utilisation": 0.5}
    return {
        **{"threads": cores, "gpus": 0, "dtype": dtype},
        "hardware": {"name": f"a CPU of {cores} cores", "memory_gib": round(memory, 1), **rates},
    }


def derived(machine: Config, files: Sequence[Path]) -> tuple[Config, list[str]]:
    """The overlay, and what it follows from.

    Args:
        machine: a section `compute` of the machine alone.
        files: overlays of the user's own, over the one that is made.

    Raises:
        UserError: the config is not right, the size of a model is not known, or no stage's micro-batch fits.
    """
    config = resolve(merged([DEFAULTS, {"compute": machine}, *files]), files)
    bases = {task: Task(config, task).model("base") for task in config["tasks"] if targets.trainers(config, task)}
    sizes = {task: language_model_parameters(model) for task, (_, model) in bases.items()}
    if max(sizes.values(), default=0) < PRESETS["models"][0]["from"]:
        small = f"All models have fewer than {PRESETS['models'][0]['from']:g} parameters: config.yaml is made for them."
        # One job a core: products of such matrices gain nothing from more.
        compute = {**machine, "threads": 1, "dtype": "float32"} if not machine["gpus"] else machine
        return {"compute": compute}, [small]
    kind = "gpu" if machine["gpus"] else "cpu"
    options = PRESETS["micro_batches"][kind]

    def overlay(option: tuple[bool, int], adapted: Collection[str]) -> Config:
        compute = {**machine, "activation_checkpointing": option[0], "token_budget": option[1]}
        made = {task: _values(config, task, size, kind, task in adapted) for task, size in sizes.items()}
        return {"compute": compute, "tasks": {task: section for task, section in made.items() if section}}

    def planned(values: Config) -> tuple[Config, list[tuple[str, Estimate]]]:
        tried = resolve(merged([DEFAULTS, values, *files]), files)
        return tried, [(task, one) for task in tried["tasks"] for one in estimates(tried, task)]

    logging.disable(logging.WARNING)  # what falls away of a config was said when it was read first
    try:
        tried, stages = planned(overlay(options[-1], ()))
        adapted = {task for task, one in stages if not one.fits(hardware(tried), kind == "gpu")}
        for option in options:
            made = overlay(option, adapted)
            tried, stages = planned(made)
            if all(one.fits(hardware(tried), kind == "gpu") for _, one in stages):
                break
        else:
            raise UserError(
                f"nothing fits: with adapters and micro-batches of {option[1]} tokens the largest stage is "
                f"{_largest(stages, tried)}; name more GPUs by --gpus, a larger machine or a smaller model, or leave its run "
                f"out."
            )
    finally:
        logging.disable(logging.NOTSET)
    how = {True: "adapters are trained, since all weights do not fit", False: "all weights are trained"}
    notes = [f"{task}: {bases[task][0]}, {sizes[task]:,} parameters; {how[task in adapted]}." for task in made["tasks"]]
    return made, [*notes, f"The largest stage is {_largest(stages, tried)}."]


def _values(config: Config, task: str, size: int, kind: str, adapter: bool) -> Config:
    """What a task's section says: values of every trainer that it uses, and how much is evaluated."""
    fitting = [one for one in PRESETS["models"] if one["from"] <= size]
    if not fitting:
        return {}
    section, made = config["tasks"][task], Config()
    for name in targets.trainers(config, task):
        of_run = name in runs.known(config, task)
        key = runs.method(config, task, name) if of_run else name
        trainer = METHODS[key].trainer if of_run else _SCORERS.get(name)
        if trainer is None or key not in section:
            continue
        made[key] = _known(fitting[-1][trainer], section[key])
        if adapter and "adapter" in section[key]:  # PPO has none
            made[key]["adapter"] = dict(PRESETS["adapter"])
            made[key]["learning_rate"] *= PRESETS["adapter_rate"]
    of_evaluation = {key: _known(values, section.get(key, {})) for key, values in PRESETS["evaluation"][kind].items()}
    return {**made, **{key: values for key, values in of_evaluation.items() if values}}


def _known(values: Mapping[str, Any], section: Mapping[str, Any]) -> Config:
    """Copies of those values that the section has: YAML would write one object twice as an alias."""
    return {key: copy.deepcopy(value) for key, value in values.items() if key in section}


def _largest(stages: Sequence[tuple[str, Estimate]], config: Config) -> str:
    """The stage that takes the most memory, in words."""
    on, (task, one) = hardware(config), max(stages, key=lambda pair: pair[1].peak)
    return f"{task} {one.stage}, which takes {one.peak / _GIB:.3g} GiB of {on.memory_gib:g} on {on.name}"
