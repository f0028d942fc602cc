"""Trainers that are stopped: by a signal, by kill -9, by a full disk, in one process and in several."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import every_trainer
from prefopt.errors import UserError
from prefopt.runtime import processes
from prefopt.runtime.interruption import RUN_AGAIN
from prefopt.training.checkpoint import RunFolder
from tiny_task import Task, recipe

# Long enough to be stopped in the middle, some seconds.
VALUES: dict[str, Any] = {
    **{"epochs": 60, "completion": "response", "evaluate_every": 1000, "checkpoint_every": 5, "keep": "last"},
    "learning_rate": 1e-4,
}


def command(task: Task, out: Path, *options: str, **values: Any) -> list[str]:
    """`prefopt sft` with its arguments."""
    paths = {"--work": out / "work", "--out": out / "model", "--metrics": out / "metrics.jsonl"}
    inputs = {"--model": task.model, "--data": task.demonstrations, "--recipe": recipe(**{**VALUES, **values})}
    words = [word for name, value in {**inputs, **paths}.items() for word in (name, str(value))]
    return ["prefopt", "--threads", "1", *options, "sft", *words]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[2])}


@contextlib.contextmanager
def training(task: Task, out: Path, count: int, **values: Any) -> Iterator[subprocess.Popen[str]]:
    """`python -m prefopt --processes COUNT sft`; its log is OUT/log."""
    words = [sys.executable, "-m", *command(task, out, "--processes", str(count), **values)]
    out.mkdir(parents=True, exist_ok=True)
    with (
        (out / "log").open("a") as log,
        subprocess.Popen(words, env=environment(), stderr=log, text=True, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: it does not come true.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def saved(out: Path) -> Callable[[], bool]:
    """Whether a checkpoint after the first few steps is there."""
    return lambda: any(int(path.parent.name.rpartition("_")[2]) >= 2 for path in out.glob("work/*/*_*/facts.json"))


def last_step(out: Path) -> int:
    """Steps of the last checkpoint; a kill may come before the one before it is removed."""
    facts = max(out.glob("work/*/checkpoint_*/facts.json"))
    step: int = json.loads(facts.read_text())["step"]
    return step


@pytest.fixture(scope="module")
def undisturbed(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    with training(task, out, 1) as process:
        assert process.wait(timeout=300) == 0
    return out


def assert_equal(out: Path, undisturbed: Path, **tolerance: float) -> None:
    one, other = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (undisturbed, out))
    for row, expected in zip(map(json.loads, other), map(json.loads, one), strict=True):
        assert row.pop("split") == expected.pop("split") and row == pytest.approx(expected, rel=1e-4)
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (undisturbed, out))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], **tolerance)
    assert not list(out.glob("work/*/checkpoint*"))


@pytest.mark.parametrize(("number", "count", "then"), [(signal.SIGTERM, 1, 2), (signal.SIGUSR1, 2, 1)])
def test_a_signal_saves_and_another_number_of_processes_goes_on(
    task: Task, undisturbed: Path, tmp_path: Path, number: int, count: int, then: int
) -> None:
    with training(task, tmp_path, count) as process:
        until(saved(tmp_path))
        process.send_signal(number)
        assert process.wait(timeout=60) == RUN_AGAIN == 75
    step = last_step(tmp_path)
    log = (tmp_path / "log").read_text()
    assert f"sft: saved after step {step} of 180; run it again to go on." in log and "Traceback" not in log
    assert not (tmp_path / "model").exists() and not (tmp_path / "metrics.jsonl").exists()
    with training(task, tmp_path, then) as process:
        assert process.wait(timeout=300) == 0
    assert f"sft: resumed after step {step}" in (tmp_path / "log").read_text()
    assert_equal(tmp_path, undisturbed, rtol=1e-3, atol=1e-4)


def test_kill_9_loses_the_steps_since_the_last_checkpoint_at_most(
    task: Task, undisturbed: Path, tmp_path: Path
) -> None:
    with training(task, tmp_path, 1) as process:
        until(saved(tmp_path))
        process.kill()
    step = last_step(tmp_path)
    assert step > 0 and step % VALUES["checkpoint_every"] == 0
    with training(task, tmp_path, 1) as process:
        assert process.wait(timeout=300) == 0
    assert f"sft: resumed after step {step}" in (tmp_path / "log").read_text()
    assert_equal(tmp_path, undisturbed, rtol=0, atol=0)


def test_torchrun_starts_the_same_command_on_two_nodes(task: Task, undisturbed: Path, tmp_path: Path) -> None:
    """Two agents of one process each, as on two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    words = command(task, tmp_path)
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meeting, "--node-rank", str(node), "-m", *words],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        for node in (0, 1)
    ]
    try:
        assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert_equal(tmp_path, undisturbed, rtol=1e-3, atol=1e-4)


