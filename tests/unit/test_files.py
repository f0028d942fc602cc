from __future__ import annotations

import hashlib
import os
import shutil
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
