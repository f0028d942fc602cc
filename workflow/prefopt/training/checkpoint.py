"""Checkpoints of one training run: keyed by what went into it, locked, and replaced whole.

They live under `work/`, outside every declared output, because Snakemake deletes declared outputs before
each attempt. A key that holds the recipe, the inputs' hashes and the code keeps a changed run from resuming a
stale checkpoint; the lock keeps an orphan of a killed Snakemake and its successor off one folder.

A checkpoint is a folder of torch.distributed.checkpoint, written by all processes and read by any number of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from prefopt import collectives, processes
from prefopt.errors import UserError
from prefopt.files import atomic_path, check_disk_space, stable_hash
from prefopt.interruption import Interrupted, asked_to_stop, listening

logger = logging.getLogger(__name__)

State = dict[str, Any]

# Weights that are not trained (under an adapter) are in the model that the run starts from.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_FACTS = "facts.json"


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
        with contextlib.ExitStack() as held:
            if processes.is_main():
                check_disk_space(self.path, self._needed_bytes)
                held.enter_context(_locked(self.path))
                self.path.mkdir(exist_ok=True)
                with atomic_path(self.path / "identity.json") as temporary:
                    temporary.write_text(json.dumps(self._identity, indent=1, sort_keys=True))
            collectives.barrier()
            held.enter_context(listening())
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def save(self, name: str, tensors: State, facts: dict[str, Any]) -> None:
        """Replaces the checkpoint of that name; the last one stays until the new one is whole.

        Args:
            name: of the checkpoint.
            tensors: state dicts of models and optimizers; every process gives its shards.
            facts: what else to keep, ready for JSON.

        Raises:
            UserError: it cannot be written, e.g. because the disk is full.
        """
        old = self._folders(name)
        folder = self.path / f"{name}_{int(old[-1].name.rpartition('_')[2]) + 1 if old else 0:06d}"
        try:
            if processes.is_main():
                shutil.rmtree(folder, ignore_errors=True)  # what a killed process left half written
            collectives.barrier()
            with _quiet():
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=processes.count() == 1)
            if processes.is_main():
                with atomic_path(folder / _FACTS) as temporary:
                    temporary.write_text(json.dumps(facts))
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"{folder} could not be written ({_reason(error)}); the last checkpoint is kept."
            ) from error
        collectives.barrier()
        if processes.is_main():
            for path in old:
                shutil.rmtree(path)
        collectives.barrier()

    def facts(self, name: str) -> dict[str, Any] | None:
        """What was kept beside the tensors of the last checkpoint of that name; None where there is none."""
        folders = self._folders(name)
        facts: dict[str, Any] | None = json.loads((folders[-1] / _FACTS).read_text()) if folders else None
        return facts

    def load(self, name: str, tensors: State) -> None:
        """Reads the last checkpoint of that name into `tensors`, whatever number of processes has written it."""
        reader = dcp.FileSystemReader(self._folders(name)[-1])
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=processes.count() == 1)

    def delete(self) -> None:
        """Removes the run's checkpoints once its result is published; the empty lock file stays."""
        if processes.is_main():
            shutil.rmtree(self.path, ignore_errors=True)

    def _folders(self, name: str) -> list[Path]:
        """Checkpoints of that name that are whole, the last one at the end."""
        return sorted(path for path in self.path.glob(f"{name}_*") if (path / _FACTS).is_file())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path} is in use by another training process: wait for it or stop it.") from error
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a process is alone, which it is meant to be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """The first line of what went wrong."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).splitlines()[0] if str(error) else type(error).__name__


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
        if (facts := run.facts("checkpoint")) is not None:
            tensors = self._tensors()
            run.load("checkpoint", tensors)
            set_model_state_dict(trained, tensors["model"], options=_TRAINED)
            set_optimizer_state_dict(trained, optimizer, tensors["optimizer"], options=_TRAINED)
            self.step, self._best, self.metrics = facts["step"], facts["best"], facts["metrics"]
            logger.info("%s: resumed after step %d", name, self.step)

    def record(self, split: str, figures: dict[str, float]) -> None:
        """Adds the figures of the present step to the metrics."""
        self.metrics.append({"step": self.step, "split": split, **figures})

    def keep_if_best(self, objective: float) -> None:
        """Keeps the present weights for publication if `objective` is the highest so far and the best is asked for."""
        if self._keep == "best" and (self._best is None or objective > self._best):
            self._best = objective
            self._run.save("best", self._published_weights(), {"step": self.step})

    def save(self) -> None:
        """Replaces the run's checkpoint."""
        facts = {"step": self.step, "best": self._best, "metrics": self.metrics}
        self._run.save("checkpoint", self._tensors(), facts)

    def save_if_due(self, every: int, total: int) -> None:
        """Saves every so many steps, and when asked to stop.

        Raises:
            Interrupted: this or another process of the run was asked to stop.
        """
        if self.step == total:
            return
        stop = collectives.agreed(asked_to_stop())
        if stop or self.step % every == 0:
            self.save()
        if stop:
            raise Interrupted(f"{self._name}: saved after step {self.step} of {total}; run it again to go on.")

    def finish(self) -> None:
        """Saves the end of the run and leaves the weights to publish in the model."""
        self.save()
        if (kept := self._run.facts("best")) is not None:
            weights = self._published_weights()
            self._run.load("best", weights)
            set_model_state_dict(self._published, weights["model"], options=_TRAINED)
            logger.info("%s: kept step %d of %d, the best on validation", self._name, kept["step"], self.step)

    def _tensors(self) -> State:
        return {
            "model": get_model_state_dict(self._trained, options=_TRAINED),
            "optimizer": get_optimizer_state_dict(self._trained, self._optimizer, options=_TRAINED),
        }

    def _published_weights(self) -> State:
        return {"model": get_model_state_dict(self._published, options=_TRAINED)}
