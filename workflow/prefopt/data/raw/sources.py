"""Where records come from: the user's own files."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt.data.raw.columns import Fields, check_names, chosen, parquet_rows
from prefopt.data.raw.json_rows import is_list, line_rows, list_rows
from prefopt.data.raw.limits import UNLIMITED, Limits, Meter
from prefopt.data.raw.opened import ENDINGS, is_packed, kind_of, open_bytes, readable, text_lines
from prefopt.data.raw.record import Malformed, Record
from prefopt.errors import UserError
from prefopt.store.files import sha256_of_file

_CHUNK = 2**20


def read_rows(paths: Sequence[str | Path], fields: Fields = None, limits: Limits = UNLIMITED) -> Iterator[Record]:
    """Records of JSON-lines, JSON, CSV or Parquet files, in their order.

    All files are measured before the first record is handed on, so that nothing is kept of files that are too large.

    Args:
        paths: files that end in `ENDINGS`. Blank lines are skipped, and counted as lines.
        fields: what is read of a Parquet file, "column" or "column.field of its objects"; None is all. What nobody
            reads may be of any kind.
        limits: how large a record, and all files together, may be.

    Yields:
        Where a record stands ("file:line"; in Parquet and CSV "file:row", from 1), and the record. A line that is no
        JSON object, and a row that cannot be read or, of CSV, has too few or too many fields, is yielded as a
        `Malformed`, so that the caller decides whether it stops or counts.

    Raises:
        UserError: a file is missing, has another ending, is not what its ending says, names a column twice, or is
            larger than the limits allow.
    """
    meter = Meter(limits)
    for path in paths:
        check_file(path)
        with readable(path):
            _measure(path, fields, meter)
    for path in paths:
        with readable(path):
            if kind_of(path) == "parquet":
                yield from parquet_rows(path, fields, meter)
            elif kind_of(path) == "csv":
                yield from _csv_rows(path, fields, meter)
            elif kind_of(path) == "json" and is_list(path):
                yield from list_rows(path, meter)
            else:
                yield from line_rows(path)


def describe_files(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Path and SHA-256 of each file, for a manifest."""
    for path in paths:
        check_file(path)
    return [{"path": str(path), "sha256": sha256_of_file(path)} for path in paths]


def check_file(path: str | Path) -> None:
    """Raises UserError where a file of records is missing or has an unknown ending."""
    if kind_of(path) is None:
        raise UserError(f"{path} is of an unknown kind: name a file that ends in {ENDINGS}.")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: correct the path among the files of data.")


def _measure(path: str | Path, fields: Fields, meter: Meter) -> None:
    kind = kind_of(path)
    if kind == "parquet":
        meter.add_records(path, parquet_rows(path, fields, meter))
    elif kind == "csv" or (kind == "json" and is_list(path)):
        # Their records may span lines: measured one by one while they are read.
        for size in _sizes(path):
            meter.add(path, size)
    else:
        with open_bytes(path) as file:
            meter.add_lines(path, file)


def _sizes(path: str | Path) -> Iterator[int]:
    if not is_packed(path):
        yield Path(path).stat().st_size
        return
    with open_bytes(path) as file:
        while chunk := file.read(_CHUNK):
            yield len(chunk)


def _csv_rows(path: str | Path, fields: Fields, meter: Meter) -> Iterator[Record]:
    number = size = 0  # rows after the header; characters of the row that is being read

    def counted(lines: io.TextIOBase) -> Iterator[str]:
        nonlocal size
        while line := lines.readline(meter.record_bytes + 1):
            size += len(line)
            meter.check_record(f"{path}:{number + 1}", size)
            yield line

    csv.field_size_limit(2**31 - 1)  # a field is as long as a row may be
    with text_lines(path) as lines:
        rows = csv.reader(counted(lines), strict=True)
        header: list[str] = []
        while True:
            size = 0
            try:
                row: Any = next(rows, None)
            except csv.Error as error:
                row = Malformed(f"the row is not CSV ({error})")
            if row is None:
                return
            if row == []:
                continue
            if header:
                number += 1
                yield f"{path}:{number}", row if isinstance(row, Malformed) else _csv_row(header, row)
            elif isinstance(row, Malformed):
                raise UserError(f"{path}: {row}; correct its header.")
            else:
                header = row
                check_names(path, header, chosen(fields, header))


def _csv_row(header: list[str], row: list[str]) -> Any:
    if len(row) != len(header):
        return Malformed("the row has not as many fields as the header")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return Malformed("the row is not UTF-8")
    return dict(zip(header, row, strict=True))
