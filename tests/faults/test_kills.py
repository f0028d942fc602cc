"""Kills at random moments of the tiny run: what is there in the end is what an undisturbed run makes, bit by bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from running import TINY, command, copy_workflow

from prefopt.lm.models import weights_hash
from prefopt.store.tables import read_manifest

pytestmark = pytest.mark.workflow

TLDR = ("results/tldr_winrates.csv", "results/tldr_comparisons.csv", "results/candidates/tldr_curve.csv")
# Seconds, which are different in every run.
MEASURED = ("compute.csv",)


def test_five_kills_change_no_table(finished: Path, tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "copy")
    killed = run_and_kill(folder, list(TLDR), kills=5, jobs=15, seed=0)
    assert len(killed) == 5
    assert len(compare(finished, folder)) == 39, "every table and model that these targets need"


@pytest.mark.faults
def test_fifty_kills_change_no_table(finished: Path, tmp_path: Path) -> None:
    folder = copy_workflow(tmp_path / "copy")
    killed = run_and_kill(folder, ["all"], kills=50, jobs=60, seed=1)
    assert len(killed) == 50 and set(killed) == set(KINDS)
    made = {str(path.relative_to(finished)) for path in finished.glob("results/**/*.parquet")}
    assert made <= set(compare(finished, folder))


def compare(finished: Path, folder: Path) -> list[str]:
    """Asserts that every table and model of a folder equals the undisturbed run's; returns their paths."""
    compared = []
    for path in sorted(folder.glob("results/**/*")):
        name = path.relative_to(folder)
        if path.suffix == ".parquet":
            assert read_manifest(path)["content_hash"] == read_manifest(finished / name)["content_hash"], name
        elif path.suffix == ".csv" and path.name not in MEASURED:
            assert path.read_text() == (finished / name).read_text(), name
        elif path.name == "model.safetensors":
            assert weights_hash(path.parent) == weights_hash(finished / name.parent), name
        else:
            continue
        compared.append(str(name))
    left = [path for path in folder.glob("results/**/.*") if path.name != ".snakemake_timestamp"]
    assert not left, "nothing half written lies about"
    return compared


def run_and_kill(folder: Path, targets: list[str], kills: int, jobs: int, seed: int) -> list[str]:
    """Runs Snakemake until the targets are there, killing something `kills` times on the way.

    Args:
        folder: a copy of the workflow.
        targets: of Snakemake.
        kills: how often something is killed.
        jobs: over so many of the first finished jobs the kills are spread.
        seed: of what is killed when.

    Returns:
        Of what kind each kill was.
    """
    rng = random.Random(seed)
    killed: list[str] = []
    with contextlib.ExitStack() as sessions:
        while len(killed) < kills:
            process = sessions.enter_context(started(folder, targets))
            after = rng.randint(0, jobs // kills)
            wait(process, lambda after=after: finished_jobs(folder) >= after)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 4))
            if process.poll() == 0:
                break
            kind = rng.choice(list(KINDS))
            while process.poll() is None:
                if KINDS[kind](process, rng):
                    killed.append(kind)
                    break
                time.sleep(0.1)  # between two stages
            process.wait(timeout=300)
        for _ in range(60):
            process = sessions.enter_context(started(folder, targets))
            if process.wait(timeout=1200) == 0:
                return killed
            # A trainer that a killed Snakemake has left behind still works on what this run wanted to begin.
            assert "in use by another training process" in output(folder), output(folder)[-4000:]
            time.sleep(2)
    raise AssertionError(output(folder)[-6000:])


@contextlib.contextmanager
def started(folder: Path, targets: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Snakemake in a session of its own, whose processes all end with the block."""
    words = command(folder, "--cores", "2", *targets, "--configfile", TINY)
    if any(folder.glob(".snakemake/locks/*")):
        # What a killed Snakemake leaves, and tells how to remove.
        subprocess.run([*words, "--unlock"], cwd=folder, capture_output=True, check=True)
    with (folder / "output").open("wb") as out:
        process = subprocess.Popen(words, cwd=folder, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def output(folder: Path) -> str:
    return (folder / "output").read_text(errors="replace")


def finished_jobs(folder: Path) -> int:
    return output(folder).count("\nFinished jobid")


def wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], seconds: float = 600) -> None:
    """Waits until a condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def stages(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes of the session that run a stage."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == process.pid and words[1:4] == [b"-P", b"-m", b"prefopt"]:
                found.append(int(folder.name))
    return found


def kill_everything(process: subprocess.Popen[bytes], rng: random.Random) -> bool:
    os.killpg(process.pid, signal.SIGKILL)
    return True


def kill_snakemake(process: subprocess.Popen[bytes], rng: random.Random) -> bool:
    process.kill()
    return True


def kill_stage(process: subprocess.Popen[bytes], rng: random.Random, number: int = signal.SIGKILL) -> bool:
    for one in rng.sample(running := sorted(stages(process)), min(1, len(running))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)
            return True
    return False


def stop_stage(process: subprocess.Popen[bytes], rng: random.Random) -> bool:
    return kill_stage(process, rng, signal.SIGTERM)


KINDS: dict[str, Callable[[subprocess.Popen[bytes], random.Random], bool]] = {
    "everything": kill_everything,
    "snakemake": kill_snakemake,
    "stage": kill_stage,
    "stop": stop_stage,
}
