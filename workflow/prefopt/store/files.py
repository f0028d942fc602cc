"""Files that appear whole or not at all, and the hashes that name their content."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt.errors import UserError

logger = logging.getLogger(__name__)


# What a file system without locks answers: Lustre mounted without flock, NFS without its lock daemon, some FUSE ones.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_HELD = {errno.EAGAIN, errno.EACCES}
_warned: set[str] = set()  # folders that were said to have no locks
# What some file systems say to a flush of a folder.
_NO_FLUSH = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS)
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>[0-9]+)\.(tmp|old)")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends without an error.

    The content is on the disk before the name is, so that a power cut leaves the old file or the new one.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        with _one_sentence(path):
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `path` when the block ends without an error.

    All its files are on the disk before the name is.

    Raises:
        UserError: the parent folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary, old = _temporary_beside(path), _aside(path)
    try:
        with _one_sentence(path):
            temporary.mkdir()
            yield temporary
            for folder, _, files in os.walk(temporary):
                for name in files:
                    flush(Path(folder) / name)
                flush(Path(folder))
            if path.exists():
                path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                if old.exists():
                    old.replace(path)
                raise
            flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: str | Path) -> None:
    """Removes a directory that may not be there: as a whole under its name, so that a kill leaves none half removed."""
    path = Path(path)
    if not path.exists():
        return
    path.replace(_aside(path))
    flush(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Removes what processes that are dead have left half written or half removed in a folder.

    Args:
        folder: where to look.
        name: of the file or directory whose leftovers are meant; None: all.
    """
    for entry in Path(folder).iterdir():
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None or name not in (None, match["name"]) or _alive(int(match["pid"])):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def make_folders(path: Path) -> None:
    """Makes a folder and what lacks above it; others may look into them, and not write."""
    lacking = list(itertools.takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    for folder in reversed(lacking):
        folder.mkdir(mode=0o755, exist_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """What a JSON file of this workflow holds.

    Raises:
        UserError: it is not there, or not whole.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: run the stage that makes it.") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is empty" if Path(path).is_file() and not Path(path).stat().st_size else error
        raise UserError(f"{path} is not whole JSON ({reason}): delete it and run its stage again.") from error


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def stable_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _temporary_beside(path: Path) -> Path:
    """Where to write what shall appear as `path`; what dead processes left of it is removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be created ({error.strerror}): choose another place.") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} is not writable: change its permissions or choose another place.")
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _aside(path: Path) -> Path:
    """Where `path` lies while it is removed."""
    return path.with_name(f".{path.name}.{os.getpid()}.old")


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def flush(path: Path) -> None:
    """Waits until a file's content or a folder's list is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns what the system says while `path` is written, a full disk say, into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # safetensors and tokenizers raise errors of their own with Rust's words: "... (os error 28)".
        told = re.search(r"\(os error ([0-9]+)\)", str(error))
        if not isinstance(error, OSError) and told is None:
            raise
        reason = os.strerror(int(told[1])) if told else getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} could not be written ({reason}): nothing was left there.") from error


def check_disk_space(path: str | Path, needed_bytes: int) -> None:
    """Raises UserError where fewer than `needed_bytes` are free on the disk that holds `path`."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{path}: {needed_bytes / 2**20:.0f} MiB are needed for checkpoints and the model, "
            f"{free / 2**20:.0f} MiB are free: make room or choose another disk."
        )


def try_lock(descriptor: int, path: str | Path, byte: int | None = None, required: bool = False) -> bool:
    """Takes an exclusive lock on an open file, without waiting; the kernel releases it however the process ends.

    Args:
        descriptor: the open file.
        path: its path, for messages.
        byte: the place of one byte that is locked against other processes; None: the whole file, against other
            descriptors too.
        required: whether to stop where the file system has no locks, and not to go on with a warning.

    Returns:
        False where another holds it. True where it is held, and where the file system has no locks.

    Raises:
        UserError: the lock fails for another reason, or is required where there are none.
    """
    try:
        if byte is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS or required:
            raise UserError(
                f"{path} cannot be locked ({error.strerror}): choose a folder whose disk has locks."
            ) from error
        folder = str(Path(path).parent)
        if folder not in _warned:
            _warned.add(folder)
            logger.warning(
                "%s: its file system has no locks (%s); going on without: see that no second job works there",
                folder,
                error.strerror,
            )
    return True
