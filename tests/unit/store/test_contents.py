"""What a user brings is named by its content alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from prefopt.store import contents
from prefopt.store.contents import content_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    contents._hash_of.cache_clear()
    return tmp_path


def folder(path: Path, weights: bytes = b"weights") -> str:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


def test_a_moved_folder_is_the_same_and_a_changed_one_is_not(here: Path) -> None:
    first = content_of({"model": folder(here / "first")})
    assert content_of({"model": folder(here / "second")}) == first
    (here / "second" / "notes.md").write_text("No part of a model.")
    assert content_of({"model": str(here / "second")}) == first
    assert content_of({"model": folder(here / "third", b"others")}) != first
    (here / "second" / "tokenizer.json").write_text("{}")
    assert content_of({"model": str(here / "second")}) != first


def test_of_a_saved_data_set_every_split_counts(here: Path) -> None:
    def data_set(path: Path, test: bytes) -> str:
        for split in ("train", "test"):
            (path / split).mkdir(parents=True)
            (path / split / "state.json").write_text("{}")
            (path / split / "data-00000-of-00001.arrow").write_bytes(test if split == "test" else b"rows")
        (path / "dataset_dict.json").write_text("{}")
        return str(path)

    first = content_of({"records_0": data_set(here / "a", b"rows")})
    assert content_of({"records_0": data_set(here / "b", b"rows")}) == first
    assert content_of({"records_0": data_set(here / "c", b"others")}) != first
    assert content_of({"records_0": str(here / "a" / "train")}) == content_of({"records_0": str(here / "c" / "train")})
    # A model's checkpoints are no part of it.
    model = content_of({"model": folder(here / "model")})
    folder(here / "model" / "checkpoint-1")
    assert content_of({"model": str(here / "model")}) == model


def test_names_endings_and_order_count_and_places_do_not(here: Path) -> None:
    (here / "a.jsonl").write_text("{}\n")
    (here / "b.jsonl").write_text("[]\n")
    (here / "below").mkdir()
    shutil.copy("a.jsonl", "below/c.jsonl")
    shutil.copy("a.jsonl", "a.csv")
    one = content_of({"posts_0": "a.jsonl", "posts_1": "b.jsonl"})
    assert content_of({"posts_0": "below/c.jsonl", "posts_1": "b.jsonl"}) == one
    others = [
        {"posts_0": "b.jsonl", "posts_1": "a.jsonl"},
        {"posts_0": "a.csv", "posts_1": "b.jsonl"},
        {"comparisons_0": "a.jsonl", "posts_1": "b.jsonl"},
        {"posts_0": "a.jsonl"},
        {"posts_0": "a.jsonl", "posts_1": "missing.jsonl"},
    ]
    assert len({one, *map(content_of, others)}) == 1 + len(others)


def test_a_large_file_is_read_once_until_it_changes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "_KEPT_FROM_BYTES", 4)
    read: list[str] = []
    monkeypatch.setattr(contents, "sha256_of_file", lambda path: read.append(Path(path).name) or f"hash {len(read)}")
    path = here / "model.bin"

    def named() -> str:
        contents._hash_of.cache_clear()  # as in another process
        return content_of({"model": str(path)})

    path.write_bytes(b"weights")
    first = named()
    assert named() == first and read == ["model.bin"]
    os.utime(path, ns=(1, 1))
    assert named() != first and read == ["model.bin"] * 2
    assert json.loads((here / "work" / "contents.json").read_text()) == {str(path): [7, 1, "hash 2"]}
    (here / "work" / "contents.json").write_text("{")
    named()
    assert len(read) == 3


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_of_checkpoints_that_it_makes_is_not_for_others_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(contents, "_KEPT_FROM_BYTES", 1)
    (tmp_path / "large.safetensors").write_text("weights")
    before = os.umask(umask)
    try:
        content_of({"model": "large.safetensors"})
    finally:
        os.umask(before)
    assert (tmp_path / "work" / "contents.json").is_file()
    assert (tmp_path / "work").stat().st_mode & 0o022 == 0


def test_a_chat_template_is_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = content_of({"model": str(tmp_path)})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert content_of({"model": str(tmp_path)}) != before
