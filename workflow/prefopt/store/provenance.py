"""What made a table or a model: stage, values, code and inputs, as its manifest says (`made_by`).

Snakemake keeps the same in its own folder, which stays behind when results are copied; `verify` compares these.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from prefopt.store.contents import content_of
from prefopt.store.fingerprint import fingerprint

TABLE_KEY = b"prefopt"  # of a Parquet file's schema metadata
MODEL_FILE = "manifest.json"

Manifest = dict[str, Any]

# Arguments that name what a stage makes, or what it made before.
_MADE = ("out", "earlier", "work", "metrics", "store")

_present: Manifest | None = None


def begin(stage: str, module: str, args: argparse.Namespace) -> None:
    """Notes what this process is about to run, for all that it writes.

    Args:
        stage: its name.
        module: the one that holds its code; a rule's own fingerprint of it (PREFOPT_CODE) goes before.
        args: its parsed arguments. Of paths that lead to a table or a model the content is noted, and of what the user brings.
    """
    global _present
    given = {name: list(_paths(value)) for name, value in vars(args).items() if name not in _MADE}
    contents = {str(path): content(path) for paths in given.values() for path in paths}
    recipe = _parsed(getattr(args, "recipe", None))
    _present = {
        "stage": stage,
        "recipe": recipe,
        "brought": brought(given, recipe),
        "by_step": getattr(args, "by_step", None),
        "code": os.environ.get("PREFOPT_CODE") or fingerprint(module),
        "inputs": {path: value for path, value in contents.items() if value is not None},
    }


def brought(paths: Mapping[str, Sequence[str | Path]], recipe: Any) -> dict[str, str]:
    """The content of what the user brings to a stage, files and models of their own, wherever these lie.

    Args:
        paths: by argument; what is not there, and what a stage has made, is left out.
        recipe: the stage's, whose record files are called `records`.
    """
    every = {
        name: [path for path in each if Path(path).exists() and not _manifest(Path(path))]
        for name, each in paths.items()
    }
    if isinstance(recipe, dict) and recipe.get("source") in ("files", "records"):
        lists = (value for _, value in sorted(recipe.items()) if isinstance(value, list))
        entries = [one["path"] if isinstance(one, dict) else one for each in lists for one in each]
        every["records"] = [path for path in entries if isinstance(path, str)]
    return {
        name: content_of({str(i): str(path) for i, path in enumerate(each)}) for name, each in every.items() if each
    }


def stamp() -> Manifest:
    """The entry of a manifest that says what this process runs; nothing where no stage was begun."""
    return {} if _present is None else {"made_by": _present}


def made_by(path: str | Path) -> Manifest | None:
    """What a table or a model says of what made it; None where it does not."""
    found: Manifest | None = _manifest(Path(path)).get("made_by")
    return found


def content(path: str | Path) -> str | None:
    """The hash of a table's rows or a model's weights, as its manifest has it; None where there is none."""
    manifest = _manifest(Path(path))
    found: str | None = manifest.get("content_hash", manifest.get("weights_hash"))
    return found


def _parsed(recipe: str | None) -> Any:
    """A recipe's values; of text that is no JSON the stage itself says so."""
    try:
        return None if recipe is None else json.loads(recipe)
    except ValueError:
        return None


def _manifest(path: Path) -> Manifest:
    """The manifest of a table or model; empty where there is none, or nothing that can be read."""
    try:
        if path.is_dir():
            found = json.loads((path / MODEL_FILE).read_text(encoding="utf-8"))
        else:
            found = json.loads((pq.read_schema(path).metadata or {})[TABLE_KEY])
    except (OSError, ValueError, KeyError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _paths(value: Any) -> Iterable[Path]:
    values = value if isinstance(value, list | tuple) else [value]
    return (each for each in values if isinstance(each, Path))
