"""Files of records, opened: their kinds, and their bytes and lines after decompression."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from prefopt.errors import UserError
from prefopt.experiment.tasks import ENDING

ENDINGS = ".jsonl, .json, .csv or .parquet, or in one of these and .gz or .zst"
# Marks at the start of a file; that of UTF-32 begins with one of UTF-16.
_WIDE = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def kind_of(path: str | Path) -> str | None:
    """The kind of a file of records by its ending, compressed or not: jsonl, json, csv or parquet; None of any other."""
    ending = ENDING.search(str(path))
    return ending[1] if ending else None


def is_packed(path: str | Path) -> bool:
    """Whether a file ends as a compressed one does."""
    return str(path).endswith((".gz", ".zst"))


def open_bytes(path: str | Path) -> BinaryIO:
    """A file, decompressed as its ending says."""
    if str(path).endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if str(path).endswith(".zst"):
        return pa.input_stream(str(path), compression="zstd")
    return Path(path).open("rb")


@contextlib.contextmanager
def text_lines(path: str | Path) -> Iterator[io.TextIOBase]:
    """The lines of a UTF-8 file, with or without a mark at its start, whatever ends them; a byte that is not UTF-8
    becomes half a surrogate pair."""
    with open_bytes(path) as file:
        start = file.read(4)
    for mark, name in _WIDE:
        if start.startswith(mark):
            raise UserError(f"{path} is {name} text: save it as UTF-8.")
    with open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


@contextlib.contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """What a damaged file raises while it is read, as one sentence."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, MemoryError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read to its end ({first_line(error)}): replace the file.") from error


def first_line(error: Exception) -> str:
    """What an error says first, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
