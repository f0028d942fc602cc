from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import SafetensorError

from prefopt.errors import UserError
from prefopt.store.files import (
    atomic_directory,
    atomic_path,
    canonical_json,
    check_disk_space,
    read_json,
    remove_directory,
    remove_leftovers,
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
        "import os, sys; from prefopt.store.files import try_lock; d = os.open(sys.argv[1], os.O_RDWR)\n"
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


DEAD = 2**22 + 1  # above the kernel's largest process number


@pytest.mark.parametrize("writer", [atomic_path, atomic_directory])
def test_what_dead_processes_left_is_removed(tmp_path: Path, writer: Callable[..., Any]) -> None:
    alive = {f".model.{os.getppid()}.tmp", f".other.{DEAD}.tmp", ".model.tmp", ".model.x.tmp", f".model.{DEAD}.json"}
    for name in (*alive, f".model.{DEAD}.tmp", f".model.{10**30}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    (tmp_path / f".model.{DEAD}.old").symlink_to(tmp_path / ".model.tmp")
    (tmp_path / f".model.{DEAD + 1}.tmp").write_text("half")
    with writer(tmp_path / "model") as temporary:
        (temporary / "a" if temporary.is_dir() else temporary).write_text("whole")
    assert {entry.name for entry in tmp_path.iterdir()} == {*alive, "model"}
    assert (tmp_path / ".model.tmp" / "weights").exists(), "a link is not followed"
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {*alive, "model"} - {f".other.{DEAD}.tmp"}


def test_a_directory_is_removed_from_its_name_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    seen: list[list[str]] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda *_, **__: seen.append(sorted(path.name for path in tmp_path.iterdir()))
    )
    remove_directory(tmp_path / "run")
    remove_directory(tmp_path / "run")
    assert seen == [[f".run.{os.getpid()}.old"]]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order, by the names below `tmp_path`."""
    done: list[str] = []

    def name(path: str | Path) -> str:
        return re.sub(r"\.[0-9]+\.", ".PID.", str(Path(path).relative_to(tmp_path)))

    flush, rename = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        done.append(f"flush {name(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        flush(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"{name(source)} -> {name(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return done


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, disk: list[str]) -> None:
    write_text(tmp_path / "a.txt", "whole")
    assert disk == ["flush .a.txt.PID.tmp", ".a.txt.PID.tmp -> a.txt", "flush ."]


def test_a_directory_is_on_the_disk_before_its_name_is(tmp_path: Path, disk: list[str]) -> None:
    (tmp_path / "model").mkdir()
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "part").mkdir()
        (temporary / "weights").write_text("a")
        (temporary / "part" / "more").write_text("b")
    assert disk == [
        *("flush .model.PID.tmp/weights", "flush .model.PID.tmp"),
        *("flush .model.PID.tmp/part/more", "flush .model.PID.tmp/part"),
        *("model -> .model.PID.old", ".model.PID.tmp -> model", "flush ."),
    ]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_flushes_no_folder(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


@pytest.mark.parametrize("writer", [atomic_path, atomic_directory])
@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
        OSError("No space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_whoever_says_so(
    tmp_path: Path, writer: Callable[..., Any], error: Exception
) -> None:
    with (
        pytest.raises(UserError, match=r"model could not be written \(No space left on device\): nothing was left"),
        writer(tmp_path / "model") as temporary,
    ):
        (temporary / "a" if temporary.is_dir() else temporary).write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (UserError("said (os error 28)"), ValueError("an error of the code")):
        with pytest.raises(type(error)) as raised, atomic_directory(tmp_path / "model"):
            raise error
        assert raised.value is error


def test_a_directory_that_cannot_be_replaced_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_json_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    with pytest.raises(UserError, match=r"key\.json does not exist: run the stage that makes it"):
        read_json(path)
    for content in (b"", b'{"a": ', b"\xff", b"[" * 100_000, bytes(20)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"key\.json is not whole JSON \(.*\): delete it and run its stage again"):
            read_json(path)
    write_text(path, '{"a": 1}')
    assert read_json(path) == {"a": 1}
