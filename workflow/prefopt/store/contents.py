"""Names what a user brings by its content: a model's folder or a file may move, and one that changes is seen.

Snakemake compares the paths of inputs. So files that no rule makes are no inputs; a param of their rule holds this hash.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from prefopt.errors import UserError
from prefopt.store.files import make_folders, sha256_of_file, write_text

# Of a model's folder, and of one that `datasets` has saved.
_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja", ".arrow"}
# Reading a large file takes seconds, and rules are evaluated by every run and every remote job: its hash is kept, as
# git does, for as long as its size and time of change stay.
_KEPT_FROM_BYTES = 64 * 2**20
_KEPT = Path("work", "contents.json")


def content_of(paths: Mapping[str, str]) -> str:
    """SHA-256 (hex) of files, and of the files in folders of models or records, by the names of what they are for.

    Args:
        paths: by name. A file's ending counts as content, and so do names in a folder; where they lie does not. What is
            missing counts as missing: whoever needs it says so.
    """
    digest = hashlib.sha256()
    for name, path in ((name, Path(path)) for name, path in paths.items()):
        for file in _files(path):
            ending = str(file.relative_to(path)) if path.is_dir() else "".join(path.suffixes)
            digest.update(f"{name} {ending} {_hash(file) if file.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    # Of a data set each split is a folder; a model's checkpoints are none of it.
    every = path.rglob("*") if (path / "dataset_dict.json").is_file() else path.iterdir()
    return sorted(file for file in every if file.suffix in _FILES)


def _hash(path: Path) -> str:
    facts = path.stat()
    return _hash_of(str(path.absolute()), facts.st_size, facts.st_mtime_ns)


@functools.cache
def _hash_of(path: str, size: int, changed: int) -> str:
    if size < _KEPT_FROM_BYTES:
        return sha256_of_file(path)
    try:
        kept = json.loads(_KEPT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    facts = [size, changed]
    found: list[object] = kept.get(path, [])
    if found[:2] == facts:
        return str(found[2])
    value = sha256_of_file(path)
    with contextlib.suppress(UserError, OSError):  # a folder that cannot be written: the file is read again
        make_folders(_KEPT.parent)  # checkpoints will lie there, which others must not write
        write_text(_KEPT, json.dumps({**kept, path: [*facts, value]}, indent=1) + "\n")
    return value
