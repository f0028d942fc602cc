"""Fixtures of the tests that run Snakemake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import TINY, copy_workflow, snakemake

from prefopt.store import provenance
from prefopt.store.files import sha256_of_file


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture that takes long stays in one process: a file's tests, and those of the finished run."""
    for item in items:
        whole = "finished" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("finished" if whole else str(item.path)))


@pytest.fixture(autouse=True)
def no_stage_is_begun() -> Iterator[None]:
    """A stage that a test runs in this process does not sign what the next one writes."""
    yield
    provenance._present = None


MADE = {"results", "logs", "work", ".snakemake"}


def sources(folder: Path) -> dict[str, str]:
    """Hash of every file outside the folders that a run makes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    kept = [path for path in files if path.relative_to(folder).parts[0] not in MADE]
    return {str(path.relative_to(folder)): sha256_of_file(path) for path in kept}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workflow after one run of everything."""
    folder = copy_workflow(tmp_path_factory.mktemp("tiny") / "copy")
    before = sources(folder)
    result = snakemake("--cores", "2", "--configfile", TINY, folder=folder)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert sources(folder) == before, "a run changed a file that belongs to the repository"
    return folder


@pytest.fixture
def workflow_copy(tmp_path: Path) -> Path:
    return copy_workflow(tmp_path / "copy")
