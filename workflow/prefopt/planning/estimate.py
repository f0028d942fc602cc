"""What one stage takes, and which GPUs its job is given."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from prefopt.experiment.methods import trained
from prefopt.planning import memory, work
from prefopt.planning.memory import Parts
from prefopt.planning.work import Hardware, Phase

Config = dict[str, Any]

# Stages whose job takes all GPUs of the config; any other model runs on one.
SHARDED = frozenset(
    {
        *("pretrain", *trained(), "reference", "reference_labels", "round_reference", "reward_model"),
        *("gold_reward_model", "classifier"),
    }
)
# A process without a model, in megabytes: the interpreter and torch; with a GPU, CUDA's libraries too.
_FOOTPRINT = {False: 1000, True: 3000}
_MARGIN = 1.25
# glibc keeps freed blocks that lie between others, so that on a CPU what comes and goes is held more than once: in trainings of
# SmolLM2-135M 2.1 to 4.3 times, the more the longer they ran, where it only read or sampled 1.1 to some 2 times.
_COMES_AND_GOES = ("activations", "passing", "cache")
_HELD = {True: 3.5, False: 2.0}  # trained or not; `_MARGIN` takes the rest
# Of a GPU's memory: the rest is CUDA's own, and what its allocator cannot use between blocks.
_USABLE = 0.92


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a job of a stage takes."""

    stage: str
    name: str  # of the model, as the hub calls it
    parameters: int  # of the model that is trained, sampled or read
    processes: int  # GPUs, or 1 on a CPU
    parts: Parts  # bytes in each process at its peak
    phases: list[Phase]
    jobs: int = 1  # equal ones

    @property
    def peak(self) -> int:
        """Bytes in each process at its peak, without the interpreter."""
        return memory.total(self.parts)

    @property
    def held(self) -> int:
        """Bytes that a process on a CPU holds at its peak, with what its allocator keeps."""
        passing = sum(self.parts.get(part, 0) for part in _COMES_AND_GOES)
        return round(self.peak + (_HELD["activations" in self.parts] - 1) * passing)

    @property
    def flops(self) -> int:
        """Operations of a job."""
        return sum(phase.flops for phase in self.phases)

    def hours(self, hardware: Hardware) -> float:
        """Hours of a job."""
        return work.hours(self.phases, hardware, self.processes)

    def host_megabytes(self, gpu: bool, nodes: int = 1) -> int:
        """Megabytes of a host's memory: all that a job takes on a CPU, else its weights as they are loaded and saved.

        Of a job with GPUs one process holds the whole model in float32.

        Args:
            gpu: whether the job has GPUs.
            nodes: hosts that share it.
        """
        model = 4 * self.parameters if gpu else self.held
        return math.ceil((model / 1e6 + math.ceil(self.processes / nodes) * _FOOTPRINT[gpu]) * _MARGIN)

    def fits(self, hardware: Hardware, gpu: bool) -> bool:
        """Whether a process's peak fits one GPU, or the host."""
        room = hardware.memory_gib * 2**30
        return self.peak <= room * _USABLE if gpu else self.held + _FOOTPRINT[gpu] * 1e6 <= room


def hardware(config: Config) -> Hardware:
    """The config's hardware."""
    return Hardware(**config["compute"]["hardware"])


def gpus(config: Config, stage: str) -> int:
    """GPUs of a stage's job: `compute.gpus` on each node where a model is trained or all pairs are read, else one at most."""
    given: int = config["compute"]["gpus"]
    return given * nodes(config, stage) if stage in SHARDED else min(1, given)


def nodes(config: Config, stage: str) -> int:
    """Nodes of a stage's job."""
    given: int = config["compute"]["nodes"]
    return given if stage in SHARDED else 1
