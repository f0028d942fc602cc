"""Checkpoints of one training run: keyed by what went into it, locked, and replaced whole.

They live under `work/`, outside every declared output, because Snakemake deletes declared outputs before
each attempt. A key that holds the recipe, the inputs' hashes and the code keeps a changed run from resuming a
stale checkpoint; the lock keeps an orphan of a killed Snakemake and its successor off one folder.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from prefopt.errors import UserError
from prefopt.files import atomic_path, check_disk_space, stable_hash

logger = logging.getLogger(__name__)

State = dict[str, Any]


class RunFolder:
    """The folder of one training run, held under an exclusive lock while the context is open.

    Args:
        parent: where the runs of this trainer lie, e.g. `work/tldr/dpo`.
        identity: JSON-ready description of everything that determines the run's result.
        needed_bytes: disk space that the run's checkpoints and result will take.

    Raises:
        UserError: another process trains this very run, or the disk is too full.
    """

    def __init__(self, parent: str | Path, identity: dict[str, Any], needed_bytes: int) -> None:
        self.path = Path(parent) / stable_hash(identity)[:16]
        self._identity = identity
        self._needed_bytes = needed_bytes

    def __enter__(self) -> Self:
        check_disk_space(self.path, self._needed_bytes)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path.parent / f"{self.path.name}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(f"{self.path} is in use by another training process: wait for it or stop it.") from error
        self.path.mkdir(exist_ok=True)
        with atomic_path(self.path / "identity.json") as temporary:
            temporary.write_text(json.dumps(self._identity, indent=1, sort_keys=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def save(self, state: State, name: str = "checkpoint.pt") -> None:
        """Replaces the checkpoint with `state` (tensors, numbers, strings, lists and dicts of them)."""
        with atomic_path(self.path / name) as temporary:
            torch.save(state, temporary)

    def load(self, name: str = "checkpoint.pt") -> State | None:
        """The last checkpoint, on the CPU, or None where there is none."""
        path = self.path / name
        if not path.exists():
            return None
        state: State = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def delete(self) -> None:
        """Removes the run's checkpoints once its result is published; the empty lock file stays."""
        shutil.rmtree(self.path, ignore_errors=True)


class TrainingState:
    """Where a run stands: its step, its metrics and its best weights; saved and resumed as one.

    Args:
        name: shown in log lines.
        run: an open run folder.
        trained: all that is trained; its weights are the checkpoint's.
        published: the part of it whose weights are the run's result.
        optimizer: over `trained`.
        keep: `best` publishes the weights with the highest objective on validation, `last` the last.
    """

    def __init__(
        self,
        name: str,
        run: RunFolder,
        trained: nn.Module,
        published: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: str,
    ) -> None:
        self._name, self._run, self._trained, self._published = name, run, trained, published
        self._optimizer, self._keep = optimizer, keep
        self._best: float | None = None
        self.step = 0
        self.metrics: list[dict[str, Any]] = []
        if (state := run.load()) is not None:
            trained.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self._best = state["step"], state["best"]
            self.metrics = json.loads(state["metrics"])
            logger.info("%s: resumed after step %d", name, self.step)

    def record(self, split: str, figures: dict[str, float]) -> None:
        """Adds the figures of the present step to the metrics."""
        self.metrics.append({"step": self.step, "split": split, **figures})

    def keep_if_best(self, objective: float) -> None:
        """Keeps the present weights for publication if `objective` is the highest so far and the best is asked for."""
        if self._keep == "best" and (self._best is None or objective > self._best):
            self._best = objective
            self._run.save({"model": self._published.state_dict(), "step": self.step}, "best.pt")

    def save(self) -> None:
        """Replaces the run's checkpoint."""
        self._run.save(
            {
                "model": self._trained.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "step": self.step,
                "best": self._best,
                "metrics": json.dumps(self.metrics),
            }
        )

    def finish(self) -> None:
        """Saves the end of the run and leaves the weights to publish in the model."""
        self.save()
        if (kept := self._run.load("best.pt")) is not None:
            self._published.load_state_dict(kept["model"])
            logger.info("%s: kept step %d of %d, the best on validation", self._name, kept["step"], self.step)
