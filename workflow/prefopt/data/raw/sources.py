"""Where records come from: local files, or a data set of a hub."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.data.raw.limits import ROW_BYTES, UNLIMITED, Limits, Meter
from prefopt.errors import UserError
from prefopt.store.files import sha256_of_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
# What a batch of Parquet rows may take when each is as large as its column.
_BATCH_BYTES = 2**28
_BATCH_ROWS = 1024
# What a value of a list is taken for, since Parquet can say a million of them in a few bytes.
_LISTED_BYTES = 256
# Marks at the start of a file; that of UTF-32 begins with one of UTF-16.
_WIDE = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
# U+0085 is left out: where it stands in English text it is a mangled ellipsis.
_LINE_END = re.compile("\r\n|[\r\u2028\u2029]")


class Malformed(Exception):
    """A record that does not follow its format; the message says what is wrong, without the place."""


Record = tuple[str, Any]  # "file:line", and the record (a mapping) or the `Malformed` that stands in its place
Records = Iterable[Record]


def read_rows(
    paths: Sequence[str | Path], fields: Sequence[str] | None = None, limits: Limits = UNLIMITED
) -> Iterator[Record]:
    """Records of JSON-lines, Parquet or CSV files, in their order.

    All files are measured before the first record is handed on, so that nothing is kept of files that are too large.

    Args:
        paths: files that end in `SUFFIXES`. Blank lines are skipped, and counted as lines.
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
        with _readable(path):
            _measure(path, fields, meter)
    for path in paths:
        with _readable(path):
            if str(path).endswith(".parquet"):
                yield from _parquet_rows(path, fields, meter)
            elif str(path).endswith(".csv"):
                yield from _csv_rows(path, fields, meter)
            else:
                yield from _json_rows(path)


def text_of(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold text; its lines end with "\\n", whichever way they did.

    Raises:
        Malformed: the field is missing, holds something else, or half a character.
    """
    value = field_of(row, name)
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {reprlib.repr(value)}, which is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no table can hold it
        raise Malformed(f"{name!r} holds half a character at position {error.start}") from error
    return value if value.isascii() and "\r" not in value else _LINE_END.sub("\n", value)


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """A field of any kind; raises Malformed where it is missing."""
    if name not in row:
        raise Malformed(f"the field {name!r} is missing")
    return row[name]


def describe_files(paths: Sequence[str | Path]) -> list[dict[str, str]]:
    """Path and SHA-256 of each file, for a manifest."""
    for path in paths:
        check_file(path)
    return [{"path": str(path), "sha256": sha256_of_file(path)} for path in paths]


def check_file(path: str | Path) -> None:
    """Raises UserError where a file of records is missing or has an unknown ending."""
    if not str(path).endswith(SUFFIXES):
        raise UserError(f"{path} is of an unknown kind: name a file that ends in {', '.join(SUFFIXES)}.")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist: correct the path among the files of data.")


def hub_rows(
    name: str,
    kind: str,
    revision: str | None = None,
    fields: Sequence[str] | None = None,
    limits: Limits = UNLIMITED,
) -> Iterator[Record]:
    """Records of all splits of a hub's data set (the workflow splits by post itself).

    Args:
        name: the data set's name on the hub, or a local folder in a layout that `datasets` loads.
        kind: "posts" or "comparisons". Of a data set with several configurations the one of this name is taken;
            so is a folder of this name, as in the branches that a hub has converted to Parquet.
        revision: commit or branch; None is the newest, which is not pinned.
        fields: as for `read_rows`; of a hub's data set the columns that they name are read whole.
        limits: as for `read_rows`.

    Yields:
        Where a record stands ("name/split:row", from 1), and the record, or a `Malformed` where it cannot be read.

    Raises:
        UserError: the data set cannot be reached, holds a loading script, has no configuration of that name, or is
            larger than the limits allow.
    """
    import datasets

    try:
        loaded = _load(datasets, name, kind, revision)
    except RuntimeError as error:
        # datasets < 4 ran a repository's Python; newer releases raise a bare RuntimeError.
        if "script" not in str(error):
            raise
        raise UserError(
            f"{name} holds a loading script, which `datasets` no longer runs: download its files and set data.source "
            f"to 'files', or name a revision that was converted to Parquet, such as refs/convert/parquet."
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name} (revision {revision or 'not pinned'}) cannot be loaded ({_first_line(error)}): check the name, "
            f"the revision and the network, or set data.source to 'files'."
        ) from error
    meter = Meter(limits)
    for split, rows in loaded.items():
        if fields is not None:
            named = {field.partition(".")[0] for field in fields}
            # Where it has none of them all are read, so that its rows count as malformed.
            rows = rows.select_columns([c for c in rows.column_names if c in named] or rows.column_names)
        tables = rows.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        for record in _python_rows(f"{name}/{split}", (batch for table in tables for batch in table.to_batches())):
            meter.add_records(f"{name}/{split}", [record])
            yield record


def _load(datasets: Any, name: str, kind: str, revision: str | None) -> Any:
    configurations = datasets.get_dataset_config_names(name, revision=revision)
    if kind in configurations:
        return datasets.load_dataset(name, kind, revision=revision)
    if len(configurations) > 1:
        raise UserError(f"{name} has the configurations {', '.join(configurations)}, but none named {kind!r}.")
    try:
        return datasets.load_dataset(name, data_dir=kind, revision=revision)
    except FileNotFoundError:
        return datasets.load_dataset(name, revision=revision)


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """What a damaged file raises while it is read, as one sentence."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, MemoryError, RecursionError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read to its end ({_first_line(error)}): replace the file.") from error


