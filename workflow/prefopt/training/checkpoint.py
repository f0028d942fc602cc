"""Checkpoints of one training run: keyed by what went into it, locked, and replaced whole.

They live under `work/`, outside every declared output, because Snakemake deletes declared outputs before
each attempt. A key that holds the recipe, the inputs' hashes and the code keeps a changed run from resuming a
stale checkpoint; the lock keeps an orphan of a killed Snakemake and its successor off one folder.

A checkpoint is a folder of torch.distributed.checkpoint, written by all processes and read by any number of them. Its
facts are written last and hold every file's hash: a checkpoint that was cut is not gone on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
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

from prefopt.errors import UserError
from prefopt.runtime import collectives, processes
from prefopt.runtime.interruption import Interrupted, asked_to_stop, listening
from prefopt.store.files import (
    atomic_path,
    check_disk_space,
    flush,
    make_folders,
    remove_directory,
    remove_leftovers,
    sha256_of_file,
    stable_hash,
    try_lock,
)
from prefopt.store.tables import read_manifest, read_rows
from prefopt.training.checkpoint_files import CheckpointPlanner, CheckpointReader, require_own

logger = logging.getLogger(__name__)

State = dict[str, Any]

# Weights that are not trained (under an adapter) are in the model that the run starts from.
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
_FACTS = "facts.json"
_FILES = "files"  # among the facts: the hash of every file of the checkpoint
_INDEX = ".metadata"  # of torch.distributed.checkpoint


class RunFolder:
    """The folder of one training run, held under an exclusive lock while the context is open.

    Args:
        parent: where the runs of this trainer lie, e.g. `work/tldr/dpo`.
        identity: JSON-ready description of everything that determines the run's result.
        needed_bytes: disk space that the run's checkpoints and result will take.

    Raises:
        UserError: another process trains this very run, the disk is too full, or others may write where it lies.
    """

    def __init__(self, parent: str | Path, identity: dict[str, Any], needed_bytes: int) -> None:
        self.path = Path(parent) / stable_hash(identity)[:16]
        self._identity = identity
        self._needed_bytes = needed_bytes
        self._whole: dict[str, Path | None] = {}  # the last checkpoint of each name, once it was looked for

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as held:
            if processes.is_main():
                check_disk_space(self.path, self._needed_bytes)
                held.enter_context(_locked(self.path))
                self.path.mkdir(mode=0o700, exist_ok=True)
                require_own(self.path)
                for folder in (self.path.parent, self.path):
                    remove_leftovers(folder)
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
        folder = self.path / f"{name}_{_number(old[-1]) + 1 if old else 0:06d}"
        try:
            with _quiet():
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=processes.count() == 1)
            own = {file.name: sha256_of_file(file) for file in folder.glob(f"__{processes.rank()}_*")}
            files = {file: digest for part in collectives.from_each(own) for file, digest in part.items()}
            if processes.is_main():
                files[_INDEX] = sha256_of_file(folder / _INDEX)
                with atomic_path(folder / _FACTS) as temporary:
                    temporary.write_text(json.dumps({**facts, _FILES: files}))
                flush(self.path)
        except (OSError, RuntimeError, UserError, dcp.CheckpointException) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"{folder} could not be written ({_reason(error)}); the last checkpoint is kept."
            ) from error
        collectives.barrier()
        self._whole[name] = folder
        if processes.is_main():
            for path in old:
                shutil.rmtree(path)
        collectives.barrier()

    def facts(self, name: str) -> dict[str, Any] | None:
        """What was kept beside the tensors of the last checkpoint of that name that is whole; None where there is none.

        One that was cut or changed is removed, with a warning.
        """
        if name not in self._whole:
            self._whole[name] = self._last_whole(name)
        folder = self._whole[name]
        return None if folder is None else {k: v for k, v in _facts(folder).items() if k != _FILES}

    def load(self, name: str, tensors: State) -> None:
        """Reads the checkpoint whose facts `facts` gave into `tensors`, whatever number of processes has written it.

        Raises:
            UserError: it does not hold what is asked for.
        """
        folder = self._whole[name]
        assert folder is not None
        try:
            with _quiet():
                dcp.load(
                    tensors,
                    storage_reader=CheckpointReader(folder),
                    planner=CheckpointPlanner(),
                    no_dist=processes.count() == 1,
                )
        except (Exception, dcp.CheckpointException) as error:  # the latter is none of the former
            raise UserError(
                f"{folder} cannot be read ({_reason(error)}): delete {self.path} and run its stage again."
            ) from error

    def begin_anew(self, why: str) -> None:
        """Removes all that the run has kept, since it cannot go on from it."""
        if processes.is_main():
            logger.warning("%s is not whole (%s): the training begins anew", self.path, why)
            for entry in self.path.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        self._whole.clear()
        collectives.barrier()

    def delete(self) -> None:
        """Removes the run's checkpoints once its result is published; the empty lock file stays."""
        if processes.is_main():
            remove_directory(self.path)

    def _folders(self, name: str) -> list[Path]:
        """All folders of that name, whole or not, the last one at the end; the same in every process."""
        entries = [path.name for path in self.path.iterdir()] if processes.is_main() else []
        named = [entry for entry in collectives.from_main(entries) if re.fullmatch(f"{name}_[0-9]+", entry)]
        return sorted((self.path / entry for entry in named), key=_number)

    def _last_whole(self, name: str) -> Path | None:
        for folder in reversed(self._folders(name)):
            # Without facts it was never finished.
            if not collectives.from_main((folder / _FACTS).is_file()):
                continue
            if not (problems := [one for one in collectives.from_each(_problem(folder)) if one]):
                return folder
            if processes.is_main():
                logger.warning("%s is not whole (%s): it is not gone on from", folder, problems[0])
                shutil.rmtree(folder)
        return None


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    return facts


