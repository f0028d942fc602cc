"""The command `plan`: what every stage that runs a model will take, and whether it fits, before anything is submitted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.experiment import targets
from prefopt.experiment.config import resolve
from prefopt.experiment.explained import merged
from prefopt.planning.estimate import Estimate, hardware
from prefopt.planning.stages import estimates
from prefopt.planning.work import Hardware
from prefopt.resources import DEFAULTS
from prefopt.store.files import write_text

Config = dict[str, Any]

_COLUMNS = ("stage", "jobs", "model", "parameters", "{device}", "GiB each", "host GB", "PFLOP", "hours")
_GIB = 2**30

_CHECKPOINTING = "compute.activation_checkpointing"
_MORE_GPUS = "more GPUs (compute.gpus)"
_ACTIVATIONS = ("activations", "passing")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command `plan`."""
    parser.add_argument(
        "--configfile", nargs="+", type=Path, default=[], help="overlays of config/config.yaml, as Snakemake takes them"
    )
    parser.add_argument("--json", type=Path, help="file to write the same figures to")


def run(args: argparse.Namespace) -> None:
    """Prints the plan.

    Raises:
        UserError: the config is not right, or the size of a model is not known.
    """
    config = resolve(merged([DEFAULTS, *args.configfile]), args.configfile)
    made = {task: estimates(config, task) for task in config["tasks"]}
    print(report(config, made))
    if args.json is not None:
        write_text(args.json, json.dumps(figures(config, made), indent=1) + "\n")


def report(config: Config, made: dict[str, list[Estimate]]) -> str:
    """The plan as text: a table for each task, what was assumed, and what does not fit."""
    on, gpu = hardware(config), config["compute"]["gpus"] > 0
    lines = [f"On {on.name}: {_summary(on)}."]
    for task, stages in made.items():
        unit = "GPU-hours" if gpu else "hours"
        total = sum(one.hours(on) * one.jobs * one.processes for one in stages)
        lines += ["", f"{task}: {_number(total)} {unit} in all", *_table(stages, on, gpu, config["compute"]["nodes"])]
    lines += ["", "Assumed:", *(f"- {line}" for line in _assumed(config, gpu))]
    warnings = [_warning(config, task, one) for task, stages in made.items() for one in stages if not one.fits(on, gpu)]
    return "\n".join([*lines, *([""] if warnings else []), *warnings])


def figures(config: Config, made: dict[str, list[Estimate]]) -> list[dict[str, Any]]:
    """The same as rows: memory in bytes, operations and hours of one job."""
    on, gpu = hardware(config), config["compute"]["gpus"] > 0
    return [
        {
            **{"task": task, "stage": one.stage, "jobs": one.jobs, "model": one.name, "parameters": one.parameters},
            **{"processes": one.processes, "peak_bytes": one.peak, "parts": one.parts, "flops": one.flops},
            **{
                "hours": one.hours(on),
                "fits": one.fits(on, gpu),
                "host_megabytes": one.host_megabytes(gpu, config["compute"]["nodes"]),
            },
        }
        for task, stages in made.items()
        for one in stages
    ]


def _table(stages: Sequence[Estimate], on: Hardware, gpu: bool, nodes: int) -> list[str]:
    rows = [tuple(column.format(device="GPUs" if gpu else "processes") for column in _COLUMNS)]
    for one in stages:
        numbers = (one.peak / _GIB, one.host_megabytes(gpu, nodes) / 1000, one.flops / 1e15, one.hours(on))
        shown = (_number(value) for value in numbers)
        rows.append((one.stage, str(one.jobs), one.name, f"{one.parameters:,}", str(one.processes), *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = ("stage", "model")
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if title in left else cell.rjust(width)
            for cell, width, title in zip(row, widths, _COLUMNS, strict=True)
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    """Three digits, and none after the point from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _summary(on: Hardware) -> str:
    return (
        f"{on.memory_gib:g} GiB, {on.tflops:g} TFLOP/s and {on.bandwidth_gbps:g} GB/s, of which {on.utilisation:.0%} are "
        f"expected to be reached"
    )


def _assumed(config: Config, gpu: bool) -> list[str]:
    compute = config["compute"]
    sources = {section["data"]["source"] for section in config["tasks"].values()}
    lines = [
        "hours are those of one job; a sweep's run is counted once a row, its jobs are given beside it",
        f"weights, gradients and optimizer states in float32, passes in {compute['dtype']}, micro-batches of "
        f"{compute['token_budget']} tokens, of rows half again as long as the mean",
        "host GB is the memory that a job asks for (mem_mb), with a margin of a quarter, and on a CPU what the allocator keeps",
        "a step of sampling reads all weights once; a batch of completions goes on to max_new_tokens",
        "loading, checkpoints and communication are not counted",
    ]
    if any(targets.vllm(section) for section in config["tasks"].values()):
        lines.append("vLLM takes nine tenths of each GPU; what stands there is what it needs for one row at least")
    if sources - {"embedded"}:
        lines.append(
            "numbers and lengths of records that are not prepared yet: workflow/prefopt/planning/assumptions.yaml"
        )
    if gpu:
        lines.append(
            "the GPUs of a job share weights, gradients and optimizer states; a warning comes above 92% of a GPU's memory"
        )
        lines.append("a step of sampling takes at least a millisecond a layer, for Python and launches")
        lines.append(
            "memory was compared with measured peaks on a CPU and one H200, hours with steps on it (benchmarks/results)"
        )
    else:
        lines.append("memory is without the interpreter and torch, some 600 MB")
    return lines


def _warning(config: Config, task: str, one: Estimate) -> str:
    """Which stage does not fit, what most of it is, and what helps."""
    on, trains = hardware(config), "optimizer" in one.parts
    of_activations = sum(size for part, size in one.parts.items() if part in _ACTIVATIONS)
    cache = one.parts.get("cache", 0)
    sizes = {
        "for weights and what belongs to them": one.peak - of_activations - cache,
        "for activations": of_activations,
        "for the cache of sampling": cache,
    }
    largest = max(sizes, key=lambda name: sizes[name])
    served = ["sampling by vLLM over more GPUs"] if one.stage.split()[0] in targets.SAMPLED else []
    helping = {
        "for weights and what belongs to them": [
            *((_MORE_GPUS, "an adapter") if trains else served),
            "a smaller model",
        ],
        "for activations": [
            *([_CHECKPOINTING] if trains and not config["compute"]["activation_checkpointing"] else []),
            "a smaller compute.token_budget",
            *([_MORE_GPUS] if trains else []),
        ],
        "for the cache of sampling": ["fewer new tokens", "fewer completions of each prompt", "a smaller model"],
    }[largest]
    return (
        f"warning: {task} {one.stage} takes {_number(one.peak / _GIB)} GiB of {on.memory_gib:g} on {on.name}, of which "
        f"{_number(sizes[largest] / _GIB)} GiB {largest}; what helps: {', '.join(helping)}."
    )
