"""Imports point down: a room knows those below it and none above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefopt

PACKAGE = Path(prefopt.__file__).parent
# From the ground up; those of one floor in their order too.
ROOMS = [
    *("errors", "resources", "objectives", "store", "runtime", "experiment", "lm"),
    *("data.raw", "data.formats", "data.synthetic", "data"),
    *("rewards", "planning", "analysis", "generation", "training", "judging", "judging.human", "cli", "__main__"),
]


def room_of(module: str) -> str:
    """The room of a module below prefopt: its longest prefix among them."""
    parts = module.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next(prefix for prefix in prefixes if prefix in ROOMS)


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(path: Path) -> Iterator[str]:
    """Modules below prefopt that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "prefopt":
            yield from (f"{node.module}.{alias.name}".removeprefix("prefopt.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                alias.name.removeprefix("prefopt.") for alias in node.names if alias.name.startswith("prefopt.")
            )


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_from_its_own_room_and_from_those_below(module: str) -> None:
    floor = ROOMS.index(room_of(module))
    above = [name for name in imports(modules()[module]) if ROOMS.index(room_of(name)) > floor]
    assert above == []


def test_every_room_is_there() -> None:
    assert {room_of(module) for module in modules()} == set(ROOMS)
