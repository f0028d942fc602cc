"""GPU leases between real processes, with a made-up nvidia-smi."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from prefopt import devices
from prefopt.errors import UserError

CODE = """
import sys, time
from pathlib import Path
from prefopt.devices import take
print(",".join(take(int(sys.argv[1]), Path(sys.argv[2]), timeout=float(sys.argv[3]))), flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three GPUs."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '0, GPU-aaa\\n1, GPU-bbb\\n2, GPU-ccc\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(devices, "_held", [])
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")  # so that the end of the test restores what was there
        monkeypatch.delenv(name)


def job(folder: Path, wanted: int = 1, timeout: float = 30.0) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": str(Path(devices.__file__).parents[1])}
    command = [sys.executable, "-c", CODE, str(wanted), str(folder), str(timeout)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **path}
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_jobs_side_by_side_get_different_devices_and_a_killed_one_gives_its_own_back(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    jobs = [job(folder) for _ in range(3)]
    try:
        given = [said(one) for one in jobs]
        assert sorted(given) == ["GPU-aaa", "GPU-bbb", "GPU-ccc"]
        # A fourth waits, and gets what a killed job leaves.
        jobs.append(job(folder))
        time.sleep(0.5)
        jobs[1].send_signal(signal.SIGKILL)
        assert said(jobs[3]) == given[1]
        with pytest.raises(UserError, match="came free"):
            devices.take(1, folder, timeout=0.0)
    finally:
        for one in jobs:
            one.kill()
            one.wait()


def test_several_devices_are_taken_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    two = job(folder, wanted=2)
    try:
        assert said(two) == "GPU-aaa,GPU-bbb"
        with pytest.raises(UserError, match="No 2 of 3 GPUs"):
            devices.take(2, folder, timeout=0.0)
        # The third was not kept while waiting for a fourth.
        assert devices.take(1, folder, timeout=0.0) == ["GPU-ccc"]
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-ccc"
    finally:
        two.kill()
        two.wait()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which root may")
def test_other_users_lease_the_same_devices() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "leases"
        first = devices._lease(["GPU-aaa", "GPU-bbb"], 1, folder, 0)
        assert first == ["GPU-aaa"] and (folder / "GPU-bbb.lock").stat().st_uid == 0
        child = os.fork()
        if child == 0:
            try:
                os.setuid(65534)
                os._exit(0 if devices._lease(["GPU-aaa", "GPU-bbb"], 1, folder, 0) == ["GPU-bbb"] else 1)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for handle in devices.held():
            os.close(handle)


def test_what_the_user_lets_us_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert devices.present() == ["GPU-aaa", "GPU-bbb", "GPU-ccc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-a")
    assert devices.present() == ["GPU-ccc", "GPU-aaa"]
    assert devices.take(2, tmp_path / "leases") == ["GPU-ccc", "GPU-aaa"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.present() == []


def test_slurms_devices_are_passed_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert devices.take(1, tmp_path / "leases") == ["1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert not (tmp_path / "leases").exists()


def test_no_gpu_wanted_or_none_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert devices.take(0) == [] and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="4 GPUs are asked for, this machine shows 3"):
        devices.take(4, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.take(1, tmp_path) == []
    assert "running on the CPU" in caplog.text
