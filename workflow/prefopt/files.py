"""Files that appear whole or not at all, and the hashes that name their content."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
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


def _temporary_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be created ({error.strerror}): choose another place.") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} is not writable: change its permissions or choose another place.")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` when the block ends without an error.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): nothing was left there.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `path` when the block ends without an error.

    Raises:
        UserError: the parent folder cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}): nothing was left there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