def test_a_process_that_dies_ends_the_others(task: Task, tmp_path: Path) -> None:
    with training(task, tmp_path, 2) as process:
        until(saved(tmp_path))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert process.wait(timeout=60) == 128 + signal.SIGKILL
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_an_orphan_keeps_its_folder_from_its_successor(task: Task, tmp_path: Path) -> None:
    with training(task, tmp_path, 2, epochs=100_000) as orphans:
        until(saved(tmp_path))
        orphans.kill()  # its two processes go on
        with training(task, tmp_path, 1, epochs=100_000) as successor:
            assert successor.wait(timeout=60) == 2
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("prefopt sft: ")]
    assert len(said) == 1 and "in use by another training process" in said[0]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"model": {"weight": torch.arange(6.0)}}
    with RunFolder(tmp_path, {"run": 1}, needed_bytes=0) as run:
        run.save("checkpoint", tensors, {"step": 1})

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(UserError, match=r"No space left on device.*the last checkpoint is kept"):
                run.save("checkpoint", {"model": {"weight": torch.zeros(6)}}, {"step": 2})
        assert run.facts("checkpoint") == {"step": 1}
        read = {"model": {"weight": torch.zeros(6)}}
        run.load("checkpoint", read)
        assert torch.equal(read["model"]["weight"], torch.arange(6.0))
        run.save("checkpoint", {"model": {"weight": torch.ones(6)}}, {"step": 3})
        assert run.facts("checkpoint") == {"step": 3}
        assert len(list(run.path.glob("checkpoint_*"))) == 1


def test_what_a_killed_process_left_half_written_is_not_read(tmp_path: Path) -> None:
    with RunFolder(tmp_path, {"run": 1}, needed_bytes=0) as run:
        (run.path / "checkpoint_000000").mkdir()
        (run.path / "checkpoint_000000" / "__9_0.distcp").write_text("half")
        assert run.facts("checkpoint") is None
        run.save("checkpoint", {"model": {"weight": torch.ones(2)}}, {"step": 1})
        assert not (run.path / "checkpoint_000000" / "__9_0.distcp").exists() and run.facts("checkpoint") == {"step": 1}


def killed(trainer: str, task: Task, out: Path, every: int, of_publishing: int = 1) -> list[dict[str, Any]]:
    """What a training leaves after a kill at some points (see `kill_points`) and another run, which is asserted to be what
    an undisturbed one leaves."""
    script = str(Path(__file__).with_name("kill_points.py"))
    words = [sys.executable, script, trainer, str(task.folder), str(out), str(every), str(of_publishing)]
    modules = {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(words, env={**os.environ, **modules}, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-3000:]
    first, *rows = map(json.loads, result.stdout.splitlines())
    assert first["code"] == 0 and first["all"] - first["before"] > 15, result.stderr[-3000:]
    tried = (range(0, first["before"], every), range(first["before"], first["all"], of_publishing))
    assert len(rows) == sum(map(len, tried))
    for row in rows:
        assert row["killed"] == 9 and row["code"] == 0, (row, result.stderr[-3000:])
        for key in ("weights", "metrics", "samples", "names"):
            assert row[key] == first[key], (key, row)
    return rows


def aside(rows: list[dict[str, Any]]) -> list[list[str]]:
    """What was left by the kills that met a run folder that lies aside, since its model is published."""
    return [row["left"] for row in rows if any(name.endswith(".old") for name in row["left"])]


def test_a_kill_changes_nothing(task: Task, tmp_path: Path) -> None:
    """The next run makes the same weights and metrics as an undisturbed one, bit by bit, and leaves nothing more."""
    assert aside(killed("sft", task, tmp_path / "out", every=20, of_publishing=3))


@pytest.fixture(scope="module")
def with_inputs(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The task with what trainers beside SFT read: reference tables and a reward model."""
    every_trainer.make_inputs(task.folder, tmp_path_factory.mktemp("inputs"))
    return task


@pytest.mark.parametrize("trainer", ["dpo", "kto", "ppo"])
def test_a_kill_of_other_trainers_changes_nothing(trainer: str, with_inputs: Task, tmp_path: Path) -> None:
    """At some points of each; DPO is sampled by step, and PPO has two models and an optimizer of its own."""
    rows = killed(trainer, with_inputs, tmp_path / "out", every=60, of_publishing=12)
    assert (rows[0]["samples"] is not None) == (trainer == "dpo")


@pytest.mark.faults
def test_a_kill_at_any_point_changes_nothing(task: Task, tmp_path: Path) -> None:
    left = aside(killed("sft", task, tmp_path / "out", every=1))
    # With and without its best weights: in which order a folder's files are removed is the system's to say.
    assert any(any("/best_" in name for name in names) for names in left)
    assert any(not any("/best_" in name for name in names) for names in left)


@pytest.mark.faults
@pytest.mark.parametrize("trainer", ["dpo", "kto", "ppo"])
def test_a_kill_at_any_point_of_publishing_changes_nothing_of_other_trainers(
    trainer: str, with_inputs: Task, tmp_path: Path
) -> None:
    killed(trainer, with_inputs, tmp_path / "out", every=20)
