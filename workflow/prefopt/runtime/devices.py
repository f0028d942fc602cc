"""GPUs for jobs that run side by side on one machine: each is lent to one job at a time.

A lease is a lock on a file, which the kernel releases however the job ends. The files belong to the machine and not to a
working directory: two Snakemake processes share them. Their folder is one that anybody may write, so nothing in it is
trusted: no link is followed, and a folder of another user is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import UserError
from prefopt.store.files import try_lock

logger = logging.getLogger(__name__)

LEASES = Path(tempfile.gettempdir()) / "prefopt-gpus"
_POLL = 1.0  # seconds between two looks at devices that are all lent
_SAY_EVERY = 60.0  # seconds between two messages while waiting

_held: list[int] = []  # file descriptors of this process's leases, kept until it ends


def take(wanted: int, folder: Path = LEASES, timeout: float | None = None) -> list[str]:
    """Lets this process see `wanted` GPUs that no other job has, and no others, by CUDA_VISIBLE_DEVICES.

    Must be called before CUDA is initialised. Inside a Slurm job the devices that Slurm gave are lent among the jobs of
    that allocation. Where there is none, or none is wanted, the process runs on the CPU.

    Args:
        wanted: how many; 0 hides all.
        folder: where the locks lie.
        timeout: seconds to wait for a free device; None: for ever.

    Returns:
        The devices' names, as CUDA_VISIBLE_DEVICES holds them; empty on the CPU.

    Raises:
        UserError: there are some devices, but fewer than wanted, or none came free in time; CUDA_VISIBLE_DEVICES names
            one that is not there; the folder of the locks is not to be trusted, or has none.
    """
    if wanted == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        logger.info("no GPU is asked for (compute.gpus): running on the CPU")
        return []
    allocation = os.environ.get("SLURM_JOB_ID") if "CUDA_VISIBLE_DEVICES" in os.environ else None
    if allocation is not None:
        devices = _visible() or []
        logger.info("devices of Slurm: %s", ", ".join(devices) or "none")
    else:
        devices = present()
    if not devices:
        logger.info("no GPU is seen: running on the CPU")
        return []
    if wanted > len(devices):
        raise UserError(
            f"{wanted} GPUs are asked for, this machine shows {len(devices)}: lower compute.gpus, or run where there "
            f"are more."
        )
    if wanted > 1 and any(name.startswith("MIG-") for name in devices):
        raise UserError(
            f"{wanted} GPUs are asked for, but a process sees one MIG instance alone: set compute.gpus to 1."
        )
    node = os.environ.get("SLURMD_NODENAME", "")
    # Slurm may count each allocation's devices from 0, so that the same number is another device in another one.
    leased = _lease(
        devices, wanted, folder, timeout, prefix=f"slurm-{allocation}-{node}-" if allocation is not None else ""
    )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(leased)
    logger.info("leased: %s", ", ".join(leased))
    return leased


def held() -> list[int]:
    """File descriptors of this process's leases, for processes of its own that shall hold them too."""
    return list(_held)


def present() -> list[str]:
    """The GPUs of this machine that the user lets us see, by their unique names; without initialising CUDA.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES names a device that nvidia-smi does not list.
    """
    names, visible = _listed(), _visible()
    if visible is None:
        return list(names.values())
    found = []
    for one in visible:
        # A device of the variable is an index or (the start of) a unique name. nvidia-smi lists no MIG instances.
        name = names.get(one) or next((uuid for uuid in names.values() if uuid.startswith(one)), None)
        if name is None and one.startswith("MIG-"):
            name = one
        if name is None:
            listed = ", ".join(names.values())
            raise UserError(
                f"CUDA_VISIBLE_DEVICES names {one!r}, but nvidia-smi lists "
                + (
                    f"{listed}: name one of them."
                    if names
                    else "no GPU: unset it, or set compute.gpus to 0 for the CPU."
                )
            )
        found.append(name)
    return list(dict.fromkeys(found))


def _listed() -> dict[str, str]:
    """The unique name of each GPU that nvidia-smi lists, by its index there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=index,uuid", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        logger.warning("nvidia-smi fails, so that no GPU is seen: %s", (result.stderr or result.stdout).strip())
        return {}
    lines = [line.partition(",") for line in result.stdout.splitlines()]
    return {index.strip(): uuid.strip() for index, _, uuid in lines}


def _visible() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists; None where it is not set. As for CUDA, what follows -1 is hidden."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    listed = [part.strip() for part in value.split(",") if part.strip()]
    hidden = next((i for i, one in enumerate(listed) if one in ("-1", "NoDevFiles")), len(listed))
    return listed[:hidden]


def _lease(devices: Sequence[str], wanted: int, folder: Path, timeout: float | None, prefix: str = "") -> list[str]:
    """Locks the first free devices; takes all or none, so that two jobs never wait for each other's half."""
    _make_shared(folder)
    files = {name: folder / f"{re.sub(r'[^A-Za-z0-9_-]', '_', prefix + name)}.lock" for name in devices}
    start = said = time.monotonic()
    while True:
        locked = {name: handle for name in devices if (handle := _lock(files[name])) is not None}
        taken = list(locked)[:wanted] if len(locked) >= wanted else []
        for name, handle in locked.items():
            if name not in taken:
                os.close(handle)
        if taken:
            _held.extend(locked[name] for name in taken)
            return taken
        now = time.monotonic()
        if timeout is not None and now - start > timeout:
            raise UserError(f"No {wanted} of {len(devices)} GPUs came free in {timeout:g} s: wait for other jobs.")
        if now - said > _SAY_EVERY:
            said = now
            logger.info("all GPUs are lent to other jobs; waiting for %.0f s", now - start)
        time.sleep(_POLL)


def _make_shared(folder: Path) -> None:
    """Makes the folder of the locks, in which anybody may make files and nobody may remove another's."""
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o1777)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be the folder of the GPUs' locks ({error.strerror}; a link is not followed): remove it, or "
            f"set TMPDIR to another folder."
        ) from error
    try:
        owner = os.fstat(handle).st_uid
        if owner not in (0, os.geteuid()):
            raise UserError(
                f"{folder}, the folder of the GPUs' locks, belongs to user {owner}, who could lend one device twice: have "
                f"root make it (mode 1777) for all users, or set TMPDIR to a folder of your own."
            )
        if owner == os.geteuid():
            os.fchmod(handle, 0o1777)  # what the umask has taken away
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None where another job holds it."""
    try:
        handle = _open(path)
    except OSError as error:
        raise UserError(f"{path} cannot be used as a lock ({error.strerror}): have its owner remove it.") from error
    held = False
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path} is no file and cannot be used as a lock: have its owner remove it.")
        held = try_lock(handle, path, required=True)
    finally:
        if not held:
            os.close(handle)
    return handle if held else None


def _open(path: Path) -> int:
    """The lock file, made where there is none. To be read is enough for a lock, and what another user's umask leaves."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    # Linux may refuse O_CREAT for another user's file in a folder that anybody may write.
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags)
    try:
        handle = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:  # another job was faster
        return os.open(path, flags)
    os.fchmod(handle, 0o644)
    return handle