def _problem(folder: Path) -> str:
    """What is wrong with this process's part of a checkpoint's files; "" where it is whole."""
    try:
        files = _facts(folder)[_FILES]
        for file in collectives.in_turn(sorted(files)):
            if sha256_of_file(folder / file) != files[file]:
                return f"{file} was cut or changed"
        CheckpointReader(folder).read_metadata()
    except Exception as error:
        return f"{type(error).__name__}: {_reason(error)}"
    return ""


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        make_folders(path.parent)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be used for checkpoints ({error.strerror}): choose another.") from error
    try:
        if not try_lock(lock, path):
            raise UserError(f"{path} is in use by another training process: wait for it or stop it.")
        yield
    finally:
        os.close(lock)


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
        facts = run.facts("checkpoint")
        if facts is not None and (why := collectives.from_main(self._lacks(facts))):
            run.begin_anew(why)
            facts = None
        if facts is not None:
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
        tables = sorted(path.name for path in self._run.path.glob("*.parquet"))
        facts = {"step": self.step, "best": self._best, "metrics": self.metrics, "tables": tables}
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
        if self._best is not None:
            kept = self._run.facts("best")
            assert kept is not None
            weights = self._published_weights()
            self._run.load("best", weights)
            set_model_state_dict(self._published, weights["model"], options=_TRAINED)
            logger.info("%s: kept step %d of %d, the best on validation", self._name, kept["step"], self.step)

    def _lacks(self, facts: dict[str, Any]) -> str:
        """What a checkpoint needs and the run folder lacks: the best weights so far, tables of steps that are done."""
        if not {"step", "best", "metrics", "tables"} <= facts.keys():
            return "its facts are not all there"
        if facts["best"] is not None and self._run.facts("best") is None:
            return "the best weights so far are not there"
        for name in facts["tables"]:
            try:
                read_rows(self._run.path / name, read_manifest(self._run.path / name)["table"])
            except UserError as error:
                return str(error)
        return ""

    def _tensors(self) -> State:
        return {
            "model": get_model_state_dict(self._trained, options=_TRAINED),
            "optimizer": get_optimizer_state_dict(self._trained, self._optimizer, options=_TRAINED),
        }

    def _published_weights(self) -> State:
        return {"model": get_model_state_dict(self._published, options=_TRAINED)}
