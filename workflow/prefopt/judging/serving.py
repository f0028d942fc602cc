"""A judge's model on this machine: a server that the first job to ask starts, that all share, and that ends after the last.

A job that asks holds a lock on a file, which the kernel releases however it ends. The stage `serve` keeps the server: it
takes the GPUs, starts the engine, says where it listens, and ends it when nobody has held the lock for a while. Jobs of one
allocation of Slurm share a server, whose life ends with the allocation.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from prefopt.errors import UserError
from prefopt.experiment.recipes import from_json, to_dict
from prefopt.judging.endpoint import Endpoint
from prefopt.judging.server_text import one_line
from prefopt.runtime import devices
from prefopt.runtime.server import HOST, POLL, program_of, started, vllm_words
from prefopt.store.contents import content_of
from prefopt.store.files import canonical_json, try_lock, write_text

logger = logging.getLogger(__name__)

IDLE = 60.0  # seconds without a job that asks, after which a server is ended
_SAY_EVERY = 60.0  # seconds between two messages while a model is loaded

_held: list[int] = []  # file descriptors of this process's locks, kept until it ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeRecipe:
    """What is served by which engine."""

    model: str  # folder of a chat model
    engine: Literal["transformers", "vllm"]
    program: str | None  # the engine's; None: the one that is installed
    gpus: int  # over which the model is spread; 0 is the CPU


class ServedEndpoint(Endpoint):
    """The endpoint of a served model, whose server is started when something is to be asked.

    Args:
        recipe: what is served.
        values: further arguments of an `Endpoint`.
    """

    def __init__(self, recipe: ServeRecipe, **values: Any) -> None:
        self._recipe, self._values, self._is_served = recipe, values, False

    def check(self) -> None:
        # Asked before each batch of prompts: one lock and one client are enough.
        if not self._is_served:
            url = served(self._recipe)
            super().__init__(base_url=f"{url}/v1", model=self._recipe.model, api_key_env=None, **self._values)
            self._is_served = True
        super().check()


def address(recipe: ServeRecipe) -> str:
    """What stands for the endpoint of a served model in the store of replies: engine and content of the model's folder.

    Raises:
        UserError: there is no such folder.
    """
    if not (Path(recipe.model) / "config.json").is_file():
        raise UserError(
            f"{recipe.model} holds no model (it has no config.json), which judge.chat.serve names: give the folder of one."
        )
    return f"served:{recipe.engine}:{content_of({'model': recipe.model})}"


def served(recipe: ServeRecipe, root: Path | None = None, idle: float = IDLE) -> str:
    """Starts a server, or finds the one that runs, and keeps it until this process ends.

    Args:
        recipe: what is served; equal recipes share a server.
        root: private folder of the servers' locks and addresses (default: of this user and machine).
        idle: seconds that a server which is started waits for another job after the last.

    Returns:
        Its address, "http://127.0.0.1:PORT".

    Raises:
        UserError: the server ended while it was started, in its own last words; the folder is not to be trusted.
    """
    key = hashlib.sha256(canonical_json([to_dict(recipe), address(recipe), os.environ.get("SLURM_JOB_ID")]).encode())
    folder = _private(root or Path(tempfile.gettempdir()) / f"prefopt-judges-{os.geteuid()}") / key.hexdigest()[:16]
    folder.mkdir(mode=0o700, exist_ok=True)
    _held.append(_locked(folder / "users", fcntl.LOCK_SH))
    starting = _locked(folder / "start", fcntl.LOCK_EX)  # others wait for who starts it
    try:
        url = _found_or_started(recipe, folder, idle)
    finally:
        os.close(starting)
    logger.info("%s is served at %s (%s)", recipe.model, url, folder / "log")
    return url


def _is_kept(folder: Path) -> bool:
    """Whether a stage `serve` lives, and not only the address that a killed one has left."""
    descriptor = os.open(folder / "kept", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        return not try_lock(descriptor, folder / "kept", required=True)
    finally:
        os.close(descriptor)


def _found_or_started(recipe: ServeRecipe, folder: Path, idle: float) -> str:
    """Waits for the address of the stage `serve` that lives, or of one that is started."""
    keeper: subprocess.Popen[bytes] | None = None
    began = said = time.monotonic()
    while True:
        if keeper is None and not _is_kept(folder):
            keeper = _start(recipe, folder, idle)
        if (url := _told(folder)) is not None:
            return url
        if keeper is not None and keeper.poll() is not None:
            raise UserError(
                f"The server of {recipe.model} ended while it was started: {_last_words(folder)} ({folder / 'log'} has the rest)."
            )
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            logger.info("%s is being loaded by %s for %.0f s", recipe.model, recipe.engine, said - began)
        time.sleep(POLL)


def _start(recipe: ServeRecipe, folder: Path, idle: float) -> subprocess.Popen[bytes]:
    """A new stage `serve`, which outlives this job."""
    (folder / "address").unlink(missing_ok=True)
    words = [sys.executable, "-P", "-m", "prefopt", "serve", "--folder", str(folder), "--idle", str(idle), "--recipe"]
    keys = {word.removeprefix("--unset=") for word in os.environ.get("PREFOPT_UNSET", "").split()}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*words, canonical_json(to_dict(recipe))],
            env={name: value for name, value in os.environ.items() if name not in keys},  # it asks no other judge
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # no signal to the job's group ends it
        )


def _told(folder: Path) -> str | None:
    """Where the server listens, once it does."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        url: str = json.loads((folder / "address").read_text(encoding="utf-8"))["url"]
        return url
    return None


