"""What a rule asks the scheduler for, computed from its model's size and the config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prefopt.errors import UserError
from prefopt.experiment import targets
from prefopt.planning.estimate import gpus, hardware, nodes
from prefopt.planning.stages import estimate

Config = dict[str, Any]

# Where the size of a model is not known before it is fetched: what one of six billion parameters takes on a GPU.
UNKNOWN = {"mem_mb": 64000, "runtime": 1440}
_SAFETY = 3
_SHORTEST = 30  # minutes
_OF_VLLM = 8000  # megabytes of vLLM's processes, and on a CPU of its cache, whose size is its own default


def needs(config: Config, task: str, stage: str, name: str | None = None) -> dict[str, int]:
    """The resources of a job of a rule that runs a model.

    Args:
        config: a resolved config, whose `compute.mem_mb` and `compute.runtime` override what is computed.
        task: key of `tasks`.
        stage: the rule's name.
        name: of `frontier_run`, `sample` and a method's rule the run.

    Returns:
        `gpu`, on all `nodes` together; `mem_mb`, memory of each host in megabytes; `runtime` in minutes.
    """
    given = {key: config["compute"][key] for key in ("mem_mb", "runtime")}
    computed = dict(UNKNOWN)
    if None in given.values():
        try:
            one = estimate(config, task, stage, name)
        except UserError:
            pass  # `prefopt plan` says what is not known; it need not keep a run from starting
        else:
            minutes = math.ceil(_SAFETY * 60 * one.hours(hardware(config)))
            computed = {
                "mem_mb": one.host_megabytes(config["compute"]["gpus"] > 0, config["compute"]["nodes"]),
                "runtime": max(_SHORTEST, minutes),
            }
    overriding = {key: value for key, value in given.items() if value is not None}
    devices, vllm = gpus(config, stage), targets.sampler(config["tasks"][task], stage)
    if vllm is not None:
        devices = vllm["gpus"]
        computed["mem_mb"] += _OF_VLLM
    return {"gpu": devices, "nodes": nodes(config, stage), **computed, **overriding}


def over_nodes(config: Config, stage: str) -> dict[str, Any]:
    """What else a rule tells Snakemake's Slurm executor, where its job has several nodes: its stage places itself by `srun`.

    Else that executor would start it by a step of one task, which can hold the GPUs of one node alone.
    """
    count = nodes(config, stage)
    return {"mpi": "srun", "tasks": count, "tasks_per_gpu": 0} if count > 1 else {}


def of_served(serve: Config) -> dict[str, int]:
    """`gpu` and `mem_mb` of a job whose judge is a model that it may have to serve, by the size of the model's files."""
    size = sum(file.stat().st_size for file in Path(serve["model"]).glob("*.safetensors"))
    # On a GPU the host holds a part at a time, and on a CPU all, in bfloat16's place perhaps in float32.
    return {"gpu": serve["gpus"], "mem_mb": 4000 + math.ceil((0.5 if serve["gpus"] else 2.5) * size / 1e6)}
