"""How much of the user's records is read: a file of kilobytes can hold gigabytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, BinaryIO

from prefopt.errors import UserError

_MIB = 2**20
_CHUNK = _MIB
ROW_BYTES = 64  # what any value, and so any row, is taken for at least


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is read at most, in MiB after decompression: of one record, and of all files of one kind together."""

    record_mb: int
    total_mb: int


UNLIMITED = Limits(2**30, 2**30)


class Meter:
    """Adds up the sizes of records, and stops beyond the limits."""

    def __init__(self, limits: Limits) -> None:
        self.record_bytes = limits.record_mb * _MIB
        self._limits = limits
        self._total = 0

    def add(self, path: Any, size: int) -> None:
        """Takes in bytes of a file.

        Raises:
            UserError: all files together hold more than `total_mb`; names the file.
        """
        self._total += size
        self.check_total(path, self._total)

    def check_total(self, path: Any, size: int) -> None:
        """Raises UserError where this many bytes are more than `total_mb`; names the file."""
        if size > self._limits.total_mb * _MIB:
            raise UserError(
                f"{path}: with this file the records hold more than {self._limits.total_mb} MiB after decompression, "
                f"the limit data.max_total_mb: give fewer records, or raise it."
            )

    def check_record(self, where: str, size: int) -> None:
        """Raises UserError where a record of this many bytes is larger than `record_mb`; names file and line."""
        if size > self.record_bytes:
            raise UserError(
                f"{where}: the record holds more than {self._limits.record_mb} MiB, the limit data.max_record_mb: "
                f"correct the record, or raise it."
            )

    def add_lines(self, path: Any, file: BinaryIO) -> None:
        """Takes in a file of one record a line, without keeping more than a MiB of it."""
        number, pending = 1, 0  # the line that a chunk begins in, and how much of it was read
        while chunk := file.read(_CHUNK):
            end = b"\n" if b"\n" in chunk else b"\r"
            ends = chunk.count(end)
            # A line that lies within a chunk is short enough.
            self.check_record(f"{path}:{number}", pending + (chunk.find(end) if ends else len(chunk)))
            pending = len(chunk) - chunk.rfind(end) - 1 if ends else pending + len(chunk)
            number += ends
            self.add(path, len(chunk))

    def add_records(self, path: Any, records: Iterable[tuple[str, Any]]) -> None:
        """Takes in records that were decoded, without keeping them."""
        for where, row in records:
            size = size_of(row)
            self.check_record(where, size)
            self.add(path, size)


def size_of(value: Any) -> int:
    """About the bytes of a decoded record, keys included."""
    if isinstance(value, str | bytes):
        return max(len(value), ROW_BYTES)
    if isinstance(value, dict):
        return ROW_BYTES + sum(len(str(key)) + size_of(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return ROW_BYTES + sum(map(size_of, value))
    return ROW_BYTES
