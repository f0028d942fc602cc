"""Where records come from: local files, or a data set of a hub."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.errors import UserError
from prefopt.files import sha256_of_file

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")


class Malformed(Exception):
    """A record that does not follow its format; the message says what is wrong, without the place."""


Record = tuple[str, Any]  # "file:line", and the record (a mapping) or the `Malformed` that stands in its place
Records = Iterable[Record]


def read_rows(paths: Sequence[str | Path]) -> Iterator[Record]:
    """Records of JSON-lines, Parquet or CSV files, in their order.

    Args:
        paths: files that end in `SUFFIXES`. Blank lines are skipped, and counted as lines.

    Yields:
        Where a record stands ("file:line"; in Parquet and CSV "file:row", from 1), and the record. A line that is no
        JSON object, and a row of CSV with too few or too many fields, is yielded as a `Malformed`, so that the caller
        decides whether it stops or counts.

    Raises:
        UserError: a file is missing, has another ending, or is not what its ending says.
    """
    for path in paths:
        check_file(path)
        try:
            if str(path).endswith(".parquet"):
                yield from _parquet_rows(path)
            elif str(path).endswith(".csv"):
                yield from _csv_rows(path)
            else:
                yield from _json_rows(path)
        except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error, pa.ArrowException) as error:
            raise UserError(f"{path} cannot be read to its end ({_first_line(error)}): replace the file.") from error


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


def hub_rows(name: str, kind: str, revision: str | None = None) -> Iterator[Record]:
    """Records of all splits of a hub's data set (the workflow splits by post itself).

    Args:
        name: the data set's name on the hub, or a local folder in a layout that `datasets` loads.
        kind: "posts" or "comparisons". Of a data set with several configurations the one of this name is taken;
            so is a folder of this name, as in the branches that a hub has converted to Parquet.
        revision: commit or branch; None is the newest, which is not pinned.

    Yields:
        Where a record stands ("name/split:row", from 1), and the record.

    Raises:
        UserError: the data set cannot be reached, holds a loading script, or has no configuration of that name.
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
    for split, rows in loaded.items():
        for number, row in enumerate(rows, start=1):
            yield f"{name}/{split}:{number}", row


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


def _json_rows(path: str | Path) -> Iterator[Record]:
    with gzip.open(path) if str(path).endswith(".gz") else Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Malformed(f"the line is not JSON ({error.msg} at character {error.pos + 1})")
    except UnicodeDecodeError as error:
        return Malformed(f"the line is not UTF-8 ({error.reason})")
    return row if isinstance(row, dict) else Malformed(f"the line holds {type(row).__name__}, not a JSON object")


def _parquet_rows(path: str | Path) -> Iterator[Record]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row


def _csv_rows(path: str | Path) -> Iterator[Record]:
    with Path(path).open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), start=1):
            odd = None in row or None in row.values()
            yield f"{path}:{number}", Malformed("the row has not as many fields as the header") if odd else row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
