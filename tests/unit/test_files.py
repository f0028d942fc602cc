from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefopt.errors import UserError
from prefopt.files import (
    atomic_directory,
    atomic_path,
    canonical_json,
    check_disk_space,
    sha256_of_file,
    stable_hash,
    try_lock,
    write_text,
)


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_a_file_stays_as_it_was_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail_midway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyError("midway")

    with pytest.raises(KeyError):
        fail_midway()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for name in ("first", "second"):
        with atomic_directory(path) as temporary:
            (temporary / name).write_text(name)
    assert [entry.name for entry in path.iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_directory_stays_as_it_was_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_directory(path) as temporary:
        (temporary / "weights").write_text("old")

    def fail_midway() -> None:
        with atomic_directory(path) as temporary:
            (temporary / "weights").write_text("half")
            raise KeyError("midway")

    with pytest.raises(KeyError):
        fail_midway()
    assert (path / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("writer", [atomic_path, atomic_directory])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path, writer: object) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(UserError, match="results cannot be created"), writer(tmp_path / "results" / "a"):  # type: ignore[operator]
        pass


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(UserError, match="locked is not writable"), atomic_path(folder / "a"):
        pass


def test_an_error_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"a\.txt could not be written \(No space left"),
        atomic_path(tmp_path / "a.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_hashes(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "hällo")
    assert sha256_of_file(tmp_path / "a") == hashlib.sha256("hällo".encode()).hexdigest()
    assert canonical_json({"b": 1, "a": ["ä"]}) == '{"a":["ä"],"b":1}'
    assert stable_hash({"b": 1, "a": 2}) == stable_hash({"a": 2, "b": 1}) != stable_hash({"a": 1, "b": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        stable_hash(float("nan"))


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**20))
    check_disk_space(tmp_path / "not" / "there" / "yet", 5 * 2**20)
    with pytest.raises(UserError, match=r"yet: 6 MiB are needed .* 5 MiB are free"):
        check_disk_space(tmp_path / "not" / "there" / "yet", 6 * 2**20)


def open_file(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)


def test_a_lock_is_held_by_one_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = open_file(path), open_file(path)
    assert try_lock(first, path)
    assert not try_lock(second, path)
    os.close(first)
    assert try_lock(second, path)
    os.close(second)


def test_a_byte_is_locked_against_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = open_file(path)
    assert try_lock(held, path, byte=7)
    code = (
        "import os, sys; from prefopt.files import try_lock; d = os.open(sys.argv[1], os.O_RDWR)\n"
        "print(try_lock(d, 'lock', byte=7), try_lock(d, 'lock', byte=8))"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert result.stdout == "False True\n"
    os.close(held)


@pytest.mark.parametrize("name", ["flock", "lockf"])
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, code: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, name, no_locks)
    path, byte = tmp_path / "lock", 3 if name == "lockf" else None
    descriptor = open_file(path)
    assert try_lock(descriptor, path, byte) and try_lock(descriptor, path, byte)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: its file system has no locks ({os.strerror(code)}); going on without: see that no second job works "
        "there"
    ]
    with pytest.raises(UserError, match=rf"lock cannot be locked \({os.strerror(code)}\): choose a folder whose"):
        try_lock(descriptor, path, byte, required=True)
    os.close(descriptor)


def test_another_failure_of_a_lock_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^lock cannot be locked \(Bad file descriptor\)"):
        try_lock(987654, "lock")
