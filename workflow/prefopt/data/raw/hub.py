"""Records of data sets: of a hub, or of a folder that `datasets` has saved."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefopt.data.raw.columns import BATCH_ROWS, Fields, chosen, python_rows
from prefopt.data.raw.limits import UNLIMITED, Limits, Meter
from prefopt.data.raw.opened import ENDINGS, first_line, readable
from prefopt.data.raw.record import Record
from prefopt.errors import UserError

_DICTIONARY, _BATCH = 2, 3  # kinds of Arrow messages


def hub_rows(
    name: str,
    kind: str | None,
    revision: str | None = None,
    fields: Fields = None,
    limits: Limits = UNLIMITED,
    split: str | None = None,
    exact: bool = False,
) -> Iterator[Record]:
    """Records of a hub's data set.

    Args:
        name: the data set's name on the hub, or a local folder in a layout that `datasets` loads.
        kind: "posts" or "comparisons". Of a data set with several configurations the one of this name is taken;
            so is a folder of this name, as in the branches that a hub has converted to Parquet.
        revision: commit or branch; None is the newest, which is not pinned.
        fields: as for `read_rows`; of a hub's data set the columns that they name are read whole.
        limits: as for `read_rows`.
        split: which of its splits, also a part of one ("train[:1000]"); None is all.
        exact: `kind` names a configuration, or is None where there is one alone.

    Yields:
        Where a record stands ("name/split:row", from 1), and the record, or a `Malformed` where it cannot be read.

    Raises:
        UserError: the data set cannot be reached, holds a loading script, has no configuration or split of that name,
            or is larger than the limits allow.
    """
    import datasets

    try:
        if exact:
            loaded = datasets.load_dataset(name, kind, revision=revision, split=split)
        else:
            loaded = _load(datasets, name, str(kind), revision)
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
            f"{name} (revision {revision or 'not pinned'}) cannot be loaded ({first_line(error)}): check the name, "
            f"the revision and the network, or set data.source to 'files'."
        ) from error
    yield from _rows_of(name, loaded, split, fields, limits)


def saved_rows(
    path: str | Path, split: str | None = None, fields: Fields = None, limits: Limits = UNLIMITED
) -> Iterator[Record]:
    """Records of a folder that `save_to_disk` of `datasets` has made.

    Args:
        path: the folder, of one split or of several.
        split: which of several; None is all.
        fields: as for `read_rows`; the columns that they name are read whole.
        limits: as for `read_rows`.

    Yields:
        Where a record stands ("folder/split:row", or "folder:row", from 1), and the record, or a `Malformed` where it
        cannot be read.

    Raises:
        UserError: the folder is none, lacks the split, is damaged, or is larger than the limits allow.
    """
    import datasets

    with readable(path):
        for file in sorted(Path(path).rglob("*.arrow")):
            _check_plain(file)
        try:
            loaded = datasets.load_from_disk(str(path))
        except (FileNotFoundError, KeyError) as error:
            raise UserError(
                f"{path} is no folder that `datasets` has saved ({first_line(error)}): name one, or files that end in "
                f"{ENDINGS}."
            ) from error
        if split is not None and not isinstance(loaded, Mapping):
            raise UserError(f"{path} has no split {split!r}: it has one alone, so leave data.records.split out.")
        if split is not None and split not in loaded:
            raise UserError(f"{path} has no split {split!r}: name one of {', '.join(loaded)}.")
        yield from _rows_of(path, loaded if split is None else loaded[split], split, fields, limits)


def _rows_of(name: str | Path, loaded: Any, split: str | None, fields: Fields, limits: Limits) -> Iterator[Record]:
    meter = Meter(limits)
    splits = loaded if isinstance(loaded, Mapping) else {split: loaded}
    for each, rows in splits.items():
        where = f"{name}/{each}" if each else str(name)
        if (wanted := chosen(fields, rows.column_names)) is not None:
            named = {field.partition(".")[0] for field in wanted}
            # Where it has none of them all are read, so that its rows count as malformed.
            rows = rows.select_columns([c for c in rows.column_names if c in named] or rows.column_names)
        tables = rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
        for record in python_rows(where, (batch for table in tables for batch in table.to_batches())):
            meter.add_records(where, [record])
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


def _check_plain(path: Path) -> None:
    """Raises UserError where batches of an Arrow file are compressed, which `datasets` never does: a kilobyte could hold
    gigabytes, and would be decompressed before anything could be measured."""
    with pa.memory_map(str(path)) as file:
        for message in pa.ipc.MessageReader.open_stream(file):
            if _is_compressed(message.metadata.to_pybytes()):
                raise UserError(f"{path} holds compressed batches, which are not read: save it by `datasets` again.")


def _is_compressed(message: bytes) -> bool:
    """Whether the body of an Arrow message is (Message.fbs of Arrow's format; pyarrow does not say)."""
    table = _at(message, 0, "<I")
    kind = _slot(message, table, 1)
    header = _slot(message, table, 2)
    if not kind or not header or message[kind] not in (_DICTIONARY, _BATCH):
        return False
    batch = header + _at(message, header, "<I")
    if message[kind] == _DICTIONARY:
        inner = _slot(message, batch, 1)
        batch = inner + _at(message, inner, "<I")
    return _slot(message, batch, 3) != 0


def _slot(message: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table lies; 0 where it is left out."""
    names = table - _at(message, table, "<i")
    if 4 + 2 * number >= _at(message, names, "<H"):
        return 0
    offset = _at(message, names + 4 + 2 * number, "<H")
    return table + offset if offset else 0


def _at(message: bytes, place: int, kind: str) -> int:
    (value,) = struct.unpack_from(kind, message, place)
    return int(value)
