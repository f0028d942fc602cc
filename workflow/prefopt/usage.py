"""What a job really used: device, dtype, world size, examples, tokens per second, peak memory."""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
from typing import Any

import torch

logger = logging.getLogger(__name__)


def default_device() -> torch.device:
    """The first CUDA device that this process may see, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Usage:
    """Counts examples and tokens from its creation on, and reports them with what the process took.

    Args:
        stage: the stage's name.
        device: where the model lies.
        dtype: of the forward pass.
    """

    def __init__(self, stage: str, device: torch.device, dtype: torch.dtype) -> None:
        self._stage, self._device, self._dtype = stage, device, dtype
        self._start = time.monotonic()
        self.examples = 0
        self.tokens = 0

    def add(self, examples: int, tokens: int) -> None:
        """Adds processed examples (rows, pairs, samples) and the tokens that a model read for them."""
        self.examples += examples
        self.tokens += tokens

    def report(self) -> dict[str, Any]:
        """Logs one line and returns the figures, for a manifest."""
        seconds = time.monotonic() - self._start
        figures = {
            "stage": self._stage,
            "device": _device_name(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "peak_memory_mib": round(_peak_memory_mib(self._device)),
        }
        logger.info("used: %s", ", ".join(f"{key} {value}" for key, value in figures.items()))
        return figures


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
