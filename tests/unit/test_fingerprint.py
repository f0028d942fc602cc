"""The fingerprint changes with the code that a stage runs, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt import fingerprint as subject
from prefopt.fingerprint import fingerprint, import_closure, significant_tokens

SOURCES = {
    "__init__.py": "",
    "stage.py": '"""A stage."""\n\nfrom toy.lm import engine\n\n\ndef run(x):\n    return engine.double(x)\n',
    "lm/__init__.py": "",
    "lm/engine.py": "from .core import factor\n\n\ndef double(x):\n    return factor * x\n",
    "lm/core.py": "factor = 2\n",
    "lazy.py": "def run():\n    from toy import other\n\n    return other.f()\n",
    "other.py": "def f():\n    return 1\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def of(module: str, package: Path) -> str:
    """The fingerprint as a new process would see it."""
    subject._code_hash.cache_clear()
    subject.import_closure.cache_clear()
    return fingerprint(module, package)


def test_the_closure_follows_absolute_relative_and_lazy_imports(package: Path) -> None:
    assert import_closure("toy.stage", package) == {"toy", "toy.stage", "toy.lm", "toy.lm.engine", "toy.lm.core"}
    assert import_closure("toy.lazy", package) == {"toy", "toy.lazy", "toy.other"}


@pytest.mark.parametrize(
    ("module", "before", "after"),
    [
        ("stage.py", '"""A stage."""', '"""Another docstring,\nof two lines."""'),
        ("stage.py", "def run(x):\n", 'def run(x):\n    """Doubles."""\n    # why\n\n'),
        ("stage.py", "engine.double(x)", "engine.double(\n        x\n    )  # a comment"),
        ("stage.py", "    return", "        return"),
        ("lm/core.py", "factor = 2\n", "# the factor\nfactor = 2\n\n\n"),
        ("other.py", "return 1", "return 2"),
    ],
)
def test_comments_docstrings_layout_and_other_modules_change_nothing(
    package: Path, module: str, before: str, after: str
) -> None:
    unchanged = of("toy.stage", package)
    path = package / module
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert of("toy.stage", package) == unchanged


@pytest.mark.parametrize(
    ("stage", "module", "before", "after"),
    [
        ("toy.stage", "stage.py", "double(x)", "double(x + 1)"),
        ("toy.stage", "lm/core.py", "factor = 2", "factor = 3"),
        ("toy.stage", "lm/__init__.py", "", "x = 1\n"),
        ("toy.lazy", "other.py", "return 1", "return 2"),
        ("toy.stage", "lm/core.py", "factor = 2", 'factor = "# no comment"'),
    ],
)
def test_an_edit_of_an_imported_module_changes_it(
    package: Path, stage: str, module: str, before: str, after: str
) -> None:
    old = of(stage, package)
    path = package / module
    path.write_text(path.read_text().replace(before, after, 1))
    assert of(stage, package) != old


def test_only_docstrings_are_dropped_among_strings() -> None:
    source = 'x = "kept"\ndef f():\n    "dropped"\n    return f"{x}!" + f(\n        "kept too"\n    )\n'
    tokens = significant_tokens(source)
    assert '"kept"' in tokens and 'f"{x}!"' in tokens and '"kept too"' in tokens
    assert '"dropped"' not in tokens


def test_a_docstring_alone_is_the_same_as_none() -> None:
    assert significant_tokens('"""Text."""\nx = 1\n') == significant_tokens("x = 1\n")


def test_an_unknown_module_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"prefopt\.nonsense"):
        fingerprint("prefopt.nonsense")


def test_stages_of_this_package_depend_on_the_engine_and_not_on_the_workflow() -> None:
    closure = import_closure("prefopt.training.dpo")
    assert {"prefopt.objectives", "prefopt.lm.logprobs", "prefopt.training.loop"} <= closure
    assert not closure & {"prefopt.config", "prefopt.cli", "prefopt.analysis.win_rates"}
    assert "prefopt.lm.logprobs" not in import_closure("prefopt.analysis.win_rates")
