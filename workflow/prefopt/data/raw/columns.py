"""Records of columns: Parquet files, and batches of Arrow."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.data.raw.limits import ROW_BYTES, Meter
from prefopt.data.raw.opened import first_line, is_packed, open_bytes
from prefopt.data.raw.record import Malformed, Record
from prefopt.errors import UserError

# What a batch of rows may take when each is as large as its column.
_BATCH_BYTES = 2**28
BATCH_ROWS = 1024
# What a value of a list is taken for, since Parquet can say a million of them in a few bytes.
_LISTED_BYTES = 256
_CHUNK = 2**20

# What is read of columns, "column" or "column.field of its objects": named, or chosen of those that are there; None is all.
Fields = Sequence[str] | Callable[[Sequence[str]], Sequence[str]] | None


def parquet_rows(path: str | Path, fields: Fields, meter: Meter) -> Iterator[Record]:
    """Rows of a Parquet file, of the fields alone."""
    with _opened(path, meter) as file:
        read = chosen(fields, file.schema_arrow.names)
        check_names(path, file.schema_arrow.names, read)
        leaves = [i for i in range(len(file.schema)) if _wanted(file.schema.column(i).path, read)]
        _check_groups(path, file, leaves, meter)
        yield from python_rows(path, _batches(file, leaves))


def chosen(fields: Fields, columns: Sequence[str]) -> Sequence[str] | None:
    """The fields that are read where these columns are there."""
    return fields(columns) if callable(fields) else fields


def check_names(path: str | Path, names: Sequence[str], fields: Sequence[str] | None) -> None:
    """Raises UserError where a column that is read stands twice."""
    read = names if fields is None else [field.partition(".")[0] for field in fields]
    if twice := [name for name in read if names.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]!r} twice: leave one out.")


def measured(path: str | Path, batches: Iterable[pa.RecordBatch], meter: Meter) -> Iterator[pa.RecordBatch]:
    """Batches that fit into memory as Python values, cut into rows where they would not.

    Raises:
        UserError: one row alone is larger than the limits allow.
    """
    number = 0
    for batch in batches:
        if _decoded(batch) <= _BATCH_BYTES:
            yield batch
        else:
            for i in range(batch.num_rows):
                meter.check_record(f"{path}:{number + i + 1}", _decoded(batch.slice(i, 1)))
                yield batch.slice(i, 1)
        number += batch.num_rows


def _decoded(values: pa.RecordBatch | pa.Array) -> int:
    """About the bytes that plain columns take as Python values. A list of nothing takes none as a column."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(_decoded, values.columns))
    size: int = values.nbytes + ROW_BYTES * len(values)
    if any(test(values.type) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)):
        return size + _decoded(values.flatten())
    if pa.types.is_struct(values.type):
        return size + sum(map(_decoded, values.flatten()))
    return size + ROW_BYTES * len(values.items) if pa.types.is_map(values.type) else size


def python_rows(path: str | Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    """Rows of batches, or a `Malformed` where one cannot be read."""
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist() if batch.nbytes <= _BATCH_BYTES else _one_by_one(batch)
        except Exception:  # pyarrow, dates and time zones each raise their own
            rows = _one_by_one(batch)
        for row in rows:
            number += 1
            yield f"{path}:{number}", row


def _one_by_one(batch: pa.RecordBatch) -> Iterator[Any]:
    for i in range(batch.num_rows):
        try:
            (row,) = batch.slice(i, 1).to_pylist()
        except Exception as error:
            yield Malformed(f"the row cannot be read ({first_line(error)})")
        else:
            yield row


@contextlib.contextmanager
def _opened(path: str | Path, meter: Meter) -> Iterator[pq.ParquetFile]:
    """A Parquet file; one that was compressed as a whole is unpacked beside, since it is read from its end."""
    with contextlib.ExitStack() as stack:
        source: Any = path
        if is_packed(path):
            source = stack.enter_context(tempfile.TemporaryFile())
            packed = stack.enter_context(open_bytes(path))
            while chunk := packed.read(_CHUNK):
                source.write(chunk)
                meter.check_total(path, source.tell())
        yield stack.enter_context(pq.ParquetFile(source))


def _wanted(path: str, fields: Sequence[str] | None) -> bool:
    """Whether a leaf ("info.id", or "summaries.list.element.text") belongs to the fields."""
    if fields is None:
        return True
    first, *within = path.split(".")
    # A column that should hold objects, and does not, is read too, so that its rows are malformed and not bare.
    return any(
        first == column and (not name or not within or within[-1] == name)
        for column, _, name in (field.partition(".") for field in fields)
    )


def _check_groups(path: str | Path, file: pq.ParquetFile, leaves: Sequence[int], meter: Meter) -> None:
    """What the file says of its size, before any of it is decoded: a page of gigabytes, or as many rows of nothing."""
    size = 0
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        columns = [(group.column(i), file.schema.column(i).max_repetition_level) for i in leaves]
        listed = max((column.num_values for column, depth in columns if depth), default=0)
        encoded = sum(column.total_uncompressed_size for column, _ in columns)
        size += max(encoded, listed * _LISTED_BYTES, group.num_rows * ROW_BYTES)
        meter.check_total(path, size)


def _batches(file: pq.ParquetFile, leaves: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """Batches so small that they fit into memory even where each row holds all of its column's data once more."""
    columns = [file.schema.column(i).path for i in leaves]
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        largest = max((group.column(i).total_uncompressed_size for i in leaves), default=0)
        size = min(max(_BATCH_BYTES // max(largest, 1), 1), BATCH_ROWS)
        yield from file.iter_batches(batch_size=size, row_groups=[number], columns=columns, use_threads=False)
