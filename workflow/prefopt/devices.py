"""GPUs for jobs that run side by side on one machine: each is lent to one job at a time.

A lease is a lock on a file, which the kernel releases however the job ends, so that nothing is left to clean up. The
files belong to the machine and not to a working directory: two Snakemake processes share them.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import UserError

logger = logging.getLogger(__name__)

LEASES = Path(tempfile.gettempdir()) / "prefopt-gpus"
_POLL = 1.0  # seconds between two looks at devices that are all lent
_SAY_EVERY = 60.0  # seconds between two messages while waiting

_held: list[int] = []  # file descriptors of this process's leases, kept until it ends


def take(wanted: int, folder: Path = LEASES, timeout: float | None = None) -> list[str]:
    """Lets this process see `wanted` GPUs that no other job has, and no others, by CUDA_VISIBLE_DEVICES.

    Must be called before CUDA is initialised. Inside a Slurm job the devices that Slurm gave are taken as they are.
    Where there is none, or none is wanted, the process runs on the CPU.

    Args:
        wanted: how many; 0 hides all.
        folder: where the locks lie.
        timeout: seconds to wait for a free device; None: for ever.

    Returns:
        The devices' names, as CUDA_VISIBLE_DEVICES holds them; empty on the CPU.

    Raises:
        UserError: there are some devices, but fewer than wanted, or none came free in time.
    """
    if wanted == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        logger.info("no GPU is asked for (compute.gpus): running on the CPU")
        return []
    if "SLURM_JOB_ID" in os.environ and "CUDA_VISIBLE_DEVICES" in os.environ:
        given = _visible() or []
        logger.info("devices of Slurm: %s", ", ".join(given) or "none, running on the CPU")
        return given
    devices = present()
    if not devices:
        logger.info("no GPU is seen: running on the CPU")
        return []
    if wanted > len(devices):
        raise UserError(
            f"{wanted} GPUs are asked for, this machine shows {len(devices)}: lower compute.gpus, or run where there "
            f"are more."
        )
    leased = _lease(devices, wanted, folder, timeout)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(leased)
    logger.info("leased: %s", ", ".join(leased))
    return leased


def held() -> list[int]:
    """File descriptors of this process's leases, for processes of its own that shall hold them too."""
    return list(_held)


def present() -> list[str]:
    """The GPUs of this machine that the user lets us see, by their unique names; without initialising CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=index,uuid", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        return []
    names = {
        index.strip(): uuid.strip() for index, _, uuid in (line.partition(",") for line in result.stdout.splitlines())
    }
    visible = _visible()
    if visible is None:
        return list(names.values())
    # A device of the variable is an index or (the start of) a unique name.
    found = [names.get(one) or next((uuid for uuid in names.values() if uuid.startswith(one)), None) for one in visible]
    return [uuid for uuid in found if uuid]


def _visible() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES lists; None where it is not set."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if value is None else [part.strip() for part in value.split(",") if part.strip()]


def _lease(devices: Sequence[str], wanted: int, folder: Path, timeout: float | None) -> list[str]:
    """Locks the first free devices; takes all or none, so that two jobs never wait for each other's half."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o777)  # other users' jobs lease the same devices
    start = said = time.monotonic()
    while True:
        locked = {name: handle for name in devices if (handle := _lock(folder / f"{name}.lock")) is not None}
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


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock; None where another job holds it."""
    # To be read is enough for a lock, and what another user's umask leaves.
    handle = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
