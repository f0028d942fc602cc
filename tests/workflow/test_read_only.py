"""A checkout that nobody may write to, as an administrator or a container provides it, in a folder of an odd name."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import TINY, copy_workflow, snakemake

TABLE = "results/data/tldr/raw/gold_preferences.parquet"


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Time of the last change, permissions and size of everything below a folder, and of itself."""
    found = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
    return {str(path): (one.st_mtime_ns, one.st_mode, one.st_size) for path, one in found.items()}


def test_a_run_in_another_folder_changes_nothing_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared and not only forbidden: permissions do not bind root."""
    # Where it may, Python itself keeps what it compiled beside a module.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    checkout, elsewhere = copy_workflow(tmp_path / "our check out's"), tmp_path / "my folder"
    everything = [path for path in (checkout, *checkout.rglob("*")) if not path.is_symlink()]
    for path in everything:
        path.chmod(path.stat().st_mode & 0o555)
    before = state(checkout)
    try:
        result = snakemake(
            *("--cores", "1", "--directory", elsewhere, "--configfile", TINY, "--", TABLE), folder=checkout
        )
        assert result.returncode == 0, result.stderr
        assert state(checkout) == before
    finally:
        for path in everything:
            path.chmod(path.stat().st_mode | 0o200)
    assert (elsewhere / TABLE).exists()
    assert {path.name for path in elsewhere.iterdir()} == {"results", "logs", ".snakemake"}
