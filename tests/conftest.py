"""Fixtures of the tests that run Snakemake."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before NumPy and torch make pools of threads, which two processes of tests on two cores spend their time waiting in: tests of
# analyses took two to eight times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from running import TINY, copy_workflow, snakemake
from xdist.scheduler import LoadScopeScheduling

from prefopt.store import provenance
from prefopt.store.files import sha256_of_file


class OneProcessAFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests in one process, as `--dist loadfile`; the files that share the finished run in one together."""

    def _split_scope(self, nodeid: str) -> str:
        return _process_of(self.config.rootpath, nodeid.split("::")[0])


@functools.cache
def _process_of(root: Path, file: str) -> str:
    return "finished" if "finished: Path" in (root / file).read_text(encoding="utf-8") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneProcessAFile:
    """How tests are dealt to processes."""
    return OneProcessAFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest comes first, since at the end it would run alone: the finished run, Snakemake's, trainers killed."""

    def place(item: pytest.Item) -> tuple[bool, bool]:
        file = item.path.relative_to(config.rootpath)
        long = "workflow" in file.parts or file.name == "test_interruption.py"
        return _process_of(config.rootpath, str(file)) != "finished", not long

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="module")
def no_garbage_among_what_is_imported() -> None:
    """Looking for it among all the modules of torch and transformers made some tests ten times slower."""
    gc.collect()
    gc.freeze()


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