def _measure(path: str | Path, fields: Sequence[str] | None, meter: Meter) -> None:
    if str(path).endswith(".parquet"):
        meter.add_records(path, _parquet_rows(path, fields, meter))
    elif str(path).endswith(".csv"):
        meter.add(path, Path(path).stat().st_size)  # its rows may span lines: measured while they are read
    else:
        with _open(path) as file:
            meter.add_lines(path, file)


def _open(path: str | Path) -> BinaryIO:
    return gzip.open(path) if str(path).endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]


@contextlib.contextmanager
def _text_lines(path: str | Path) -> Iterator[io.TextIOBase]:
    """The lines of a UTF-8 file, with or without a mark at its start, whatever ends them; a byte that is not UTF-8
    becomes half a surrogate pair."""
    with _open(path) as file:
        start = file.read(4)
    for mark, name in _WIDE:
        if start.startswith(mark):
            raise UserError(f"{path} is {name} text: save it as UTF-8.")
    with _open(path) as file:
        yield io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_rows(path: str | Path) -> Iterator[Record]:
    with _text_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line.removeprefix("\ufeff"))  # files that were put together


def _parse(line: str) -> Any:
    try:
        line.encode("utf-8", "surrogateescape").decode()
        row = json.loads(line, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return Malformed(f"the line is not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        return Malformed(f"the line is not JSON ({error.msg} at character {error.pos + 1})")
    except Malformed as problem:
        return problem
    except ValueError:
        return Malformed(f"the line holds a number of more than {sys.get_int_max_str_digits()} digits")
    except RecursionError:
        return Malformed("the line is nested too deep")
    return row if isinstance(row, dict) else Malformed(f"the line holds {type(row).__name__}, not a JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values they take, so none is."""
    row = dict(pairs)
    if len(row) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise Malformed(f"the field {reprlib.repr(twice)} stands twice in one object")
    return row


def _parquet_rows(path: str | Path, fields: Sequence[str] | None, meter: Meter) -> Iterator[Record]:
    with pq.ParquetFile(path) as file:
        _check_names(path, file.schema_arrow.names, fields)
        leaves = [i for i in range(len(file.schema)) if _wanted(file.schema.column(i).path, fields)]
        _check_groups(path, file, leaves, meter)
        yield from _python_rows(path, _batches(file, leaves))


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
        size = min(max(_BATCH_BYTES // max(largest, 1), 1), _BATCH_ROWS)
        yield from file.iter_batches(batch_size=size, row_groups=[number], columns=columns, use_threads=False)


def _python_rows(path: str | Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
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
            yield Malformed(f"the row cannot be read ({_first_line(error)})")
        else:
            yield row


def _csv_rows(path: str | Path, fields: Sequence[str] | None, meter: Meter) -> Iterator[Record]:
    number = size = 0  # rows after the header; characters of the row that is being read

    def counted(lines: io.TextIOBase) -> Iterator[str]:
        nonlocal size
        while line := lines.readline(meter.record_bytes + 1):
            size += len(line)
            meter.check_record(f"{path}:{number + 1}", size)
            yield line

    csv.field_size_limit(2**31 - 1)  # a field is as long as a row may be
    with _text_lines(path) as lines:
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
                _check_names(path, header, fields)


def _csv_row(header: list[str], row: list[str]) -> Any:
    if len(row) != len(header):
        return Malformed("the row has not as many fields as the header")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return Malformed("the row is not UTF-8")
    return dict(zip(header, row, strict=True))


def _check_names(path: str | Path, names: Sequence[str], fields: Sequence[str] | None) -> None:
    read = names if fields is None else [field.partition(".")[0] for field in fields]
    if twice := [name for name in read if names.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]!r} twice: leave one out.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