def _last_words(folder: Path) -> str:
    """The engine's last line, and what the stage made of it."""
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return one_line(" | ".join(lines[-2:]), 800) or "without a word"


def _private(folder: Path) -> Path:
    """A folder of this user alone.

    Raises:
        UserError: it is a link, or another user owns or may write it.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise UserError(
            f"{folder}, the folder of judges' servers, is a link or others may use it: remove it, or set TMPDIR to a folder "
            f"of your own."
        )
    return folder


def _locked(path: Path, kind: int) -> int:
    """A file descriptor that holds a lock; waits for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, kind)
    return descriptor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the stage `serve`."""
    parser.add_argument("--recipe", required=True, help="see `ServeRecipe`, a JSON object")
    parser.add_argument("--folder", required=True, type=Path, help="where the lock of who asks lies, and the address")
    parser.add_argument("--idle", type=float, default=IDLE, help="seconds without a job that asks, after which it ends")


def run(args: argparse.Namespace) -> None:
    """Serves until nobody has asked for a while.

    Raises:
        UserError: the engine is not installed, ends by itself, or does not come up.
    """
    recipe = from_json(ServeRecipe, args.recipe)
    _held.append(_locked(args.folder / "kept", fcntl.LOCK_EX))
    devices.take(recipe.gpus)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with contextlib.ExitStack() as stack:
        process, url = started(lambda port: command(recipe, port), recipe.engine, stack)
        write_text(args.folder / "address", canonical_json({"url": url}))
        users = os.open(args.folder / "users", os.O_RDWR | os.O_CLOEXEC)
        asked = time.monotonic()
        while time.monotonic() - asked < args.idle:
            if process.poll() is not None:
                (args.folder / "address").unlink(missing_ok=True)
                raise UserError(f"{recipe.engine} ended by itself with the code {process.returncode}.")
            if try_lock(users, args.folder / "users", required=True):
                fcntl.flock(users, fcntl.LOCK_UN)
            else:
                asked = time.monotonic()
            time.sleep(POLL)
        # Who comes now waits for this lock, finds no address, and starts another.
        fcntl.flock(users, fcntl.LOCK_EX)
        (args.folder / "address").unlink(missing_ok=True)
        logger.info("nobody has asked for %.0f s: the server is ended", args.idle)


def command(recipe: ServeRecipe, port: int) -> list[str]:
    """The command line of an engine that serves the model on this machine alone.

    Raises:
        UserError: its program is not found.
    """
    program = program_of(recipe.engine, recipe.program, "judge.chat.serve.program")
    words = [program, "serve", recipe.model, "--host", HOST, "--port", str(port)]
    match recipe.engine:
        case "transformers":
            return [*words, "--device", "auto" if recipe.gpus else "cpu", "--default-seed", "0"]
        case "vllm":
            return [*words, *vllm_words(recipe.gpus)]
