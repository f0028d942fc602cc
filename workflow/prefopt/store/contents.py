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
from prefopt.store.files import sha256_of_file, write_text

_MODEL_FILES = {".json", ".safetensors", ".model", ".txt"}
# Reading a large file takes seconds, and rules are evaluated by every run and every remote job: its hash is kept, as
# git does, for as long as its size and time of change stay.
_KEPT_FROM_BYTES = 64 * 2**20
_KEPT = Path("work", "contents.json")


def content_of(paths: Mapping[str, str]) -> str:
    """SHA-256 (hex) of files, and of the files in model folders, by the names of what they are for.

    Args:
        paths: by name. A file's ending counts as content, and so do names in a folder; where they lie does not. What is
            missing counts as missing: whoever needs it says so.
    """
    digest = hashlib.sha256()
    for name, path in ((name, Path(path)) for name, path in paths.items()):
        files = sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES) if path.is_dir() else [path]
        for file in files:
            ending = file.name if path.is_dir() else "".join(path.suffixes)
            digest.update(f"{name} {ending} {_hash(file) if file.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()


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
    with contextlib.suppress(UserError):  # a folder that cannot be written: the file is read again
        write_text(_KEPT, json.dumps({**kept, path: [*facts, value]}, indent=1) + "\n")
    return value
