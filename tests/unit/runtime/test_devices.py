"""GPU leases between real processes, with a made-up nvidia-smi."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from prefopt.errors import UserError
from prefopt.runtime import devices

CODE = """
import sys, time
from pathlib import Path
from prefopt.runtime.devices import take
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
    path = {"PYTHONPATH": str(Path(devices.__file__).parents[2])}
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


def test_slurms_devices_are_lent_within_their_allocation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    folder = tmp_path / "leases"
    assert devices.take(1, folder) == ["1"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    # Device 1 of another allocation may be another one.
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    given = []
    for _ in range(4):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
        given += devices.take(1, folder, timeout=0.0)
    assert given == ["0", "1", "2", "3"] and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(UserError, match="No 1 of 4 GPUs came free"):
        devices.take(1, folder, timeout=0.0)
    with pytest.raises(UserError, match="5 GPUs are asked for, this machine shows 4"):
        devices.take(5, folder, timeout=0.0)


def test_an_instance_of_a_divided_gpu_is_taken_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["MIG-11111111-2222", "MIG-GPU-aaa/3/0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    folder = tmp_path / "leases"
    assert devices.take(1, folder, timeout=0.0) == names[:1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    assert devices.take(1, folder, timeout=0.0) == names[1:]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
    with pytest.raises(UserError, match="a process sees one MIG instance alone"):
        devices.take(2, folder, timeout=0.0)


def test_a_device_that_is_not_there_is_no_reason_to_run_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for names, bad in (("0,GPU-zzz", "GPU-zzz"), ("7", "7")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        with pytest.raises(
            UserError, match=f"^CUDA_VISIBLE_DEVICES names '{bad}', but nvidia-smi lists GPU-aaa, GPU-bbb, "
        ):
            devices.take(1, tmp_path / "leases", timeout=0.0)
    for hidden in ("-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{hidden},0")
        assert devices.present() == ["GPU-bbb"]
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'driver/library version mismatch'; exit 18\n")
    none = (
        "^CUDA_VISIBLE_DEVICES names '1', but nvidia-smi lists no GPU: unset it, or set compute.gpus to 0 for the CPU.$"
    )
    with pytest.raises(UserError, match=none):
        devices.take(1, tmp_path / "leases", timeout=0.0)
    assert caplog.messages == ["nvidia-smi fails, so that no GPU is seen: driver/library version mismatch"]
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match=none):
        devices.take(1, tmp_path / "leases", timeout=0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.take(1, tmp_path / "leases", timeout=0.0) == []


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_the_folder_of_the_locks_is_sticky_and_its_files_can_be_read_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        devices._lease(["GPU-a/b"], 1, tmp_path / "leases", 0)
    finally:
        os.umask(before)
    assert mode(tmp_path / "leases") == 0o1777 and mode(tmp_path / "leases" / "GPU-a_b.lock") == 0o644


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(0o700)
    (tmp_path / "leases").symlink_to(private)
    with pytest.raises(
        UserError, match=r"leases cannot be the folder of the GPUs' locks \(.*; a link is not followed\)"
    ):
        devices._lease(["GPU-aaa"], 1, tmp_path / "leases", 0)
    assert mode(private) == 0o700 and list(private.iterdir()) == []
    # Nor that of a lock, and a pipe does not make it wait.
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "GPU-aaa.lock").symlink_to(private / "made")
    os.mkfifo(folder / "GPU-bbb.lock")
    with pytest.raises(UserError, match=r"GPU-aaa\.lock cannot be used as a lock \(.*\): have its owner remove it"):
        devices._lease(["GPU-aaa"], 1, folder, 0)
    with pytest.raises(UserError, match=r"GPU-bbb\.lock is no file and cannot be used as a lock"):
        devices._lease(["GPU-bbb"], 1, folder, 0)
    assert list(private.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="makes a folder of another user, which root may")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    folder.mkdir(0o777)
    os.chown(folder, 65534, 65534)
    with pytest.raises(UserError, match=r"leases, the folder of the GPUs' locks, belongs to user 65534, .* set TMPDIR"):
        devices._lease(["GPU-aaa"], 1, folder, 0)
    assert mode(folder) == 0o777 & ~current_umask() and list(folder.iterdir()) == []


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_locks_no_device_is_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(
        UserError, match=r"GPU-aaa\.lock cannot be locked \(Function not implemented\): choose a folder"
    ):
        devices._lease(["GPU-aaa"], 1, tmp_path / "leases", 0)


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
