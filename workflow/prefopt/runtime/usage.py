"""What a job really used: device, dtype, world size, examples, tokens, operations, seconds, peak memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from typing import Any

import torch

from prefopt.runtime import processes

logger = logging.getLogger(__name__)


def default_device() -> torch.device:
    """The first CUDA device that this process may see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Usage:
    """Counts examples, tokens and operations from its creation on, and reports them with what the process took.

    Args:
        stage: the stage's name.
        device: where the model lies.
        dtype: of the forward pass: float32 or bfloat16.
        models: how many models are in memory at once.
    """

    def __init__(self, stage: str, device: torch.device, dtype: str, models: int = 1) -> None:
        self._stage, self._device, self._dtype, self._models = stage, device, dtype, models
        self._start, self._processor_start = time.monotonic(), time.process_time()
        self.examples = 0
        self.tokens = 0
        self.flops = 0
        self.generated_tokens = 0

    def add(self, examples: int, tokens: int, *, flops: int = 0, generated: int = 0) -> None:
        """Adds processed examples (rows, pairs, samples), tokens that a model read, operations and sampled tokens."""
        self.examples += examples
        self.tokens += tokens
        self.flops += flops
        self.generated_tokens += generated

    def report(self) -> dict[str, Any]:
        """Logs one line and returns the figures, for a manifest."""
        seconds = time.monotonic() - self._start
        figures = {
            "stage": self._stage,
            "device": _device_name(self._device),
            "dtype": self._dtype,
            "threads": torch.get_num_threads(),
            "world_size": processes.count(),
            "examples": self.examples,
            "tokens": self.tokens,
            "generated_tokens": self.generated_tokens,
            "flops": self.flops,
            "models": self._models,
            "seconds": round(seconds, 2),
            "device_seconds": round(self._device_seconds(seconds), 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "peak_memory_mib": round(_peak_memory_mib(self._device)),
        }
        logger.info("used: %s", ", ".join(f"{key} {value}" for key, value in figures.items()))
        return figures

    def _device_seconds(self, seconds: float) -> float:
        """Seconds for which accelerators were held; on a CPU, seconds of all its cores together.

        Processes that train together are taken to use as much as this one.
        """
        own = seconds if self._device.type == "cuda" else time.process_time() - self._processor_start
        return own * processes.count()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
