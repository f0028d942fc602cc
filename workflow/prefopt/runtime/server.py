"""An inference engine in a process of its own: started on a free port of this machine, ended with who started it."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from prefopt.errors import UserError

HOST = "127.0.0.1"  # nobody else reaches it
POLL = 0.5  # seconds between two looks
_END_WITHIN = 20.0  # seconds from being asked to end to being killed
_TRIES = 3  # of ports, each of which another program may take meanwhile
_CPU_CACHE = 4 * 2**30  # bytes of keys and values that vLLM holds on a CPU
# An engine is several processes, which outlive a killed parent. This one lives as long as a pipe to the parent is open.
_WATCH = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


def program_of(engine: str, given: str | None, key: str) -> str:
    """The program of an engine: the one that is given, beside Python, or on PATH.

    Args:
        engine: its name.
        given: what the config says; None: whichever is installed.
        key: of the config, for the message.

    Raises:
        UserError: there is none.
    """
    beside = Path(sys.executable).with_name(engine)
    program = given or (str(beside) if beside.is_file() else shutil.which(engine))
    if program is None or shutil.which(program) is None:
        raise UserError(
            f"There is no program {program or engine}: install {engine} (vllm into an environment of its own), and "
            f"name its program in {key}."
        )
    return program


def vllm_words(gpus: int) -> list[str]:
    """Words of a vLLM server's command line: over how many GPUs it spreads a model; 0 is the CPU.

    On a CPU it would ask for nine tenths of the memory, whatever else runs, and start only where they are free.
    """
    cache = [] if gpus else ["--kv-cache-memory-bytes", str(_CPU_CACHE)]
    return ["--seed", "0", "--tensor-parallel-size", str(max(1, gpus)), *cache]


def started(
    command: Callable[[int], Sequence[str]], engine: str, stack: contextlib.ExitStack, log: IO[bytes] | None = None
) -> tuple[subprocess.Popen[bytes], str]:
    """Starts an engine and waits until it answers.

    Args:
        command: its command line by port.
        engine: its name.
        stack: the engine ends with it, and with this process.
        log: where it writes; None: where this process does.

    Returns:
        Its process and its address, "http://127.0.0.1:PORT".

    Raises:
        UserError: it ended before it answered.
    """
    for _ in range(_TRIES):
        port = free_port(HOST)
        process = subprocess.Popen(
            command(port),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            # What is served is a folder; nothing is looked for elsewhere.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            process_group=0,
        )
        watch = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        stack.callback(_end, process, watch)
        url = f"http://{HOST}:{port}"
        while process.poll() is None:
            if _answers(url):
                return process, url
            time.sleep(POLL)
        if not _is_taken(port):
            break
    raise UserError(f"{engine} ended with the code {process.returncode} before it answered.")


def free_port(host: str) -> int:
    """A port of this machine at which nobody listens; "" is every address."""
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    """Whether a server says that it is well. Not through a proxy, which `urllib` would take from the environment."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _is_taken(port: int) -> bool:
    """Whether another program listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _end(process: subprocess.Popen[bytes], watch: subprocess.Popen[bytes]) -> None:
    """Ends an engine with all its processes, and what watches over it."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(_END_WITHIN)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    watch.kill()
    watch.communicate()
