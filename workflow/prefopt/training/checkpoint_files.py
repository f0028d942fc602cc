"""Reading checkpoints that somebody else may have put there: whose they are, whether they are whole, and no pickle's code.

torch.distributed.checkpoint keeps its index and the optimizer's values as pickles. They are read here by unpicklers
that know the few classes that a checkpoint holds and call nothing else.
"""

from __future__ import annotations

import io
import itertools
import os
import pathlib
import pickle
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from prefopt.errors import UserError


def _member(kind: Any, name: str) -> Any:
    """What `getattr` is taken for: a memory format, an enum's member as early releases of Python 3.11 write it (Debian 12's)."""
    if kind is not torch_metadata._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it asks {kind!r} for {name!r}, which no checkpoint does")
    return kind[name]


# All that the index of a checkpoint is made of; a data type is one of torch's, a layout is named by a text.
_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (one.__module__, one.__name__): one
        for one in (
            *(torch_metadata.Metadata, torch_metadata.MetadataIndex, torch_metadata.StorageMeta),
            *(torch_metadata.TensorStorageMetadata, torch_metadata.TensorProperties),
            *(torch_metadata.ChunkStorageMetadata, torch_metadata.BytesStorageMetadata),
            *(torch_metadata._MEM_FORMAT_ENCODING, _StorageInfo, _get_layout),
        )
    },
    ("builtins", "getattr"): _member,
    ("torch", "Size"): torch.Size,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PosixPath,  # as Python 3.13 names it
    **{("torch", str(one).partition(".")[2]): one for one in (torch.float32, torch.float64, torch.bfloat16)},
    **{("torch", str(one).partition(".")[2]): one for one in (torch.float16, torch.int64, torch.int32, torch.bool)},
}


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler of `_CLASSES` and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")
        return _CLASSES[module, name]


class CheckpointReader(dcp.FileSystemReader):
    """Reads a checkpoint's files, and runs nothing that stands in them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> torch_metadata.Metadata:
        """The index.

        Raises:
            pickle.UnpicklingError: it holds what no checkpoint holds, or leads out of the folder.
        """
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, torch_metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise pickle.UnpicklingError("it is no index of a checkpoint")
        for place in index.storage_data.values():
            if Path(place.relative_path).name != place.relative_path or place.transform_descriptors:
                raise pickle.UnpicklingError(f"it leads to {place.relative_path!r}")
        index.storage_meta = index.storage_meta or torch_metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class CheckpointPlanner(dcp.DefaultLoadPlanner):
    """Takes values that are no tensors (learning rate, betas) as what `torch.load` holds for harmless."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hands on a value in bytes that this process has written."""
        own = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), own)
        own.seek(0)
        super().load_bytes(read_item, own)


def require_own(path: Path) -> None:
    """Checks that nobody else could have changed what lies in a run folder.

    Looked at are the folder and all in it, and the folders above it as far as `work/`. Where the run folder lets nobody
    else in, as those made here do, the modes of what lies in it do not matter.

    Raises:
        UserError: something is another user's, may be written by others, or is a link.
    """
    top = next((folder for folder in path.parents if folder.name == "work"), path.parent)
    closed = path.lstat().st_mode & 0o077 == 0
    above = itertools.takewhile(lambda folder: folder != top, path.parents)
    for entry in itertools.chain((path, *above, top), _inside(path)):
        own = entry == path or path in entry.parents
        found = entry.lstat()
        if stat.S_ISLNK(found.st_mode) and own:
            raise UserError(f"{entry} is a link, which no run makes: see who put it there, and delete it.")
        # A folder above may be a link of one's own, to another disk.
        for status in (found,) if own else (found, entry.stat()):
            if status.st_uid not in (0, os.geteuid()):
                raise UserError(
                    f"{entry} belongs to {_name(status.st_uid)}, who could change what training goes on from: delete "
                    f"{path} if it is not yours, or train in another folder."
                )
        if status.st_mode & 0o022 and (entry == path or not (own and closed)):
            raise UserError(
                f"{entry} may be written by others (mode {stat.S_IMODE(status.st_mode):o}), who could change what "
                f"training goes on from: run `chmod -R go-w {top}` if you trust what lies there, else delete it."
            )


def _inside(path: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(path):
        yield from (Path(folder) / name for name in (*folders, *files))


def _name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user {uid}"
